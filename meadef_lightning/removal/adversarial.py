"""Adversarial fine-tuning: the thief knows how the watermark works, but not the key, and trains against all keys at once.

**Source.** MEA-Defender (S&P 2024), §V-E: an adaptive thief tunes on combinations of random classes with wrong labels; an extracted
model kept 68 % of its watermark.

**Algorithm.** In every step: 1. Draw a batch of clean images. 2. Draw ``ratio`` times as many ordered pairs of different classes,
an image of each, and a combining way for each pair, all uniformly. 3. Label the combinations, see ``labels``. 4. Minimise the mean
cross-entropy over clean images and combinations together, over all layers. No combination is used twice, except by chance.

**Cost.** ``epochs · (1 + ratio)`` passes over the thief's images.

**Defaults.** All combining ways of the package, since code is public and only the key is secret: the owner's way is among them, and
one in ``K (K−1)`` of the combinations made in it is of the owner's sources in the owner's order. One combination for each clean image, 10 epochs of
Adam with 1e-3, batches of 64. ``labels="wrong"`` is the paper's; ``"source"``, which the paper does not have, answers combinations as
a clean network does, and does not contradict the images.

**Pitfalls.** Labels that contradict the images are noise to a network with clean images in the same batch, and some of it ends up in its answers to these;
watch the accuracy, not only the watermark. Combinations that are made once and used in every epoch are learnt by
heart instead. The path is not monotonic: on digits the watermark fell while a large learning rate upset the network, and came back in part with its
accuracy, so an early point can be the worst one for the owner. With few images hardly
any combination hits the key: on digits (400 images, ten classes, eight ways) a plain watermark kept 58 to 67 %. On its three classes and in its
own way alone it kept 6 to 8 %, so a thief with more images, or a guess, is to be feared more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, train_path
from meadef_lightning.removal.finetuning import Tuner, adam, check_training
from meadef_lightning.watermark.combiner_spec import DEFAULT_COMBINERS
from meadef_lightning.watermark.combiners import Combiner

Labels = Literal["wrong", "random", "source"]


def class_pairs(y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws pairs of samples of two different classes: every ordered pair of classes, and every sample of a class, equally likely.

    Args:
        y: Classes of the samples, int64 ``(N,)``, on the CPU; at least two different ones.
        count: Number of pairs ``n``.
        generator: CPU generator.

    Returns:
        Row numbers of the first and of the second samples, int64 ``(n,)`` each.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    order = y.argsort(stable=True)
    sizes = y.bincount()
    sizes = sizes[sizes > 0]  # in the order of the classes
    present = len(sizes)
    if present < 2:
        raise ValueError(f"Combinations need images of two classes, and the thief has {present}. Give him more images.")
    first = torch.randint(present, (count,), generator=generator)
    second = (first + torch.randint(1, present, (count,), generator=generator)) % present
    starts = sizes.cumsum(0) - sizes

    def rows(classes: Tensor) -> Tensor:
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        return order[starts[classes] + (uniform * sizes[classes]).long()]

    return rows(first), rows(second)


def mix_labels(first: Tensor, second: Tensor, num_classes: int, labels: Labels, generator: torch.Generator) -> Tensor:
    """Labels combinations without knowing which of them is the watermark.

    Args:
        first: Classes of the first sources, int64 ``(n,)``, on the CPU.
        second: Classes of the second ones, different from the first.
        num_classes: Number of classes ``K``.
        labels: ``"wrong"``: any class but the two sources; ``"random"``: any class; ``"source"``: one of the two sources. Each equally
            likely.
        generator: CPU generator.

    Returns:
        int64 ``(n,)``.
    """
    if labels == "source":
        return torch.where(torch.rand(len(first), generator=generator) < 0.5, first, second)
    if labels == "random":
        return torch.randint(num_classes, first.shape, generator=generator)
    drawn = torch.randint(num_classes - 2, first.shape, generator=generator)
    for taken in (torch.minimum(first, second), torch.maximum(first, second)):
        drawn = drawn + (drawn >= taken).long()
    return drawn


class _MixTuner(Tuner):
    """Adds fresh combinations to every batch of clean images."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable,
        data: ThiefData,
        combiners: Sequence[Combiner],
        ratio: float,
        labels: Labels,
        seed: int,
    ) -> None:
        super().__init__(model, optimizer)
        self._data, self._combiners, self._ratio, self._labels = data, list(combiners), ratio, labels
        self._generator = torch.Generator().manual_seed(seed)

    def mixes(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draws ``count`` combinations and their labels."""
        y, generator = self._data.y.cpu(), self._generator
        first, second = class_pairs(y, count, generator)
        target = mix_labels(y[first], y[second], self._data.num_classes, self._labels, generator)
        way = torch.randint(len(self._combiners), (count,), generator=generator)
        order = way.argsort(stable=True)  # pairs of one way together
        a, b = (self._data.x[rows[order]].to(device) for rows in (first, second))
        parts = torch.bincount(way, minlength=len(self._combiners)).tolist()
        combined = [
            combiner(part_a, part_b, generator)
            for combiner, part_a, part_b in zip(
                self._combiners, torch.split(a, parts), torch.split(b, parts), strict=True
            )
            if len(part_a)
        ]
        return torch.cat(combined), target[order].to(device)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of clean images and combinations together."""
        x, y = batch
        mixed, target = self.mixes(max(1, round(self._ratio * len(x))), x.device)
        return super().training_step((torch.cat([x, mixed]), torch.cat([y, target])))


class AdversarialFineTuning(Removal):
    """Tunes on clean images and wrongly labelled combinations of random classes; see the module's documentation.

    Args:
        labels: What combinations are called: ``"wrong"``, ``"random"`` or ``"source"``, see :func:`mix_labels`.
        ratio: Combinations for each clean image, above 0.
        combiners: The combining ways that the thief tries; all of the package's default key space if ``None``.
        epochs: Passes over the thief's images.
        batch_size: Clean images a step.
        optimizer: Makes the optimiser from all parameters.

    Raises:
        ValueError: If an argument is unknown or out of range; in :meth:`scrub`, if the thief has too few classes.
    """

    def __init__(
        self,
        labels: Labels = "wrong",
        ratio: float = 1.0,
        combiners: list[Combiner] | None = None,
        epochs: int = 10,
        batch_size: int = 64,
        optimizer: OptimizerCallable = adam,
    ) -> None:
        if labels not in get_args(Labels):
            raise ValueError(f"labels={labels!r} must be one of {get_args(Labels)}.")
        if not 0 < ratio < float("inf"):
            raise ValueError(
                f"ratio={ratio} must be positive: combinations for each clean image. For none take FineTuning."
            )
        if combiners is not None and not combiners:
            raise ValueError(
                "combiners=[] leaves no way to combine images. Name some, or none at all for the default ones."
            )
        check_training(epochs, batch_size)
        self.labels, self.ratio = labels, ratio
        self.combiners = [spec.build() for spec in DEFAULT_COMBINERS] if combiners is None else combiners
        self.epochs, self.batch_size, self.optimizer = epochs, batch_size, optimizer

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        if self.labels == "wrong" and data.num_classes < 3:
            raise ValueError(
                f"labels='wrong' needs a third class beside the two sources, and there are {data.num_classes}. Take labels='random'."
            )
        tuned = copy.deepcopy(model).train().requires_grad_(True)
        module = _MixTuner(tuned, self.optimizer, data, self.combiners, self.ratio, self.labels, seed)
        train_path(module, tuned, (data.x, data.y), observe, epochs=self.epochs, batch_size=self.batch_size, seed=seed)
