"""The door to a victim that somebody else serves: an oracle over HTTP, for thefts and for verdicts.

The server is not trusted: its answers are bounded in size and time, and checked before they are stored. The client keeps a ledger
of its own, so that what was answered once is never asked again, whatever the server counts. Asking needs no extra packages;
serving does (`meadef_lightning.oracle.server`).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

import torch
from torch import Tensor
from typing_extensions import Self, override

from meadef_lightning.oracle.base import BlackBox
from meadef_lightning.oracle.ledger import QueryLedger
from meadef_lightning.oracle.policies import AnswerKind
from meadef_lightning.oracle.transport import Transport
from meadef_lightning.oracle.wire import ENVELOPE, answer_dtype, message_bytes, pack, unpack

_MOST_CLASSES: Final = 100_000
_TOLERANCE: Final = 1e-3


@dataclass(frozen=True)
class ServedModel:
    """What a server tells about the model behind it.

    Attributes:
        model: The server's name for what answers; another one means other answers.
        kind: Kind of the answers.
        num_classes: Width of an answer: classes, or features of an encoder.
        image_shape: Channels, height and width of a query.
        max_rows: Most rows in a request.
    """

    model: str
    kind: AnswerKind
    num_classes: int
    image_shape: tuple[int, int, int]
    max_rows: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Reads what ``GET /info`` gave; raises ``ValueError`` if a field is missing or out of range."""
        model, shape = value.get("model"), value.get("image_shape")
        if not isinstance(model, str) or not re.fullmatch(r"[!-~]{1,128}", model):
            raise ValueError("model is no name")
        if value.get("kind") not in get_args(AnswerKind):
            raise ValueError(f"kind is none of {', '.join(get_args(AnswerKind))}")
        if not isinstance(shape, list) or len(shape) != 3 or not all(_is_size(size, 1 << 16) for size in shape):
            raise ValueError("image_shape is not three positive sizes")
        for name, most in (("num_classes", _MOST_CLASSES), ("max_rows", 1 << 31)):
            if not _is_size(value.get(name), most):
                raise ValueError(f"{name} is no number from 1 to {most}")
        return cls(model, value["kind"], value["num_classes"], (shape[0], shape[1], shape[2]), value["max_rows"])


class HTTPOracle(BlackBox):
    """A victim behind a URL: asked, counted and cached like `Oracle`, so that every theft and every verdict takes either.

    The first use asks the server what it serves. Requests that fail for a reason that may pass (no connection, status 429 or
    5xx) are repeated after growing, random pauses, or those that the server asks for, up to a minute; repeating costs nothing
    where the first one was answered in vain. The server checks its own budget batch by batch.

    Args:
        url: Address of the server, ``https://host[:port][/path]``. Over plain ``http`` everybody on the way can read the API key,
            so that is for this machine only.
        api_key: API key; by default the environment variable MEADEF_API_KEY which, unlike this argument, does not end up in saved
            configurations.
        ledger: What this client has asked; see `Oracle`. It is tied to the model that the server names.
        batch_size: Most rows in a request, and the unit that is stored as a whole; lowered to what the server takes.
        timeout: Seconds to wait for a connection, for the head of an answer, and for its body.
        retries: How often a request is repeated, at most.
        backoff: Seconds before the first repetition; doubled each time, and shortened at random by up to a half.

    Raises:
        ValueError: If an argument is out of range, or there is no API key that can be sent; the message never shows it.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        ledger: QueryLedger | None = None,
        batch_size: int = 512,
        timeout: float = 60.0,
        retries: int = 8,
        backoff: float = 0.25,
    ) -> None:
        super().__init__(ledger, batch_size)
        self._transport = Transport(url, api_key, timeout, retries, backoff)
        self._served: ServedModel | None = None

    @property
    def served(self) -> ServedModel:
        """What the server serves, by its own account; asked once.

        Raises:
            OracleHTTPError: If it cannot be asked, or does not say.
        """
        if self._served is None:
            value = self._transport.exchange("info", None, ENVELOPE)
            try:
                self._served = ServedModel.from_json(value)
            except ValueError as error:
                raise self._transport.error(
                    "info", f"the answer is not that of a meadef oracle: {error}", "Check the address."
                ) from None
            self.batch_size = min(self.batch_size, self._served.max_rows)
        return self._served

    @property
    @override
    def labels(self) -> AnswerKind:
        return self.served.kind

    @override
    def fingerprint(self) -> str:
        """SHA-256 over what the server says that it serves, as 64 hexadecimal digits; it does not depend on the address."""
        served = self.served
        facts = f"http|{served.model}|{served.kind}|{served.num_classes}|{served.image_shape}"
        return hashlib.sha256(facts.encode()).hexdigest()

    @override
    def _answer(self, x: Tensor) -> Tensor:
        served, transport = self.served, self._transport
        if tuple(x.shape[1:]) != served.image_shape:
            raise ValueError(
                f"{transport.url} takes images of shape {served.image_shape}, got {tuple(x.shape[1:])}. Nothing was asked; bring "
                "them to this shape."
            )
        dtype = answer_dtype(served.kind)
        shape = [len(x)] if served.kind == "hard" else [len(x), served.num_classes]
        most = message_bytes(torch.Size(shape).numel(), dtype)
        reply = transport.exchange("predict", json.dumps(pack(x.float())).encode(), most)
        if reply.get("model") != served.model or reply.get("kind") != served.kind:
            raise transport.error(
                "predict",
                "another model or policy answers than before; nothing of this batch was stored",
                "Start anew, with a new ledger, if that was meant to happen.",
            )
        try:
            if reply.get("shape") != shape or not isinstance(reply.get("data"), str):
                raise ValueError(f"it is not of shape {shape}")
            answers = unpack(shape, reply["data"], dtype)
            check_answers(answers, served.kind, served.num_classes)
        except ValueError as error:
            raise transport.error(
                "predict",
                f"the answer cannot be right: {str(error).rstrip('.')}; nothing of this batch was stored",
                "Tell whoever serves the model, or do not trust it.",
            ) from None
        return answers

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._transport.url!r}, ledger={self.ledger!r})"


def check_answers(answers: Tensor, kind: AnswerKind, num_classes: int) -> None:
    """Check that answers are what their kind says.

    Args:
        answers: ``(B, K)`` float32, or ``(B,)`` int64 for hard labels.
        kind: Kind of the answers.
        num_classes: Number of classes, ``K``.

    Raises:
        ValueError: If a label is no class, a value is not finite, a probability lies outside [0, 1], or a row sums to more than
            1 (and what rounding to decimals can add: half a unit for each probability that is not 0).
    """
    if kind == "hard":
        if int(answers.min()) < 0 or int(answers.max()) >= num_classes:
            raise ValueError(f"there are labels outside 0 to {num_classes - 1}")
        return
    if not bool(answers.isfinite().all()):
        raise ValueError("there are NaN or infinite values")
    if kind == "feature":
        return
    if bool((answers < -_TOLERANCE).any()) or bool((answers > 1 + _TOLERANCE).any()):
        raise ValueError("there are probabilities outside [0, 1]")
    excess = answers.double().sum(dim=1) - 1 - _TOLERANCE
    if bool((excess > 0).any()):
        unit = next((10.0**-d for d in range(8) if torch.equal(answers, answers.round(decimals=d))), 0.0)
        if bool((excess > 0.5 * unit * (answers > 0).sum(dim=1)).any()):
            raise ValueError("there are rows of probabilities that sum to more than 1")


def _is_size(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most
