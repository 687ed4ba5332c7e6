"""Jacobian-based augmentation: grow a handful of images into a transfer set along the gradients of interim students.

**Source.** Papernot et al., "Practical Black-Box Attacks against Machine Learning" (2017), Algorithm 1 and §6 (reservoir
sampling): `JacobianDataModule`. Juuti et al., "PRADA: Protecting against DNN Model Stealing Attacks" (2019), targeted random
synthetic samples: `TargetedJacobianDataModule`.

**Algorithm.** 1. Ask about the first ``seeds`` images of the pool; a share of them is held out, and takes no part in what follows.
2. Train an interim student from fresh weights on everything asked so far. 3. Make new points from all points so far, or from
``kappa`` of them, drawn without replacement, once ``sigma`` rounds are over. 4. Ask about the new points. 5. Repeat 2–4 ``rounds``
times. The student that is attached to the Trainer is then trained from scratch on all of them.

A new point is ``clip(x + step · sign(∂F_c(x)/∂x))``, where ``F`` is the interim student and ``c`` the *victim's* class of ``x``. The
targeted variant makes ``targets`` new points from each: towards as many classes other than ``c``, in ``steps`` small steps that stay
within ``epsilon`` of ``x``.

**Budget.** With ``v = round(validation_fraction · seeds)``, ``n = seeds − v``, ``k`` new points for each (1, or ``targets``), ``R =
rounds`` and ``σ = min(sigma, R)``: ``v + n·(1+k)^σ + k·kappa·(R−σ)`` queries (`JacobianDataModule.planned_queries`); without a reservoir
``v + n·(1+k)^R``. Fewer of them are distinct where a step leads nowhere, as at a clipped corner. Any kind of answer will do: the
class is its largest entry, and the students learn from the whole answer. An interrupted theft goes on with the points it had
chosen.

**Defaults.** 100 seeds, 6 rounds, step 0.1 and 10 epochs as in the paper's experiments on MNIST; no reservoir (the paper's is
``sigma: 3, kappa: 400``). The targeted variant has 3 targets, 8 steps, ``epsilon`` 0.1 and a step of ``epsilon / 8``, so that a gradient
that never turns just reaches the border; its 3 rounds cost what 6 of the plain one do. ``step`` and ``epsilon`` count in pixels from 0
to 1 and are divided by the data's standard deviation of each channel, since the student lives in the victim's normalised space. The
paper's step that changes its sign every few rounds is left out. Validation, which it lacks, is on images of the pool only.

**Pitfalls.** Published code takes the data set's label for ``c``, which a thief does not have; does not clip, or clips normalised
inputs to [0, 1]; goes on training the student of the round before; and asks about all points anew in every round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction.base import TransferSet, require_classes
from meadef_lightning.extraction.pools import Pool, pixel_range
from meadef_lightning.extraction.rounds import RoundsDataModule
from meadef_lightning.extraction.student import Student, answer_classes
from meadef_lightning.oracle import BlackBox


def jacobian_augmentation(
    model: nn.Module, x: Tensor, classes: Tensor, step: Tensor | float, low: Tensor, high: Tensor
) -> Tensor:
    """One step up the logit of each image's class: ``clip(x + step · sign(∂F_c(x)/∂x))``, Papernot et al. (2017), Algorithm 1.

    ``F`` are logits: the gradients of a confident student's softmax vanish in float32, and with a sign of 0 nothing would move. One
    backward pass over the sum of all rows' logits gives all gradients.

    Args:
        model: Maps ``(B, C, H, W)`` to ``(B, K)`` logits; in eval mode, so that rows do not depend on each other.
        x: ``(B, C, H, W)``.
        classes: ``c``, ``(B,)`` int64: the victim's.
        step: Length in the space of ``x``, a number or ``(C, 1, 1)``.
        low: Least value of a pixel, a scalar tensor or ``(C, 1, 1)``.
        high: Largest one.

    Returns:
        New points of the shape of ``x``; parameters get no gradients.
    """
    with torch.enable_grad():
        inputs = x.detach().requires_grad_()
        logits = model(inputs).gather(1, classes[:, None])
        (gradient,) = torch.autograd.grad(logits.sum(), inputs)
    return (x.detach() + step * gradient.sign()).clamp(low, high)


def targeted_random_steps(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    step: Tensor | float,
    steps: int,
    epsilon: Tensor | float,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """Iterated sign steps that make a target class likelier: ``x ← clip(x − step · sign(∂CE(F(x), t)/∂x))``, Juuti et al. (2019).

    Args:
        model: See `jacobian_augmentation`, as for what is not said here.
        x: ``(B, C, H, W)``.
        targets: ``t``, ``(B,)`` int64.
        step: Length of a step in the space of ``x``, a number or ``(C, 1, 1)``.
        steps: Number of steps.
        epsilon: Farthest a pixel may go from where it was, a number or ``(C, 1, 1)``.
        low: Least value of a pixel.
        high: Largest one.

    Returns:
        New points of the shape of ``x``.
    """
    moved = start = x.detach()
    for _ in range(steps):
        with torch.enable_grad():
            inputs = moved.detach().requires_grad_()
            loss = F.cross_entropy(model(inputs), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, inputs)
        moved = moved - step * gradient.sign()
        moved = torch.minimum(torch.maximum(moved, start - epsilon), start + epsilon).clamp(low, high)
    return moved


def random_targets(classes: Tensor, num_classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws classes other than the given ones, uniformly and without repetition within a row.

    Args:
        classes: ``(B,)`` int64, on the CPU.
        num_classes: Number of classes.
        count: How many for each row, below ``num_classes``.
        generator: Source of randomness.

    Returns:
        ``(B, count)`` int64.
    """
    score = torch.rand(len(classes), num_classes, generator=generator).scatter_(1, classes[:, None], -1.0)
    return score.topk(count, dim=1).indices


class JacobianDataModule(RoundsDataModule):
    """Papernot's attack: seed images, then rounds that double the points along an interim student's gradients.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        seeds: Images of the pool to begin with, the first ones, validation included.
        rounds: Times the points are augmented.
        step: Length of a step, in pixels from 0 to 1.
        epochs: Passes of an interim student over the points so far.
        sigma: Rounds after which the reservoir begins, below ``rounds``. By default all points are augmented in all rounds.
        kappa: Points drawn for augmentation in each round after them; given together with ``sigma``.
        batch_size: Queries in a training batch, and points augmented at once.
        augmentation: Maps a batch to one of the same shape, for the final student only, see `ExtractionDataModule`.
        validation_fraction: Share of the seeds held out, below 1; these are neither trained on nor augmented.
        seed: Seed of the interim students, the reservoir and the training order.
        pool: Where the seeds come from; the data's attacker split by default.

    Raises:
        MisconfigurationException: If the oracle answers with features.
        ValueError: If a number is out of range, or (in `setup`) the pool is too small.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        seeds: int = 100,
        rounds: int = 6,
        step: float = 0.1,
        epochs: int = 10,
        sigma: int | None = None,
        kappa: int | None = None,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(oracle, data, batch_size, augmentation, validation_fraction, seed, pool)
        require_classes(oracle, type(self).__name__)
        if min(seeds, rounds, epochs) < 1 or step <= 0:
            raise ValueError(f"{seeds=}, {rounds=} and {epochs=} must be at least 1, and {step=} above 0.")
        if (sigma is None) != (kappa is None):
            raise ValueError(f"A reservoir needs both sigma and kappa, got sigma={sigma} and kappa={kappa}.")
        if sigma is not None and not 0 <= sigma < rounds:
            raise ValueError(f"sigma={sigma} must lie in [0, {rounds}): the reservoir begins before the last round.")
        self.seeds, self.rounds, self.step, self.epochs = seeds, rounds, step, epochs
        self.sigma, self.kappa = sigma, kappa
        self.children = 1  # new points made from each point that is augmented

    @property
    def planned_queries(self) -> int:
        """Rows that will be asked: the closed formula of the module's description."""
        held_out = round(self.validation_fraction * self.seeds)
        doubling = self.rounds if self.sigma is None else self.sigma
        later = (self.kappa or 0) * self.children * (self.rounds - doubling)
        return int(held_out + (self.seeds - held_out) * (1 + self.children) ** doubling + later)

    def augment(self, student: Student, x: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Makes new points.

        Args:
            student: The interim student.
            x: Points to start from, ``(B, C, H, W)`` on the CPU.
            classes: The victim's classes of them.
            generator: Source of randomness.

        Returns:
            ``(children · B, C, H, W)`` on the CPU; row ``j · B + i`` is the ``j``-th one from row ``i``.
        """
        step, low, high = (value.to(student.device) for value in (self._pixels(self.step), *pixel_range(self.data)))
        move = partial(jacobian_augmentation, student, step=step, low=low, high=high)
        return _in_batches(move, x, classes, self.batch_size, student.device)

    @override
    def collect(self) -> TransferSet:
        """Asks about the seeds, then about what each round makes of all points so far."""
        if self.children >= self.num_classes:
            raise ValueError(
                f"There are no {self.children} other classes than a point's own among {self.num_classes}; lower targets."
            )
        images, y = self.pool.images(self.data)
        trained = self.seeds - round(self.validation_fraction * self.seeds)
        most: int = trained * (1 + self.children) ** (self.sigma or 0)
        if self.seeds > len(images) or trained < 1:
            raise ValueError(
                f"The attack needs {self.seeds} seeds, {self.seeds - trained} of them for validation, and the pool has "
                f"{len(images)}. Raise the pool's size (attacker_size of the data), or change seeds."
            )
        if self.kappa is not None and not 1 <= self.kappa <= most:
            raise ValueError(f"kappa={self.kappa} must lie in [1, {most}], the points after {self.sigma} rounds.")
        x, origin, done = images[: self.seeds], torch.arange(self.seeds), 0
        state = self.load_round()
        if state is not None and torch.equal(state["x"][: self.seeds], x):
            x, origin, done = state["x"], state["origin"], int(state["done"])
        answers = self.ask(x, f"Asking about {len(x)} points")
        for number in range(done, self.rounds):
            sources = (origin < trained).nonzero().flatten()
            student = self.interim(x[sources], answers[sources], self.epochs, self.round_seed(number))
            generator = torch.Generator().manual_seed(self.round_seed(number))
            if self.sigma is not None and number >= self.sigma:
                sources = sources[torch.randperm(len(sources), generator=generator)[: self.kappa]]
            new = self.augment(student, x[sources], answer_classes(answers[sources]), generator)
            x, origin = torch.cat([x, new]), torch.cat([origin, origin[sources].repeat(self.children)])
            # kept before they are asked: even if the training of a student could not be repeated to the bit, its points are paid once
            self.save_round({"x": x, "origin": origin, "done": number + 1})
            answers = torch.cat([answers, self.ask(new, f"Asking, round {number + 1} of {self.rounds}")])
        # another data set's classes are not the victim's; a made-up point has its seed's, which nobody looks at
        known = None if y is None else y[origin]
        return TransferSet(x, answers, held_out=origin >= trained, y=known)

    @override
    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report; see `ExtractionDataModule.query_summary`."""
        return {**super().query_summary(), "seeds": self.seeds, "rounds": self.rounds}

    def _pixels(self, length: float) -> Tensor:
        """A length in pixels from 0 to 1, in the victim's input space: ``(C, 1, 1)``."""
        return length / torch.tensor(self.data.std, dtype=torch.float32)[:, None, None]


class TargetedJacobianDataModule(JacobianDataModule):
    """The targeted random variant: each point is followed by some that were moved towards randomly drawn other classes.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        targets: New points from each, towards as many different classes; below the number of classes.
        steps: Small steps of each.
        epsilon: Farthest a pixel may go, in pixels from 0 to 1.
        step: Length of a small step, in pixels from 0 to 1.
        rounds: See `JacobianDataModule`.
        **kwargs: See `JacobianDataModule`. A reservoir draws ``kappa`` points and makes ``targets`` new ones from each.

    Raises:
        MisconfigurationException: If the oracle answers with features.
        ValueError: If a number is out of range, or (in `setup`) the pool is too small.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        targets: int = 3,
        steps: int = 8,
        epsilon: float = 0.1,
        step: float = 0.0125,
        rounds: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(oracle, data, step=step, rounds=rounds, **kwargs)
        if min(targets, steps) < 1 or epsilon <= 0:
            raise ValueError(f"targets={targets} and steps={steps} must be at least 1, and epsilon={epsilon} above 0.")
        self.children, self.steps, self.epsilon = targets, steps, epsilon

    @override
    def augment(self, student: Student, x: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Moves each point towards randomly drawn other classes; see `JacobianDataModule.augment`."""
        lengths = (self._pixels(self.step), self._pixels(self.epsilon), *pixel_range(self.data))
        step, epsilon, low, high = (value.to(student.device) for value in lengths)
        move = partial(targeted_random_steps, student, step=step, steps=self.steps, epsilon=epsilon, low=low, high=high)
        targets = random_targets(classes, self.num_classes, self.children, generator).T.flatten()
        return _in_batches(move, x.repeat(self.children, 1, 1, 1), targets, self.batch_size, student.device)


def _in_batches(
    move: Callable[[Tensor, Tensor], Tensor], x: Tensor, classes: Tensor, size: int, device: torch.device
) -> Tensor:
    """Applies ``move(x, classes)`` batch by batch on a device; the result is on the CPU."""
    batches = zip(torch.split(x, size), torch.split(classes, size), strict=True)
    return torch.cat([move(part.to(device), named.to(device)).cpu() for part, named in batches])
