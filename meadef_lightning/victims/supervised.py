"""The supervised victim: a classifier worth stealing, with or without a watermark."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.victims.classifier import Classifier, NetworkFactory
from meadef_lightning.watermark.callback import WatermarkCallback


class SupervisedVictim(Classifier):
    """A classifier trained with cross-entropy on ``(x, y)`` batches. Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``test_accuracy``.

    Args:
        network: A factory that is called with the numbers of classes and input channels, or a module that is ready; in
            YAML any ``class_path``, e.g. ``meadef_lightning.victims.networks.VGGLike``.
        num_classes: Number of classes, for a factory. By default the data module's ``num_classes``.
        in_channels: Number of input channels, for a factory. By default the first entry of the data module's ``image_shape``.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser; one cycle over the run by default.
        label_smoothing: Share of the label spread over all classes, in ``[0, 1)``.
        watermark: Callback that embeds a key; the module hands it to the Trainer itself (``configure_callbacks``), so a
            watermarked victim needs no further argument anywhere.
    """

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        num_classes: int | None = None,
        in_channels: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        watermark: WatermarkCallback | None = None,
    ) -> None:
        super().__init__(network, num_classes, in_channels, optimizer, lr_scheduler)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1.")
        self.label_smoothing = label_smoothing
        self.watermark = watermark

    @override
    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Hands the watermark's callback to the Trainer; Lightning lets it replace one that is there already."""
        return [] if self.watermark is None else [self.watermark]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy on a batch of samples and true classes."""
        x, y = batch
        loss = F.cross_entropy(self(x), y, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Logs loss and accuracy on held-out samples."""
        x, y = batch
        logits = self(x)
        accuracy = (logits.argmax(dim=-1) == y).float().mean()
        self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True, batch_size=len(x))
        self.log("val_accuracy", accuracy, sync_dist=True, batch_size=len(x), prog_bar=True)
