import os

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture
def second(monkeypatch):
    """A second device, which Lightning's ``accelerator="auto"`` finds."""
    from second_device import second_device

    with second_device(monkeypatch) as device:
        yield device
