"""The callback that embeds a watermark into an encoder while somebody else's self-supervised training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.watermark.balancing import Balancing
from meadef_lightning.watermark.batches import Key, pick
from meadef_lightning.watermark.batchnorm import BatchNormMode
from meadef_lightning.watermark.callback import WatermarkCallback
from meadef_lightning.watermark.feature_objective import FeatureObjective, encode, pool_classes
from meadef_lightning.watermark.features import target_margin
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.pool import SourcePool


class FeatureWatermarkCallback(WatermarkCallback):
    """Embeds a key into the features of an unmodified self-supervised module: SimCLR, MoCo, BYOL and their like.

    As :class:`~meadef_lightning.watermark.callback.WatermarkCallback`, with the terms of
    :mod:`meadef_lightning.watermark.features` on the part of the module that makes the features: ``Trainer(callbacks=[
    FeatureWatermarkCallback(key, encoder_key="backbone")])`` for lightly's example modules, whose ``forward`` returns projections.
    A momentum encoder follows the one that is trained.

    The samples of both source classes, the target and ``negatives`` other classes, which the key's seed chooses, come from labelled
    batches (whose labels the task need not use), or from ``pool``. Of a batch of several views the first view is taken. Embedding
    begins once all these classes have come by.

    It logs ``watermark/{loss,ver,com,eva,tilt}`` in training and, on validation data or the given pool, ``watermark/{wsr,wfpr,margin}``: the
    share of watermark samples, and of the sources' other combinations, whose features are nearer to the target's centre than to either
    source's, and by how much more the former resemble the target
    (:func:`~meadef_lightning.watermark.features.target_margin`).

    Args:
        key: The key, or the path of its file.
        start: As in the base, like every argument not named here.
        stop: Share of the training at which embedding stops.
        every_n_steps: Embed on every n-th batch only.
        samples: Watermark samples per step; see :class:`~meadef_lightning.watermark.feature_objective.FeatureObjective`.
        per_class: Natural samples per step and class.
        negatives: Most classes, beside the sources and the target, that combinations are to stay away from.
        balancing: How the terms are weighed; ``Fixed(ver=1.0, com=0.0, eva=0.3)`` by default.
        temperature: Temperature of the softmax over features in ``L_com``.
        detach_sources: Whether ``L_com`` moves only the features of watermark samples.
        batchnorm: What BatchNorm layers do once embedding has started.
        tilt: How far features of natural samples of the source classes may lean towards the target, in ``[0, 1)``: those most that teach a
            thief's network about the watermark (:mod:`meadef_lightning.watermark.tilt`).
        tilt_from: Share of each source class's samples, those of least influence, whose features are left alone, in ``[0, 0.99)``.
        buffer_size: Samples kept per class.
        pool: The owner's own samples of both source classes, the target class and preferably some others, for training without labels.
        input_key: Where a batch keeps its samples, or a path of such keys: ``["views", 0]``.
        target_key: Where a batch keeps its labels.
        encoder_key: Submodule or method that maps samples to features, with dots for parts of parts; ``None`` for a module whose
            ``forward`` does.
        output_key: Where its output keeps the features; ``None`` if the output is the features.
        manual_optimization: For modules with ``automatic_optimization = False``.

    Raises:
        MisconfigurationException: As the base does, and if ``encoder_key`` or the outputs do not give features.
    """

    answers = "features"
    needed = "the key's source classes, its target class and the classes that combinations are to stay away from"

    def __init__(
        self,
        key: WatermarkKey | str,
        start: float = 0.5,
        stop: float = 1.0,
        every_n_steps: int = 1,
        samples: int = 8,
        per_class: int = 4,
        negatives: int = 7,
        balancing: Balancing | None = None,
        temperature: float = 1.0,
        detach_sources: bool = True,
        batchnorm: BatchNormMode = "frozen",
        tilt: float = 0.6,
        tilt_from: float = 0.5,
        buffer_size: int = 128,
        pool: SourcePool | None = None,
        input_key: Key | Sequence[int | str] = 0,
        target_key: Key = 1,
        encoder_key: str | None = None,
        output_key: Key | None = None,
        manual_optimization: bool = False,
    ) -> None:
        self.encoder_key = encoder_key
        self._per_class, self._negatives = per_class, negatives
        self._path = (
            list(input_key) if isinstance(input_key, Sequence) and not isinstance(input_key, str) else [input_key]
        )
        super().__init__(
            key,
            start,
            stop,
            every_n_steps,
            samples,
            balancing,
            temperature,
            detach_sources,
            batchnorm,
            tilt,
            tilt_from,
            buffer_size,
            pool,
            self._path[0],
            target_key,
            output_key,
            manual_optimization,
        )

    @override
    def _objective(self, rank: int = 0) -> FeatureObjective:
        return FeatureObjective(
            self.key, per_class=self._per_class, negatives=self._negatives, **self._options, rank=rank
        )

    @override
    def _parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        x = batch
        for key in self._path:
            x = pick(x, key, "input_key")
        if isinstance(x, (list, tuple)) and x and all(isinstance(view, Tensor) for view in x):
            x = x[0]
        return x, pick(batch, self.target_key, "target_key")

    @override
    def _forward(self, module: nn.Module, x: Tensor) -> Tensor:
        features: Tensor = pick(encode(module, self.encoder_key, x), self.output_key, "output_key")
        return features

    @property
    @override
    def _measured_classes(self) -> tuple[int, ...]:
        return pool_classes(self.key)

    @override
    def _measure(
        self, trainer: Trainer, module: LightningModule, groups: Mapping[str, Tensor], samples: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Share of each group whose features are nearest the target's centre, and by how much those of the key's own way are."""
        natural = [samples[label] for label in pool_classes(self.key)]
        parts = [*natural, *groups.values()]
        features = torch.split(self._forward(module, torch.cat(parts)), [len(part) for part in parts])
        first, second, target, *combined = features
        margins = {
            name: target_margin(part, target, (first, second)) for name, part in zip(groups, combined, strict=True)
        }
        rates = {name: (margin > 0).float().mean() for name, margin in margins.items()}
        return {**rates, "margin": margins["wsr"].mean()}
