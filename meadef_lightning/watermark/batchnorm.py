"""BatchNorm while a watermark is embedded: layers that use their running statistics and leave them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNormMode = Literal["frozen", "running", "batch"]
"""What BatchNorm layers do while a watermark is embedded; see `meadef_lightning.watermark.objective.WatermarkObjective`."""


def training_layers(module: nn.Module) -> list[_BatchNorm]:
    """Returns the module's BatchNorm layers that are in training mode."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training]


@contextmanager
def frozen_batchnorm(module: nn.Module) -> Iterator[None]:
    """Lets BatchNorm layers use, and not change, their running statistics inside the block."""
    layers = training_layers(module)
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


class BatchNormFreezer:
    """Takes BatchNorm out of training from :meth:`freeze` to :meth:`unfreeze`, where no block of code spans both."""

    def __init__(self) -> None:
        self._frozen: list[_BatchNorm] = []
        self._checked = False

    def __getstate__(self) -> dict[str, object]:
        """Leaves the layers out: a copy has frozen none."""
        return {"_frozen": [], "_checked": self._checked}

    def freeze(self, module: nn.Module) -> None:
        """Freezes the layers that are in training mode; those of an earlier call that nobody undid come first.

        Raises:
            MisconfigurationException: If they have no running statistics yet.
        """
        self.unfreeze()
        self._frozen = training_layers(module)
        # asked once, since it waits for the device
        if not self._checked and any(
            layer.num_batches_tracked == 0 for layer in self._frozen if layer.num_batches_tracked is not None
        ):
            raise MisconfigurationException(
                "The watermark keeps BatchNorm's running statistics as they are, but these layers have none yet: the model is not "
                'trained. Start the watermark later (start=0.65), or set batchnorm="running".'
            )
        self._checked = True
        for layer in self._frozen:
            layer.training = False

    def unfreeze(self) -> None:
        """Gives the layers their mode back."""
        for layer in self._frozen:
            layer.training = True
        self._frozen = []
