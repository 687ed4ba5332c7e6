"""Fingerprints: which samples were asked, and which weights answered."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from meadef_lightning.data.stored import Images, batches
from meadef_lightning.verification.sealing import canonical

_ROWS_READ = 256


def tensors_fingerprint(*tensors: Images) -> str:
    """Returns the SHA-256 over dtypes, shapes and bytes of the tensors, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for position, tensor in enumerate(tensors):
        if isinstance(tensor, Tensor):
            _absorb(digest, str(position), tensor)
            continue
        digest.update(canonical([str(position), str(tensor.dtype), list(tensor.shape)]))
        for rows in batches(tensor, _ROWS_READ):
            digest.update(_bytes(rows))
    return digest.hexdigest()


def model_fingerprint(module: nn.Module) -> str:
    """Returns the SHA-256 over a module's ``state_dict``: names, dtypes, shapes and bytes of its tensors.

    It does not depend on the device or on ``torch.compile``. State that is no tensor counts by its name only.
    """
    digest = hashlib.sha256()
    state = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    for name in sorted(state):
        _absorb(digest, name, state[name] if isinstance(state[name], Tensor) else torch.empty(0))
    return digest.hexdigest()


def _absorb(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
