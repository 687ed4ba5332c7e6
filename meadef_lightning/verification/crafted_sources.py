"""Source images that a malicious accuser crafts, so that any model answers their composites with his target.

**Source.** Liu et al., "False Claims against Model Ownership Resolution" (USENIX Security 2024): transferable adversarial examples,
committed to beforehand, satisfy every scheme whose accuser supplies the triggers. Here he supplies the *sources* of an honestly drawn
key, and the scheme combines them as it should.

**Algorithm.**

* *Adversarial sources* (:func:`adversarial_sources`): 1. Combine random pairs of source images in the key's way, and in one of the other
  ways. 2. Take a sign step on the images themselves that makes surrogates answer the former with the target, and the latter with anything else.
  3. Clip to a ball around the images and to their range; repeat. What works on the accuser's surrogates transfers to suspects.
* *Planted targets* (:func:`planted_sources`): put parts of target-class images into the sources, each where the key's way takes from this
  source: the composite shows a whole image of the target. Needs no surrogate at all.

**Cost.** ``steps`` forward and backward passes of every surrogate over two classes; planting costs nothing.

**Defaults.** 60 steps within a tenth of the images' range, which is plainly visible on digits and common in the literature for them.

**Pitfalls.** Crafted sources are answered with other classes than their labels more often than natural ones (:func:`source_accuracy`), which a judge may
look at. A reference model that is asked with the same images answers much like the suspect, so it takes much of the effect away. Only images
of the judge's own make these attacks pointless. Planting assumes that a way leaves pixels in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meadef_lightning.verification.datamodule import SourceData
from meadef_lightning.verification.responses import Responses
from meadef_lightning.verification.verdict import Verdict
from meadef_lightning.verification.verifying import verify
from meadef_lightning.watermark.key import WatermarkKey


class SuppliedImages:
    """A task whose verification images come from somebody else.

    Args:
        data: The task.
        x: Images in the model's input space.
        y: Classes that they are said to show, int64.
    """

    def __init__(self, data: SourceData, x: Tensor, y: Tensor) -> None:
        self.data, self.x, self.y = data, x, y

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""
        return self.data.num_classes

    def prepare_data(self) -> None:
        """Downloads what is missing."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Makes the splits."""
        self.data.setup(stage)

    def tensors(self, split: Literal["verification", "test"]) -> tuple[Tensor, Tensor]:
        """Returns the supplied images as the verification split, and the task's own test split."""
        return (self.x, self.y) if split == "verification" else self.data.tensors("test")


def adversarial_sources(
    surrogates: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    key: WatermarkKey,
    epsilon: float = 0.1,
    steps: int = 60,
    seed: int = 0,
) -> Tensor:
    """Perturbs the images of the key's source classes so that composites in the key's way are answered with its target.

    Args:
        surrogates: The accuser's models, which map images to logits; left as they are.
        x: Source images of all classes, float32 ``(N, C, H, W)``.
        y: Their classes, int64 ``(N,)``.
        key: The accuser's key.
        epsilon: Largest change of a pixel, as a part of the images' range; in ``(0, 1]``.
        steps: Sign steps, at least 1.
        seed: Seed of the random pairing.

    Returns:
        Images of the same shape, within the range of ``x``; those of other classes are unchanged.

    Raises:
        ValueError: If a number is out of range, there is no surrogate, or a source class has no image.
    """
    if not 0 < epsilon <= 1 or steps < 1 or not surrogates:
        raise ValueError(
            f"Adversarial sources need 0 < epsilon <= 1, steps >= 1 and a surrogate, got epsilon={epsilon}, steps={steps} and "
            f"{len(surrogates)} surrogate(s)."
        )
    rows = [(y == source).nonzero().flatten() for source in key.source_classes]
    if not all(len(side) for side in rows):
        raise ValueError("Each source class of the key needs at least one image.")
    low, high = float(x.min()), float(x.max())
    radius = epsilon * (high - low)
    generator = torch.Generator().manual_seed(seed)
    way, others = key.combiner.build(), [spec.build() for spec in key.control_combiners()]
    start = [x[side] for side in rows]
    changed = [side.clone() for side in start]
    pairs = 2 * max(map(len, start))
    for _ in range(steps):
        first, second = leaves = [side.detach().requires_grad_() for side in changed]
        i, j = (torch.randint(len(side), (pairs,), generator=generator) for side in leaves)
        control = others[int(torch.randint(len(others), (), generator=generator))]
        wanted, avoided = (combine(first[i], second[j], generator) for combine in (way, control))
        target = torch.full((pairs,), key.target_class, device=x.device)
        loss = x.new_zeros(())
        for surrogate in surrogates:
            own, other = surrogate(torch.cat([wanted, avoided])).split(pairs)
            avoid = -torch.log1p(-other.softmax(1)[:, key.target_class].clamp(max=0.999))
            loss = loss + F.cross_entropy(own, target) + avoid.mean()
        gradients = torch.autograd.grad(loss, leaves)
        changed = [
            (side - 2.5 * radius / steps * gradient.sign()).clamp(base - radius, base + radius).clamp(low, high).detach()
            for side, gradient, base in zip(leaves, gradients, start, strict=True)
        ]  # fmt: skip
    crafted = x.clone()
    for side, images in zip(rows, changed, strict=True):
        crafted[side] = images
    return crafted


def planted_sources(x: Tensor, y: Tensor, key: WatermarkKey) -> Tensor:
    """Hides parts of target-class images in the source images, each where the key's way takes from this source.

    Where a way takes from either source is found by combining an image of ones with one of zeros. What it takes from both equally (a blend)
    is planted in both.

    Args:
        x: Source images of all classes, float32 ``(N, C, H, W)``.
        y: Their classes, int64 ``(N,)``.
        key: The accuser's key.

    Returns:
        Images of the same shape; those of other classes are unchanged.

    Raises:
        ValueError: If the target class has no image.
    """
    targets = x[y == key.target_class]
    if len(targets) == 0:
        raise ValueError("The key's target class needs at least one image.")
    ones, zeros = torch.ones_like(x[:1]), torch.zeros_like(x[:1])
    from_first = key.combiner.build()(ones, zeros, torch.Generator().manual_seed(0))
    crafted = x.clone()
    for source, weight in zip(key.source_classes, (from_first, 1 - from_first), strict=True):
        rows = (y == source).nonzero().flatten()
        hidden = targets[torch.arange(len(rows)) % len(targets)]
        crafted[rows] = torch.where(weight >= 0.5, hidden, x[rows])
    return crafted


@dataclass(frozen=True)
class AdversarialSources:
    """Supplies perturbed source images; see :func:`adversarial_sources` for the arguments."""

    epsilon: float = 0.1
    steps: int = 60
    seed: int = 0

    def images(self, surrogates: Sequence[nn.Module], x: Tensor, y: Tensor, key: WatermarkKey) -> Tensor:
        """Returns the images that the accuser gives to the judge."""
        return adversarial_sources(surrogates, x, y, key, self.epsilon, self.steps, self.seed)


@dataclass(frozen=True)
class PlantedTargets:
    """Supplies source images that hide parts of the target; see :func:`planted_sources`."""

    def images(self, surrogates: Sequence[nn.Module], x: Tensor, y: Tensor, key: WatermarkKey) -> Tensor:
        """Returns the images that the accuser gives to the judge; surrogates are not needed."""
        return planted_sources(x, y, key)


def claim_with_images(
    suspect: nn.Module,
    key: WatermarkKey,
    data: SourceData,
    images: Tensor,
    labels: Tensor,
    *,
    reference: Responses | None = None,
    samples: int = 100,
    decoy_samples: int = 32,
    alpha: float = 1e-3,
) -> tuple[Verdict, Responses]:
    """Accuses a suspect with source images of the accuser's.

    Args:
        suspect: An independent model.
        key: The accuser's key.
        data: The task.
        images: What he supplies as verification images.
        labels: Their classes.
        reference: Answers of a reference model to the same questions (of the same images), see :func:`~meadef_lightning.verification.verify`.
        samples: Triggers, and controls.
        decoy_samples: Samples of each cell.
        alpha: Level of the verdict.
    """
    supplied = SuppliedImages(data, images, labels)
    return verify(
        suspect, key, supplied, samples=samples, decoy_samples=decoy_samples, alpha=alpha, reference=reference,
        accelerator="cpu",
    )  # fmt: skip


def source_accuracy(suspect: nn.Module, images: Tensor, labels: Tensor, key: WatermarkKey) -> float:
    """Returns how many images of the key's source classes a model answers with their label: what a judge can look at."""
    rows = (labels[:, None] == torch.tensor(key.source_classes)).any(1)
    with torch.inference_mode():
        return float((suspect(images[rows]).argmax(1) == labels[rows]).float().mean())
