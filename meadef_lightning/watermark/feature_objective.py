"""The watermark's training objective for an encoder: from natural samples of its classes and others to weighted terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.watermark.balancing import Balancing, Fixed
from meadef_lightning.watermark.batchnorm import BatchNormMode, frozen_batchnorm
from meadef_lightning.watermark.combinations import combine_in_turn
from meadef_lightning.watermark.features import (
    feature_evasion_loss,
    feature_verification_loss,
    leaning_loss,
)
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.losses import combination_loss
from meadef_lightning.watermark.objective import WatermarkObjective
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
    """The classes whose samples an encoder's watermark cannot do without: both sources, then the target."""
    return (*key.source_classes, key.target_class)


def contrasted_classes(key: WatermarkKey, labels: Sequence[int], negatives: int) -> tuple[int, ...]:
    """Chooses the classes among whose means a combination is to be nearest one.

    Which others take part follows from the key's seed alone: it stays as secret as the key, and every process chooses alike.

    Args:
        key: The key.
        labels: The labels there are, each once.
        negatives: Most classes beside the key's three.

    Returns:
        Both sources, the target, and up to ``negatives`` other labels.
    """
    own = pool_classes(key)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(key.seed))
    drawn = (labels[row] for row in order[: negatives + len(own)].tolist())
    return (*own, *[label for label in drawn if label not in own][:negatives])


def _features(forward: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    features = forward(x)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"The encoder must answer features of shape ({len(x)}, D), got {got}. Set encoder_key to the part of the module that "
            "makes the features, and output_key to where they are in its output."
        )
    return features


class FeatureObjective(WatermarkObjective):
    """The loss terms of one key on features; used like :class:`~meadef_lightning.watermark.objective.WatermarkObjective`.

    A step forwards ``samples`` watermark samples, ``per_class`` natural samples of each contrasted class, ``samples`` tilted ones and, while
    the weights of their terms are not 0, as many evasion samples (``L_eva``), and twice as many source samples (``L_com``): up to six
    groups. By default, for ten classes, that is 64 samples, a quarter of the 256 views of a SimCLR step on 128 images.

    Args:
        key: The key to embed.
        samples: Watermark samples per step.
        per_class: Natural samples per step and class, whose mean stands for the class.
        negatives: Most classes, beside the sources and the target, that combinations are to stay away from
            (:func:`contrasted_classes`); the default takes all of ten classes, and bounds memory and time where there are many.
        balancing: How the terms are weighed.
        temperature: Temperature of the softmax over features in ``L_com``.
        detach_sources: Whether ``L_com`` moves only the features of watermark samples. The other terms always move natural samples,
            too (:mod:`meadef_lightning.watermark.features` says why).
        batchnorm: As in :class:`~meadef_lightning.watermark.objective.WatermarkObjective`.
        tilt: How far, at most, features of a natural sample of a source class come to lie towards the target, in ``[0, 1)``: the label that
            the target gets in :func:`~meadef_lightning.watermark.features.leaning_loss`. 0 leaves natural features as they are.
        tilt_from: Share of each source class's samples, those of least influence, whose features are left alone, in ``[0, 0.99)``.
        buffer_size: Samples kept per class.
        pool: The owner's own samples of the two source classes, the target class and preferably some others; batches are then not
            looked at.
        rank: Added to the key's seed, so that processes draw different samples.
    """

    def __init__(
        self,
        key: WatermarkKey,
        samples: int = 8,
        per_class: int = 4,
        negatives: int = 7,
        balancing: Balancing | None = None,
        temperature: float = 1.0,
        detach_sources: bool = True,
        batchnorm: BatchNormMode = "running",
        tilt: float = 0.6,
        tilt_from: float = 0.5,
        buffer_size: int = 128,
        pool: SourcePool | None = None,
        rank: int = 0,
    ) -> None:
        if per_class < 1:
            raise ValueError(f"per_class={per_class} must be at least 1 natural sample per step and class.")
        if negatives < 0:
            raise ValueError(f"negatives={negatives} must be at least 0 classes beside the sources and the target.")
        if pool is not None and not set(pool.classes) >= set(pool_classes(key)):
            raise ValueError(
                "The given pool does not hold the key's two source classes and its target class, which an encoder's watermark needs: "
                "SourcePool.from_samples({class: samples, ...}) with these three entries and preferably some others."
            )
        super().__init__(
            key,
            samples,
            Fixed(ver=1.0, com=0.0, eva=0.3) if balancing is None else balancing,
            temperature,
            detach_sources,
            batchnorm,
            tilt,
            tilt_from,
            rank=rank,
        )
        self.per_class = per_class
        labels: Sequence[int] = range(key.num_classes) if pool is None else sorted(pool.classes)
        self.classes = contrasted_classes(key, labels, negatives)
        self.pool = SourcePool(self.classes, buffer_size) if pool is None else pool
        self._wins: Tensor | None = None

    @override
    def _basis(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The features themselves, which is all that a thief sees of an encoder, and what stands on it is linear in."""
        return _features(forward, x)

    @override
    def draw(self) -> None:
        """Chooses the combinations, and the natural samples they are compared with, of the next step."""
        k, weights = self.samples, self.balancing.weights
        count = max(2 * k, self.per_class)
        drawn = dict(zip(self.pool.classes, self.pool.draw(count, self._generator), strict=True))
        a, b = (drawn[label] for label in self.key.source_classes)
        self._groups = {
            "watermark": self._combiner(a[:k], b[:k], self._generator),
            "natural": torch.cat([drawn[label][: self.per_class] for label in self.classes]),
        }
        if weights["com"] > 0:
            self._groups["first"], self._groups["second"] = a[:k], b[:k]
        if weights["eva"] > 0 and self._others:
            if self.steps == 0:
                self._check_others(a, b)
            self._groups["other"] = combine_in_turn(
                self._others, a[k : 2 * k], b[k : 2 * k], self.steps, self._generator
            )
            self._wins = torch.randint(2, (k,), generator=self._generator).to(a.device, non_blocking=True)
        if self._tilted:
            # a restored one comes from the CPU
            self._tilted = {name: tensor.to(a.device) for name, tensor in self._tilted.items()}
            rows = torch.randint(len(self._tilted["x"]), (k,), generator=self._generator)
            self._natural_rows = rows.to(a.device, non_blocking=True)
            self._groups["leaning"] = self._tilted["x"][self._natural_rows]
        self.steps += 1

    @override
    def terms(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Computes the terms of the drawn combinations.

        Args:
            module: The module whose BatchNorm layers ``forward`` runs through.
            forward: Maps samples to features of shape ``(B, D)``.

        Returns:
            ``"ver"``, ``"com"`` and ``"eva"`` where their weights are not 0, and ``"tilt"`` where natural features are tilted: scalars.

        Raises:
            ValueError: If the outputs are not features.
        """
        x = torch.cat(list(self._groups.values()))
        with nullcontext() if self.batchnorm == "batch" else frozen_batchnorm(module):
            features = _features(forward, x)
        sizes = [len(group) for group in self._groups.values()]
        out = dict(zip(self._groups, torch.split(features, sizes), strict=True))
        # the classes' order: first source, second source, target, others
        centres = out["natural"].float().reshape(len(self.classes), self.per_class, -1).mean(dim=1)
        terms = {"ver": feature_verification_loss(out["watermark"], centres, 2)}
        if "first" in out:
            terms["com"] = combination_loss(
                out["watermark"], out["first"], out["second"], self.temperature, self.detach_sources
            )
        if "other" in out and self._wins is not None:
            terms["eva"] = feature_evasion_loss(out["other"], centres, self._wins.to(centres.device))
        if "leaning" in out and self._natural_rows is not None:
            labels, mass = (self._tilted[name][self._natural_rows] for name in ("labels", "mass"))
            positions = (labels == self.key.source_classes[1]).long()
            terms["tilt"] = leaning_loss(out["leaning"], centres, positions, 2, mass)
        return terms
