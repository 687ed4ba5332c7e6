"""How tensors travel between `HTTPOracle` and the server: base64 of little-endian numbers, and their shape, within JSON.

Every language can write it, and OpenAPI can describe it. Base64 and JSON take a few microseconds per digit, about a tenth of
what the ledger and a small network need, so that a second, binary format would not pay for itself. Floating point numbers travel
as bytes, so that an answer over HTTP is bit for bit the answer of the model.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from meadef_lightning.oracle.policies import AnswerKind

ENVELOPE: Final = 4096
"""Bytes of JSON around the numbers, at most."""

_FORMATS: Final[dict[torch.dtype, tuple[str, int]]] = {torch.float32: ("<f4", 4), torch.int64: ("<i8", 8)}


def answer_dtype(kind: AnswerKind) -> torch.dtype:
    """The dtype in which answers of this kind travel."""
    return torch.int64 if kind == "hard" else torch.float32


def message_bytes(values: int, dtype: torch.dtype) -> int:
    """The most bytes that a message with this many values takes."""
    return 4 * math.ceil(values * _FORMATS[dtype][1] / 3) + ENVELOPE


def pack(x: Tensor) -> dict[str, Any]:
    """Turn a tensor into JSON values.

    Args:
        x: float32 or int64, on any device.

    Returns:
        ``{"shape": [...], "data": "base64 of the little-endian values, row by row"}``.
    """
    data = x.detach().cpu().contiguous().numpy().astype(_FORMATS[x.dtype][0], copy=False)
    return {"shape": list(x.shape), "data": base64.b64encode(data.tobytes()).decode("ascii")}


def unpack(shape: Sequence[int], data: str, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`.

    Args:
        shape: Positive sizes.
        data: Base64.
        dtype: float32 or int64.

    Returns:
        The tensor, on the CPU.

    Raises:
        ValueError: If the data is no base64, or not as long as the shape says.
    """
    form, size = _FORMATS[dtype]
    try:
        raw = bytearray(base64.b64decode(data, validate=True))
    except ValueError as error:
        raise ValueError(f"data is not base64: {error}.") from error
    if len(raw) != math.prod(shape) * size:
        raise ValueError(
            f"data holds {len(raw)} bytes, but {form} values of shape {list(shape)} take {math.prod(shape) * size}."
        )
    return torch.from_numpy(np.frombuffer(raw, dtype=form).astype(form.replace("<", "="), copy=False)).reshape(*shape)
