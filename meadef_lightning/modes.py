"""Eval mode, borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, and afterwards exactly the flags from before.

    Each part has a flag of its own, since parts of a module in training may be in eval mode; and flags are set and not ``eval()`` called,
    which modules may have made more of than can be undone.

    Args:
        module: Any module.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
