"""Torch's global random state, borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_random_state(device: torch.device | str = "cpu") -> Iterator[None]:
    """Whatever is drawn or seeded inside the block, the CPU's and the device's global random states are as before afterwards.

    ``torch.random.fork_rng()`` as it is would keep those of every GPU of the machine, and take hold of all of them for it, in every process.

    Args:
        device: Where besides the CPU random numbers are drawn.
    """
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
