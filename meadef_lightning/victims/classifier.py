"""What every classifier here shares, victim or thief: building its network, its optimiser, its test."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.victims.module import NetworkFactory, NetworkModule, one_cycle_factor

__all__ = ["Classifier", "NetworkFactory", "one_cycle_factor"]


class Classifier(NetworkModule):
    """Base of victims and students: a network built for the data at hand, one optimiser, a test of its accuracy.

    Args:
        network: A factory that is called with the numbers of classes and input channels, or a module that is ready.
        num_classes: Number of classes, for a factory. By default the data module's ``num_classes``.
        in_channels: Number of input channels, for a factory. By default the first entry of the data module's ``image_shape``.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser. By default the learning rate makes one cycle
            over the run (:func:`one_cycle_factor`), its peak being the optimiser's; for a constant one give
            ``torch.optim.lr_scheduler.ConstantLR`` with ``factor: 1``.
    """

    sizes: ClassVar = {"num_classes": "num_classes", "in_channels": "image_shape"}

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        num_classes: int | None = None,
        in_channels: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, optimizer, lr_scheduler)

    @override
    def configure_model(self) -> None:
        """Builds the network where a factory was given, and spreads it under FSDP2; does nothing the second time.

        Raises:
            MisconfigurationException: If a size is neither given nor told by a data module, or the factory does not take them.
        """
        self.build_network(**self.data_sizes())
        self.shard()

    def build_network(self, num_classes: int | None, in_channels: int | None) -> None:
        """Builds the network, also outside a Trainer (to load weights into it); sizes that the user gave go first.

        Args:
            num_classes: Number of classes of the data, if known.
            in_channels: Channels of its images, if known.

        Raises:
            MisconfigurationException: If a size is not known, or the factory does not take them.
        """
        self.build({"num_classes": num_classes, "in_channels": in_channels})

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, K)`` logits."""
        logits: Tensor = self.ready_network()(x)
        return logits

    @override
    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Logs ``test_accuracy`` on batches of samples and their true classes."""
        x, y = batch
        accuracy = (self(x).argmax(dim=-1) == y).float().mean()
        self.log("test_accuracy", accuracy, sync_dist=True, batch_size=len(x))

    @override
    def predict_step(self, batch: tuple[Tensor, ...] | Tensor) -> Tensor:
        """Logits, ``(B, K)``, of a batch of inputs or of a tuple that starts with them."""
        logits: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return logits
