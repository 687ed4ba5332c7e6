"""The callback that embeds a watermark into an encoder while somebody else's self-supervised training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.watermark.balancing import Balancing
from meadef_lightning.watermark.batches import Key, pick
from meadef_lightning.watermark.callback import WatermarkCallback
from meadef_lightning.watermark.feature_objective import FeatureObjective, encode, pool_classes
from meadef_lightning.watermark.features import target_margin
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.objective import BatchNormMode, combine_in_turn
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
            buffer_size,
            pool,
            self._path[0],
            target_key,
            output_key,
            manual_optimization,
        )
        self._validation_pool = SourcePool(pool_classes(self.key), buffer_size)

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

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last epoch's validation samples."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._validation_pool = SourcePool(pool_classes(self.key), self._validation_pool.capacity)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs how near the features of combinations of validation samples come to the target's."""
        pool = self.objective.pool if self.objective.pool.fixed else self._validation_pool
        if trainer.sanity_checking or not trainer.strategy.reduce_boolean_decision(pool.ready, all=True):
            return
        self._place(pool, pl_module)
        samples = dict(zip(pool.classes, pool.take(pool.capacity), strict=True))
        a, b, target = (samples[label] for label in pool_classes(self.key))
        index = torch.arange(max(len(a), len(b)), device=a.device)
        pairs = a[index % len(a)], b[index % len(b)]
        groups = {"wsr": self.key.combiner.build()(*pairs)}
        others = [spec.build() for spec in self.key.control_combiners()]
        if others:
            groups["wfpr"] = combine_in_turn(others, *pairs, 0, torch.Generator())
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            parts = [a, b, target, *groups.values()]
            features = torch.split(self._forward(pl_module, torch.cat(parts)), [len(part) for part in parts])
        first, second, goal, *combined = features
        for name, group in zip(groups, combined, strict=True):
            margin = target_margin(group, goal, (first, second))
            pl_module.log(
                f"watermark/{name}",
                (margin > 0).float().mean(),
                sync_dist=True,
                batch_size=len(index),
                prog_bar=name == "wsr",
            )
            if name == "wsr":
                pl_module.log("watermark/margin", margin.mean(), sync_dist=True, batch_size=len(index))
