"""What every encoder here shares, self-supervised victim or stolen copy: images in, feature vectors out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.victims.module import NetworkFactory, NetworkModule


class Encoder(NetworkModule):
    """Base of self-supervised victims and stolen encoders: a network whose outputs are features, and its optimiser.

    Every classifier network here serves as a backbone: its "classes" are then the features, which come out of its last linear
    layer. Subclasses add a ``training_step``.

    Args:
        network: A factory that is called with the numbers of features and input channels, or a module that is ready.
        feature_dim: Number of features ``D``. By default the data module's ``feature_dim``, which a thief's data has
            from the answers it holds; a ready network may leave it open.
        in_channels: Number of input channels, for a factory. By default the first entry of the data module's ``image_shape``.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser; one cycle over the run by default.
    """

    sizes: ClassVar = {"feature_dim": "feature_dim", "in_channels": "image_shape"}

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        feature_dim: int | None = None,
        in_channels: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, optimizer, lr_scheduler)
        if feature_dim is not None and feature_dim < 1:
            raise ValueError(f"feature_dim={feature_dim} must be at least 1 feature.")

    @property
    def feature_dim(self) -> int | None:
        """Number of features; ``None`` while neither the user nor a data module has told it."""
        size = self.hparams.get("feature_dim")
        return None if size is None else int(size)

    @override
    def configure_model(self) -> None:
        """Builds the network where a factory was given, and spreads it under FSDP2; does nothing the second time.

        Raises:
            MisconfigurationException: If a size is neither given nor told by a data module, or the factory does not take them.
        """
        self.build_network(**self.data_sizes())
        self.shard()

    def build_network(self, in_channels: int | None = None, feature_dim: int | None = None) -> None:
        """Builds the network, also outside a Trainer (to load weights into it); sizes that the user gave go first.

        Args:
            in_channels: Channels of the images, if known.
            feature_dim: Number of features, if known.

        Raises:
            MisconfigurationException: If a size is not known, or the factory does not take them.
        """
        self.build({"feature_dim": feature_dim, "in_channels": in_channels})

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, D)`` features.

        Raises:
            ValueError: If the network returns anything else, or not :attr:`feature_dim` features.
        """
        features = self.ready_network()(x)
        if isinstance(features, Tensor) and features.ndim > 2:
            features = features.flatten(1)  # backbones that end in pooling leave (B, D, 1, 1)
        wanted = self.feature_dim
        if not isinstance(features, Tensor) or features.ndim != 2 or wanted not in (None, features.shape[1]):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"The network of this {type(self).__name__} must return features of shape ({len(x)}, {wanted or 'D'}), got {got}. "
                "Set feature_dim to what it returns, or let it return one tensor of features."
            )
        return features

    @override
    def predict_step(self, batch: Any) -> Tensor:
        """Features, ``(B, D)``, of a batch of inputs or of a tuple that starts with them."""
        features: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return features
