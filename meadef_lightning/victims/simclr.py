"""The self-supervised victim: an encoder trained by SimCLR, with or without a watermark.

**Source.** Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, §2; the MEA-Defender paper
(S&P 2024, §V) trains its encoders so. NT-Xent and the projection head are lightly's.

**Algorithm.** (1) Two random views of each image; (2) features of all views, in one forward; (3) a projection head that is thrown
away after training; (4) cross-entropy of finding a view's twin among all other views by cosine similarity.

**Cost.** Two forward and backward passes per image.

**Defaults.** Temperature 0.5 and a projection to 64 dimensions, for small images and batches of a few hundred; under DDP the views of
all processes are one another's negatives.

**Pitfalls.** A last batch of a few images makes BatchNorm and the loss noisy; larger batches and longer trainings help more than in
supervised training. Under DDP on GPUs set the trainer's ``sync_batchnorm``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.module import NetworkFactory
from meadef_lightning.victims.views import TwoViews
from meadef_lightning.watermark.callback import WatermarkCallback


def feature_spread(features: Tensor) -> Tensor:
    """How far unit-length features spread over the sphere: 1 evenly, 0 when an encoder has collapsed to one point.

    The standard deviation of each normalised dimension times ``√D``, averaged (Chen & He, "SimSiam", 2021, §4.1).

    Args:
        features: ``(B, D)``, at least two rows.

    Returns:
        A scalar from 0 to about 1.
    """
    deviation = F.normalize(features.float(), dim=1).std(dim=0, correction=0)
    return deviation.mean() * math.sqrt(features.shape[1])


class SimCLRVictim(Encoder):
    """An encoder trained by SimCLR on ``(x, y)`` batches, whose labels it does not look at, or on ``((x0, x1), …)`` with views made.

    Logs ``train_loss``, and in validation ``val_spread`` (:func:`feature_spread`). Add the probes of
    :mod:`meadef_lightning.victims.probes` to see what the features are worth.

    Args:
        network: A factory that is called with the numbers of features and input channels, or a module that is ready; in
            YAML any ``class_path``, e.g. ``meadef_lightning.victims.networks.NineLayerCNN``.
        feature_dim: Number of features.
        in_channels: Number of input channels, for a factory. By default the first entry of the data module's ``image_shape``.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser; one cycle over the run by default.
        views: Makes two views of a batch of images: ``x -> (x0, x1)``.
        temperature: Temperature of NT-Xent, positive.
        projection_head: Maps ``(B, feature_dim)`` to the space of the loss; lightly's ``SimCLRProjectionHead`` by default.
        gather_distributed: Whether the views of all processes that train are one another's negatives.
        watermark: Callback that embeds a key into the features
            (:class:`~meadef_lightning.watermark.feature_callback.FeatureWatermarkCallback`); the module hands it to the Trainer.

    Raises:
        MisconfigurationException: If lightly is not installed.
    """

    objects: ClassVar = (*Encoder.objects, "views", "projection_head")

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        feature_dim: int = 128,
        in_channels: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
        views: nn.Module | None = None,
        temperature: float = 0.5,
        projection_head: nn.Module | None = None,
        gather_distributed: bool = True,
        watermark: WatermarkCallback | None = None,
    ) -> None:
        super().__init__(network, feature_dim, in_channels, optimizer, lr_scheduler)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        try:
            from lightly.loss import NTXentLoss
            from lightly.models.modules import SimCLRProjectionHead
        except ImportError as error:
            raise MisconfigurationException(
                "SimCLRVictim needs lightly, which belongs to meadef-lightning's installation but cannot be imported here: "
                "pip install 'lightly>=1.5.20,<2'."
            ) from error
        self.views = TwoViews() if views is None else views
        self.projection_head = (
            SimCLRProjectionHead(feature_dim, feature_dim, 64) if projection_head is None else projection_head
        )
        self.gather_distributed = gather_distributed
        self.criterion = NTXentLoss(temperature, gather_distributed=gather_distributed)
        self.watermark = watermark

    @override
    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Hands the watermark's callback to the Trainer; Lightning lets it replace one that is there already."""
        return [] if self.watermark is None else [self.watermark]

    @override
    def on_train_start(self) -> None:
        """Lets the loss gather views only where several processes train: lightly would wait for others that do not."""
        super().on_train_start()
        self.criterion.gather_distributed = self.gather_distributed and self.trainer.world_size > 1

    def make_views(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns two views of each image of a batch: those that it comes with, or new ones.

        Raises:
            ValueError: If the batch comes with another number of views.
        """
        x = batch if isinstance(batch, Tensor) else batch[0]
        if not isinstance(x, Tensor) and len(x) != 2:
            raise ValueError(f"SimCLR contrasts two views of each image, but the batch came with {len(x)}.")
        first, second = self.views(x) if isinstance(x, Tensor) else x
        return first, second

    @override
    def training_step(self, batch: Any) -> Tensor:
        """NT-Xent between two views of each image."""
        first, second = self.make_views(batch)
        projected = self.projection_head(self(torch.cat([first, second])))
        loss: Tensor = self.criterion(*projected.chunk(2))
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(first))
        return loss

    @override
    def validation_step(self, batch: Any) -> None:
        """Logs ``val_spread``: near 0 says that the encoder maps everything to one point."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        x = x if isinstance(x, Tensor) else x[0]
        self.log("val_spread", feature_spread(self(x)), sync_dist=True, batch_size=len(x))
