"""The student of an encoder: the LightningModule that imitates a victim's features, alone or on augmented views.

**Source.** Plain imitation: feature distillation in the sense of Romero et al., "FitNets" (2015), §2, from the last layer only. With an
augmentation: Liu et al., "StolenEncoder: Stealing Pre-trained Encoders in Self-supervised Learning" (CCS 2022), §4.

**Algorithm.** 1. The victim was asked once about every image; ``F`` is its answer (`meadef_lightning.extraction.stolen_encoder`). 2. A step
makes ``k`` augmented views of the batch on the student's device and encodes images and views in one forward pass. 3. The loss is ``mean
d(f(x), F) + (λ/k) Σ_j mean d(f(aug_j x), F)``: since a contrastive victim maps an image and its views to nearly the same place, the answer to the
image stands for the answers to its views, which are never asked. Without an augmentation only the first term is left. 4. A student with
another number of features than the victim gets a linear map behind it while it learns; its own features are what is stolen.

**Cost.** ``1 + k`` forward and backward passes a batch, no queries.

**Defaults.** Distance ``"l2"`` between unit vectors, as in the paper. λ = 9 is the authors' setting; their k = 9 is 1 here: views are drawn anew in
every step, so k only lowers the variance of a term whose expectation stays the same, at tenfold cost. The optimiser is AdamW with one cycle
instead of SGD at 1e-3 over a thousand epochs.

**Views.** The authors' code mirrors images and changes colours (brightness, contrast and saturation by up to 0.4, hue by 0.1, with probability 0.8; grey
with 0.2), and does not crop. Contrastive training's own views would be a wrong teacher: on digits a victim's feature of an image has a
cosine of 0.88 to that of a SimCLR view of it and of 0.99 to one of other brightness and contrast. With the former a thief's features
came to 0.980–0.988 (cosine to the victim's, held-out images) and the watermark to 28–42 %, with the latter to 0.991 and 75 % (one seed). As
`RandomView`: ``scale=(1, 1), ratio=(1, 1), shift=0, rotation=0, brightness=0.4, contrast=0.4, blur=0, noise=0``, and ``flip`` and colours where images
have them.

**Pitfalls.** The published losses sum over a batch, which ties the learning rate to its size; here they are averaged. ``λ = k = 0``, as in some
published run scripts, is plain imitation under another name. The adapter is linear on purpose: a deeper one would imitate in the student's
stead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.module import NetworkFactory

Distance = Literal["l2", "cosine", "mse"]


def feature_distance(features: Tensor, answers: Tensor, distance: Distance = "l2") -> Tensor:
    """Distance of each row of features from the victim's.

    Args:
        features: Student's features, ``(..., B, D)``.
        answers: Victim's features, ``(B, D)``.
        distance: ``"l2"``, Euclidean between unit vectors (not squared), in ``[0, 2]``; ``"cosine"``, one minus the cosine, in ``[0, 2]``;
            ``"mse"``, mean squared difference of the features as they are, which imitates their length, too.

    Returns:
        float32 ``(..., B)``.

    Raises:
        ValueError: If the shapes do not fit, or there is no such distance.
    """
    if not answers.is_floating_point() or answers.ndim != 2 or features.shape[-2:] != answers.shape:
        raise ValueError(
            f"The student gives features of shape {tuple(features.shape)}, the answers are {answers.dtype} of shape {tuple(answers.shape)}. "
            "They must be features, floating point of the same shape; answer_dim of the student is the victim's number of features."
        )
    features, answers = features.float(), answers.float()
    if distance == "l2":
        difference = F.normalize(features, dim=-1) - F.normalize(answers, dim=-1)
        distances: Tensor = torch.linalg.vector_norm(difference, dim=-1)
        return distances
    if distance == "cosine":
        return 1 - F.cosine_similarity(features, answers, dim=-1)
    if distance == "mse":
        return (features - answers).square().mean(dim=-1)
    raise ValueError(f"distance={distance!r} is none of {get_args(Distance)}.")


def imitation_loss(features: Tensor, answers: Tensor, distance: Distance = "l2") -> Tensor:
    """Plain feature distillation: the mean of :func:`feature_distance` over the batch, a scalar."""
    return feature_distance(features, answers, distance).mean()


def stolen_encoder_loss(
    features: Tensor, views: Tensor, answers: Tensor, weight: float, distance: Distance = "l2"
) -> Tensor:
    """Liu et al. (2022), §4: ``mean_i d(f(x_i), F_i) + (λ/k) Σ_j mean_i d(f(aug_j x_i), F_i)``.

    The paper sums over the data set; the mean differs by a constant factor, and keeps the step's size when the batch's changes.

    Args:
        features: Student's features of the images, ``(B, D)``.
        views: Its features of ``k`` augmented views of each, ``(k, B, D)``.
        answers: Victim's features of the images, ``(B, D)``.
        weight: λ, at least 0.
        distance: See :func:`feature_distance`.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes do not fit.
    """
    return imitation_loss(features, answers, distance) + weight * imitation_loss(views, answers, distance)


class EncoderStudent(Encoder):
    """An encoder stolen by imitation. Batches are ``(x, answer)`` with features ``(B, D)`` as answers.

    Logged: ``train_loss``; ``val_loss`` (of plain imitation) and ``val_cosine``, the mean cosine to the victim's features on held-out queries,
    which a thief can know.

    Args:
        network: The student's architecture: a factory that is called with the numbers of features and input channels, or a module
            that is ready.
        feature_dim: Number of the student's features. By default the data module's ``feature_dim``, which is the victim's.
        in_channels: Number of input channels, for a factory. By default the first entry of the data module's ``image_shape``.
        answer_dim: Number of the victim's features, by default the data module's ``feature_dim``. Where ``feature_dim`` is another number
            a linear map (:attr:`adapter`) joins the two.
        distance: See :func:`feature_distance`.
        augmentation: Maps ``(B, C, H, W)`` to a batch of the same shape, each image by a draw of its own
            (`meadef_lightning.victims.views.RandomView`); with it the loss is StolenEncoder's.
        views: Views of each image and step, ``k``, at least 1.
        weight: Weight of the views, λ, finite, at least 0.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser; one cycle over the run by default.

    Raises:
        ValueError: If an argument is out of range.
    """

    objects: ClassVar = (*Encoder.objects, "augmentation")

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        feature_dim: int | None = None,
        in_channels: int | None = None,
        answer_dim: int | None = None,
        distance: Distance = "l2",
        augmentation: nn.Module | None = None,
        views: int = 1,
        weight: float = 9.0,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, feature_dim, in_channels, optimizer, lr_scheduler)
        if distance not in get_args(Distance):
            raise ValueError(f"distance={distance!r} is none of {get_args(Distance)}.")
        if views < 1 or not 0 <= weight < float("inf"):
            raise ValueError(f"views={views} must be at least 1, and weight={weight} finite and at least 0.")
        if answer_dim is not None and answer_dim < 1:
            raise ValueError(f"answer_dim={answer_dim} must be at least 1 feature.")
        self.distance: Distance = distance
        self.augmentation = augmentation
        self.views, self.weight = views, weight
        self.adapter: nn.Linear | None = None

    @override
    def configure_model(self) -> None:
        """Builds the network, and the adapter where the victim has another number of features; does nothing the second time."""
        if self.hparams.get("answer_dim") is None:
            self.hparams["answer_dim"] = self.data_sizes()["feature_dim"]
        super().configure_model()

    @override
    def build_network(self, in_channels: int | None = None, feature_dim: int | None = None) -> None:
        """Builds the network and the adapter; see :meth:`Encoder.build_network`."""
        super().build_network(in_channels, feature_dim)
        own, wanted = self.feature_dim, self.hparams.get("answer_dim")
        if self.adapter is None and None not in (own, wanted) and own != wanted:
            self.adapter = nn.Linear(int(own or 0), int(wanted or 0))

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads weights, and makes the adapter that they have."""
        weight = state_dict.get("adapter.weight")
        if self.adapter is None and weight is not None:
            self.adapter = nn.Linear(weight.shape[1], weight.shape[0]).to(self.device)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def imitate(self, x: Tensor) -> Tensor:
        """Features in the victim's space, ``(B, answer_dim)``: the student's own, through the adapter where there is one."""
        features: Tensor = self(x)
        return features if self.adapter is None else self.adapter(features)

    def augmented(self, x: Tensor) -> Tensor:
        """Draws the views of a batch.

        Args:
            x: ``(B, C, H, W)``.

        Returns:
            ``(views · B, C, H, W)``; row ``j · B + i`` is view ``j`` of image ``i``.

        Raises:
            ValueError: If there is no augmentation, or it changes the shape.
        """
        copies = x.repeat(self.views, 1, 1, 1)
        views = None if self.augmentation is None else self.augmentation(copies)
        if not isinstance(views, Tensor) or views.shape != copies.shape:
            raise ValueError(
                f"The augmentation must map a batch of shape {tuple(copies.shape)} to one tensor of this shape, got "
                f"{tuple(views.shape) if isinstance(views, Tensor) else type(views).__name__}."
            )
        return views

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Imitation of the answers, on the images and, with an augmentation, on views of them."""
        x, answers = batch
        if self.augmentation is None:
            loss = imitation_loss(self.imitate(x), answers, self.distance)
        else:
            # one forward pass: one set of batch statistics for images and views, and k small passes fewer
            features = self.imitate(torch.cat([x, self.augmented(x)])).reshape(1 + self.views, len(x), -1)
            loss = stolen_encoder_loss(features[0], features[1:], answers, self.weight, self.distance)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(x))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, ...]) -> None:
        """Logs loss and cosine on held-out queries."""
        x, answers = batch[:2]
        features = self.imitate(x)
        values = {
            "val_loss": imitation_loss(features, answers, self.distance),
            "val_cosine": F.cosine_similarity(features.float(), answers, dim=-1).mean(),
        }
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(x))
