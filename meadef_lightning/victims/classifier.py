"""What every classifier here shares, victim or thief: building its network, its optimiser, its test."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

_ENDLESS = "The one-cycle schedule needs an end: set the trainer's max_epochs or max_steps, or give an lr_scheduler."

NetworkFactory = Callable[[int, int], nn.Module]
"""Makes a network from the numbers of classes and of input channels."""


def one_cycle_factor(step: int, total: int, warmup: float = 0.2, start: float = 0.04) -> float:
    """Factor on the learning rate: up along a cosine for the first part of the run, then down to 0.

    Smith & Topin, "Super-Convergence" (2018). Steps past the end stay at 0, so that a run can be resumed with more epochs.

    Args:
        step: Optimiser steps taken.
        total: Optimiser steps of the run, at least 1.
        warmup: Part of the run before the peak, below 1.
        start: Factor at step 0.

    Returns:
        A factor from 0 to 1.
    """
    peak = warmup * total
    if step < peak:
        return start + (1 - start) * (1 - math.cos(math.pi * step / peak)) / 2
    return (1 + math.cos(math.pi * min(1.0, (step - peak) / (total - peak)))) / 2


class Classifier(LightningModule):
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

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        num_classes: int | None = None,
        in_channels: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        # plain values only, of subclasses too: checkpoints load with weights_only, and never hold a watermark's key
        self.save_hyperparameters(ignore=["network", "optimizer", "lr_scheduler", "watermark"])
        self.network: nn.Module | None = network if isinstance(network, nn.Module) else None
        self._factory = network
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

    @override
    def configure_model(self) -> None:
        """Builds the network where a factory was given; does nothing the second time.

        Raises:
            MisconfigurationException: If a size is neither given nor told by a data module, or the factory does not take them.
        """
        if self.network is None:
            data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
            shape = getattr(data, "image_shape", None)
            self.build_network(getattr(data, "num_classes", None), None if shape is None else shape[0])

    def build_network(self, num_classes: int | None, in_channels: int | None) -> None:
        """Builds the network, also outside a Trainer (to load weights into it); sizes that the user gave go first.

        Args:
            num_classes: Number of classes of the data, if known.
            in_channels: Channels of its images, if known.

        Raises:
            MisconfigurationException: If a size is not known, or the factory does not take them.
        """
        if self.network is not None:
            return
        sizes = {"num_classes": num_classes, "in_channels": in_channels}
        sizes |= {name: self.hparams[name] for name in sizes if self.hparams.get(name) is not None}
        for name, source in (("num_classes", "num_classes"), ("in_channels", "image_shape")):
            if sizes[name] is None:
                raise MisconfigurationException(
                    f"The network needs {name}, which was not given, and no data module with {source} is attached. Give "
                    f"{type(self).__name__} {name}=…, or run it with a data module."
                )
        self.hparams.update(sizes)  # so that a checkpoint can be loaded without the data module
        try:
            self.network = self._factory(int(sizes["num_classes"] or 0), int(sizes["in_channels"] or 0))
        except TypeError as error:
            raise MisconfigurationException(
                f"The network of this {type(self).__name__} cannot be made ({error}): it was called with the positional arguments "
                f"num_classes={sizes['num_classes']} and in_channels={sizes['in_channels']}. A class_path must name something "
                "that takes these two first; in Python, a module that is ready can be given instead."
            ) from error

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, K)`` logits."""
        if self.network is None:
            raise MisconfigurationException(
                f"This {type(self).__name__} has no network yet. Call configure_model() first, or give it a module instead of a factory."
            )
        logits: Tensor = self.network(x)
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

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds optimiser and scheduler."""
        optimizer = self._optimizer(self.parameters())
        if self._lr_scheduler is not None:
            scheduler = self._lr_scheduler(optimizer)
            if isinstance(scheduler, ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise MisconfigurationException(_ENDLESS)
        cycle = LambdaLR(optimizer, self._one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def _one_cycle(self, step: int) -> float:
        # The length of the run is asked for after the first step only: asking builds the data loader, and one that is built
        # before a checkpoint is restored starts the interrupted epoch again.
        total = self.trainer.estimated_stepping_batches if step else 1
        if not 1 <= total < math.inf:
            raise MisconfigurationException(_ENDLESS)
        return one_cycle_factor(step, int(total))
