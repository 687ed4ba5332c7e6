import os

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
# one order of summation here and in the processes that tests start, which are compared bit for bit; and no two workers share a core
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def second(monkeypatch):
    """A second device, which Lightning's ``accelerator="auto"`` finds."""
    from second_device import second_device

    with second_device(monkeypatch) as device:
        yield device
