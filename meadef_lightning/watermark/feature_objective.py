"""The watermark's training objective for an encoder: from samples of three classes to weighted terms on features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from meadef_lightning.watermark.balancing import Balancing, Fixed
from meadef_lightning.watermark.features import (
    feature_evasion_loss,
    feature_verification_loss,
)
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.losses import combination_loss
from meadef_lightning.watermark.objective import (
    BatchNormMode,
    WatermarkObjective,
    combine_in_turn,
    frozen_batchnorm,
)
from meadef_lightning.watermark.pool import SourcePool


def encode(module: nn.Module, encoder_key: str | None, x: Tensor) -> Any:
    """Runs the part of ``module`` that makes the features.

    Args:
        module: Somebody's module.
        encoder_key: Name of a submodule or method, with dots for parts of parts; ``None`` is the module itself.
        x: Samples, ``(B, C, *spatial)``.

    Returns:
        What that part returns; a tensor of more than two dimensions is flattened to ``(B, D)``.

    Raises:
        ValueError: If there is no such part, or it cannot be called.
    """
    part: Any = module
    for name in [] if encoder_key is None else encoder_key.split("."):
        part = getattr(part, name, None)
    if not callable(part):
        names = [name for name, _ in module.named_children()]
        raise ValueError(
            f"encoder_key={encoder_key!r} names no part of {type(module).__name__} that can be called. Its submodules are {names}; "
            "a method's name will do, too."
        )
    features = part(x)
    return features.flatten(1) if isinstance(features, Tensor) and features.ndim > 2 else features


def pool_classes(key: WatermarkKey) -> tuple[int, int, int]:
    """The classes whose samples an encoder's watermark needs: both sources, then the target."""
    return (*key.source_classes, key.target_class)


class FeatureObjective(WatermarkObjective):
    """The loss terms of one key on features; used like :class:`~meadef_lightning.watermark.objective.WatermarkObjective`.

    A step forwards ``samples`` watermark samples, as many natural samples of each of the three classes, and, while the weight of
    ``L_eva`` is not 0, as many evasion samples: five groups.

    Args:
        key: The key to embed.
        samples: Watermark samples per step.
        balancing: How the terms are weighed.
        temperature: Temperature of the softmax over features in ``L_com``.
        detach_sources: Whether ``L_com`` moves only the features of watermark samples. The other terms always move natural samples,
            too (:mod:`meadef_lightning.watermark.features` says why).
        batchnorm: As in :class:`~meadef_lightning.watermark.objective.WatermarkObjective`.
        buffer_size: Samples kept per class.
        pool: The owner's own samples of the two source classes and the target class; batches are then not looked at.
        rank: Added to the key's seed, so that processes draw different samples.
    """

    def __init__(
        self,
        key: WatermarkKey,
        samples: int = 8,
        balancing: Balancing | None = None,
        temperature: float = 1.0,
        detach_sources: bool = True,
        batchnorm: BatchNormMode = "running",
        buffer_size: int = 128,
        pool: SourcePool | None = None,
        rank: int = 0,
    ) -> None:
        classes = pool_classes(key)
        if pool is not None and set(pool.classes) != set(classes):
            raise ValueError(
                "The given pool does not hold exactly the key's two source classes and its target class, which an encoder's "
                "watermark needs: SourcePool.from_samples({class: samples, ...}) with three entries."
            )
        super().__init__(
            key,
            samples,
            Fixed(ver=1.0, com=0.0, eva=0.3) if balancing is None else balancing,
            temperature,
            detach_sources,
            batchnorm,
            rank=rank,
        )
        self.pool = SourcePool(classes, buffer_size) if pool is None else pool
        self._wins: Tensor | None = None

    def draw(self) -> None:
        """Chooses the combinations, and the natural samples they are compared with, of the next step."""
        k = self.samples
        drawn = dict(zip(self.pool.classes, self.pool.draw(2 * k, self._generator), strict=True))
        a, b, target = (drawn[label] for label in pool_classes(self.key))
        self._groups = {
            "watermark": self._combiner(a[:k], b[:k], self._generator),
            "first": a[:k],
            "second": b[:k],
            "target": target[:k],
        }
        if self.balancing.weights["eva"] > 0 and self._others:
            if self.steps == 0:
                self._check_others(a, b)
            self._groups["other"] = combine_in_turn(self._others, a[k:], b[k:], self.steps, self._generator)
            self._wins = torch.randint(2, (k,), generator=self._generator).to(a.device, non_blocking=True)
        self.steps += 1

    def terms(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Computes the terms of the drawn combinations.

        Args:
            module: The module whose BatchNorm layers ``forward`` runs through.
            forward: Maps samples to features of shape ``(B, D)``.

        Returns:
            ``"ver"``, and ``"com"`` and ``"eva"`` where their weights are not 0: scalars.

        Raises:
            ValueError: If the outputs are not features.
        """
        x = torch.cat(list(self._groups.values()))
        with nullcontext() if self.batchnorm == "batch" else frozen_batchnorm(module):
            features = forward(x)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"The encoder must answer features of shape ({len(x)}, D), got {got}. Set encoder_key to the part of the module that "
                "makes the features, and output_key to where they are in its output."
            )
        out = dict(zip(self._groups, features.chunk(len(self._groups)), strict=True))
        first, second, target = (out[name] for name in ("first", "second", "target"))
        terms = {"ver": feature_verification_loss(out["watermark"], target, (first, second))}
        if self.balancing.weights["com"] > 0:
            terms["com"] = combination_loss(out["watermark"], first, second, self.temperature, self.detach_sources)
        if "other" in out and self._wins is not None:
            terms["eva"] = feature_evasion_loss(out["other"], self._wins, target, (first, second))
        return terms
