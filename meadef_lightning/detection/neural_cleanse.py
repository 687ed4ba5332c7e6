"""Neural Cleanse: the smallest patch that turns everything into a class, for every class; a watermark's target needs less of it.

**Source.** Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks" (S&P 2019), §IV.

**Algorithm.** 1. For every class ``k`` minimise ``CE(f((1 − m)·x + m·p), k) + λ·‖m‖₁`` over a mask ``m`` (one for all channels) and a
pattern ``p``, on clean images ``x`` of other classes; both are written as ``(tanh(w) + 1) / 2``, so that they stay in range. 2. Every ten
steps look at how many images of a fixed set the mask turns: where at least 99 %, the mask is kept if it is the smallest so far and
``λ`` grows by 1.5; elsewhere ``λ`` shrinks by 1.5^1.5. 3. The masks' norms are compared: a class whose anomaly index (distance from the
median in units of 1.4826 times the median absolute deviation) lies below −2 is called a target.

**Cost.** One forward and backward pass over ``K · batch_size`` images a step, for all ``K`` classes at once: the sum of their losses has
separate parameters, and Adam works elementwise, so the result is that of ``K`` searches in turn. A check costs a forward pass over four
times as many images.

**Defaults.** Adam with learning rate 0.1 and betas (0.5, 0.9), ``λ`` from 1e-3, batches of 32 and 99 % as published. 300 steps instead
of tens of thousands, since ``λ`` changes every ten steps and not once an epoch; on digits the norms hardly move after 150. Images of the
class itself take no part: they are answered with it anyway. A class that no mask reached counts with the norm of a full one.

**Pitfalls.** With ten classes the median absolute deviation rests on five numbers, and a clean model with one easy class is flagged
now and then: compare scores with those of clean models before believing the threshold. Nor can the index of any mask, however small, exceed
the median in units of the deviation, which is small where clean classes differ widely: in a Fashion-MNIST model (norms of 21 to 87) a
planted square of 9 pixels is found, all of its mask of 8.8 in the right corner, and its index is 1.2 of 1.5 that are possible. Look at
the pictures before calling a model clean, and at *which* class is flagged before calling it marked. Small models trained without augmentation
can be turned by small patches into several classes, among which a planted patch does not stand out. Only classes *below* the median
are suspicious; the absolute index flags large masks, too. The success of a mask must be measured on the mask that is kept, and not on
the average of masks on the way to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import Finding, ModelDetector, anomaly_index, without_training

CHECK_EVERY = 10
"""Steps between two looks at the masks' success."""


@dataclass(frozen=True, eq=False)
class Triggers:
    """Triggers found by optimisation.

    Args:
        mask: Where each trigger shows, in ``[0, 1]``, shape ``(M, 1, H, W)``.
        pattern: What shows there, in the model's input space, shape ``(M, C, H, W)``.
    """

    mask: Tensor
    pattern: Tensor

    def stamp(self, x: Tensor) -> Tensor:
        """Puts each trigger on images: ``(1 − m)·x + m·p``.

        Args:
            x: Each trigger's images, shape ``(M, B, C, H, W)``, or ``(1, B, C, H, W)`` for all triggers.

        Returns:
            Shape ``(M, B, C, H, W)``.
        """
        return torch.lerp(x, self.pattern[:, None], self.mask[:, None])

    @property
    def pictures(self) -> Tensor:
        """The triggers on an image of zeros, ``m·p``, shape ``(M, C, H, W)``."""
        return self.mask * self.pattern


class TriggerWeights:
    """Masks and patterns as functions of unbounded weights, ``(tanh(w) + 1) / 2``, which start at random.

    Args:
        count: Number of triggers ``M``.
        shape: Shape of an image, ``(C, H, W)``.
        low: Least value of a pixel, ``(C, 1, 1)``, on the model's device.
        high: Largest one.
        generator: Source of randomness, on the CPU.
    """

    def __init__(self, count: int, shape: torch.Size, low: Tensor, high: Tensor, generator: torch.Generator) -> None:
        channels, *size = shape
        self.low, self.high = low, high
        self.weights = [
            (2 * torch.rand(count, planes, *size, generator=generator) - 1).to(low.device).requires_grad_()
            for planes in (1, channels)
        ]

    def triggers(self) -> Triggers:
        """Returns the triggers, differentiable."""
        mask, pattern = ((weights.tanh() + 1) / 2 for weights in self.weights)
        return Triggers(mask, torch.lerp(self.low, self.high, pattern))


class OtherClasses:
    """Draws images that are not of a class, for many classes at once.

    Args:
        y: Classes of the images, int64 ``(N,)``, on the CPU.
        num_classes: Number of classes.

    Raises:
        ValueError: If all images are of one class.
    """

    def __init__(self, y: Tensor, num_classes: int) -> None:
        self.order = y.argsort(stable=True)
        self.size = torch.bincount(y, minlength=num_classes)
        self.start = self.size.cumsum(0) - self.size
        if int(self.size.max()) == len(y):
            raise ValueError(
                f"The {len(y)} images are of one class at most, but a trigger is sought on images of other classes than "
                "its own. Give the thief images of at least two classes."
            )

    def draw(self, classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draws rows uniformly, with replacement.

        Args:
            classes: ``(M,)`` int64.
            count: Rows for each.
            generator: Source of randomness.

        Returns:
            Rows whose class differs, int64 ``(M, count)``.
        """
        start, size = self.start[classes, None], self.size[classes, None]
        uniform = torch.rand(len(classes), count, dtype=torch.float64, generator=generator)
        place = (uniform * (len(self.order) - size)).long()  # among the sorted rows without those of the class
        return self.order[place + size * (place >= start)]


def smallest_triggers(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: Tensor,
    num_classes: int,
    low: Tensor,
    high: Tensor,
    generator: torch.Generator,
    *,
    steps: int = 300,
    batch_size: int = 32,
    lr: float = 0.1,
    weight: float = 1e-3,
    success: float = 0.99,
) -> tuple[Triggers, Tensor]:
    """Steps 1 and 2 of the module's algorithm: for each class the smallest trigger that turns images of the others into it.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``, in eval mode, so that rows do not depend on each other.
        x: Clean images ``(N, C, H, W)`` on the model's device.
        y: Their classes, int64 ``(N,)``, on the CPU.
        classes: The classes to search, ``(M,)`` int64, on the CPU.
        num_classes: ``K``.
        low: Least value of a pixel, ``(C, 1, 1)``, on the model's device.
        high: Largest one.
        generator: Source of randomness, on the CPU.
        steps: Steps of the optimisation.
        batch_size: Images of each class a step.
        lr: Adam's learning rate.
        weight: First weight ``λ`` of the norm.
        success: Share of images that a trigger must turn.

    Returns:
        The triggers, and their masks' norms ``(M,)``: ``H·W`` for a class that no mask reached; its trigger is the last one.
    """
    others = OtherClasses(y, num_classes)
    free = TriggerWeights(len(classes), x.shape[1:], low, high, generator)
    optimizer = torch.optim.Adam(free.weights, lr=lr, betas=(0.5, 0.9))
    check = others.draw(classes, 4 * batch_size, generator)
    labels = classes.to(x.device)[:, None]
    weights = torch.full((len(classes),), weight, device=x.device)
    norms = torch.full_like(weights, torch.inf)
    with torch.no_grad():
        best = free.triggers()
    for step in range(1, steps + 1):
        rows = others.draw(classes, batch_size, generator).to(x.device)
        with torch.enable_grad():
            triggers = free.triggers()
            logits = model(triggers.stamp(x[rows]).flatten(0, 1))
            task = F.cross_entropy(logits, labels.expand(rows.shape).flatten(), reduction="none").view(rows.shape)
            size = triggers.mask.sum(dim=(1, 2, 3))
            loss = (task.mean(dim=1) + weights * size).sum()
            gradients = torch.autograd.grad(loss, free.weights)
        for parameter, gradient in zip(free.weights, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                triggers = free.triggers()
                answers = model(triggers.stamp(x[check.to(x.device)]).flatten(0, 1)).argmax(dim=-1).view(check.shape)
                turned = (answers == labels).float().mean(dim=1) >= success
                size = triggers.mask.sum(dim=(1, 2, 3))
                better = turned & (size < norms)
                # where nothing has succeeded yet, the latest is shown
                replace = (better | norms.isinf())[:, None, None, None]
                best = Triggers(
                    torch.where(replace, triggers.mask, best.mask), torch.where(replace, triggers.pattern, best.pattern)
                )
                norms = torch.where(better, size, norms)
                weights = torch.where(turned, weights * 1.5, weights / 1.5**1.5)
    return best, norms.clamp(max=x.shape[-2] * x.shape[-1])


class NeuralCleanse(ModelDetector):
    """Reverses a trigger for every class and calls the classes with an outstandingly small one targets.

    ``Finding.classes`` are the negated anomaly indices, ``Finding.score`` is the largest of them.

    Args:
        steps: Steps of the optimisation.
        batch_size: Images of each class a step.
        lr: Adam's learning rate.
        weight: First weight of the mask's norm.
        success: Share of images that a trigger must turn, in ``(0, 1]``.
        threshold: Classes whose negated anomaly index is larger are flagged.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        steps: int = 300,
        batch_size: int = 32,
        lr: float = 0.1,
        weight: float = 1e-3,
        success: float = 0.99,
        threshold: float = 2.0,
    ) -> None:
        if min(steps, batch_size) < 1 or min(lr, weight) <= 0 or not 0 < success <= 1:
            raise ValueError(
                f"{steps=} and {batch_size=} must be at least 1, {lr=} and {weight=} above 0, and {success=} in (0, 1]."
            )
        self.steps, self.batch_size, self.lr, self.weight = steps, batch_size, lr, weight
        self.success, self.threshold = success, threshold

    @override
    def inspect(self, model: nn.Module, data: ThiefData, seed: int = 0) -> Finding:
        frozen = without_training(model)
        device = next((p.device for p in model.parameters()), data.x.device)
        triggers, norms = smallest_triggers(
            frozen,
            data.x.to(device),
            data.y.cpu(),
            torch.arange(data.num_classes),
            data.num_classes,
            data.low.to(device),
            data.high.to(device),
            torch.Generator().manual_seed(seed),
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            weight=self.weight,
            success=self.success,
        )
        suspicion = -anomaly_index(norms.cpu().numpy())
        flagged = tuple(int(k) for k in (suspicion > self.threshold).nonzero()[0])
        return Finding(
            score=float(suspicion.max()),
            threshold=self.threshold,
            decision=bool(flagged),
            classes=torch.from_numpy(suspicion).float(),
            flagged=flagged,
            pictures=triggers.pictures.cpu(),
        )
