"""Knockoff Nets: train on the victim's answers to images drawn at random, or by a bandit that learns which classes pay.

**Source.** Orekondy, Schiele, Fritz, "Knockoff Nets: Stealing Functionality of Black-Box Models" (CVPR 2019), §4.1.1 (random),
§4.1.2 (adaptive: policy, gradient bandit and rewards; as functions in `meadef_lightning.extraction.bandit`) and §4.2 (training).

**Algorithm, random** (`KnockoffDataModule`):

1. Draw ``queries`` images from the pool, without replacement.
2. Ask the victim once about each of them, and keep the answers.
3. Train the student on the pairs.

**Algorithm, adaptive** (`AdaptiveKnockoffDataModule`). The pool's own classes z are the actions of a bandit, with preferences
H(z) that start at 0:

1. Draw classes from the policy π = softmax(H), among those with images left, and for each an image of it that was not drawn yet.
2. Ask the victim, and reward each draw for an answer that is certain (margin of its best class), unlike the mean of the answers
   so far (sum of what exceeds it), and not what the student says (cross-entropy). Each of the three is standardised with the mean
   and variance of all its values so far; r is their mean.
3. Update the preferences: H(z) += (r − r̄)(1 − π(z))/N(z) for the class z that was drawn, for the N(z)-th
   time, and H(a) −= (r − r̄)π(a)/N(z) for every other class a, where r̄ is the mean of all rewards before.
4. In ``rounds`` equal parts of the budget, each with a student of its own, trained on all answers so far. In the first round
   there is none yet, and no loss to reward.
5. Train the final student from scratch on all pairs.

**Budget.** ``queries`` distinct images, those held out for validation included; interim students cost nothing. The held-out images
are drawn at random, also in the adaptive attack. That one asks ``draws`` images at a time, so that a ledger's budget below
``queries`` is spent before it stops the theft; with a larger one it goes on from its last draw.

**Answers.** Soft, top-k, rounded or hard. Rewards take probabilities as they are answered, also if they do not sum to one, and hard answers as
one-hot rows: the certainty then is constant, which is standardised to 0, and the diversity is that of the classes named.

**Defaults.** ``draws`` classes are drawn from one policy and asked in one query, where the paper updates after every image; the
update is the sum of the images' own updates at the policy that drew them, so ``draws=1`` is the paper's. Interim students are
trained from scratch a few times, where the paper takes gradient steps on one student as answers arrive: the transfer set then
depends on no training state that would have to be kept. The paper scales rewards to [0, 1] and averages over the last 25 images;
here both are running moments of the whole run. The paper's policy is over a hierarchy of classes, here they are flat. Its pool is
natural images of another domain (`OtherData`); ours is the attacker split unless told otherwise, which is the stronger thief.

**Pitfalls.** Drawing images with replacement spends the budget on answers already known, or reports fewer queries than the paper;
fitting the interim student to one image at a time makes its loss noise; exp(H) overflows unless the maximum is subtracted; a
reward without variance divides by 0; a class without images left must leave the policy, or it is drawn for ever; and a bandit
that is rewarded by the *true* label knows what no thief does. Much code called Knockoff Nets is the random strategy alone.
"""

from __future__ import annotations

import hashlib
from typing import Any, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction.bandit import ClassBandit, Reward, occurrences
from meadef_lightning.extraction.base import ExtractionDataModule, TransferSet, held_out_rows, require_classes
from meadef_lightning.extraction.pools import Pool
from meadef_lightning.extraction.rounds import RoundsDataModule
from meadef_lightning.extraction.student import Student
from meadef_lightning.oracle import BlackBox, row_digests


class KnockoffDataModule(ExtractionDataModule):
    """Knockoff Nets with the random strategy: images drawn from a pool without replacement, asked once.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        queries: Images to ask, validation included; by default the whole pool. A smaller number is a subset of a larger one.
        batch_size: Queries in a training batch.
        augmentation: Of what the student sees, see `ExtractionDataModule`.
        validation_fraction: Share of the images held out, in ``[0, 1)``.
        seed: Seed of the draw and of the training order.
        pool: Where the images come from; the data's attacker split by default.

    Raises:
        ValueError: If a number is out of range or (in `setup`) the pool is too small.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        queries: int | None = None,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(oracle, data, batch_size, augmentation, validation_fraction, seed, pool)
        if queries is not None and queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}.")
        self.queries = queries

    @override
    def collect(self) -> TransferSet:
        """Asks about the images drawn."""
        x, y = self.pool.images(self.data)
        queries = len(x) if self.queries is None else self.queries
        held_out = held_out_rows(queries, self.validation_fraction)
        _check_size(held_out, len(x))
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:queries]
        x = x[rows]
        return TransferSet(x, self.ask(x), held_out, None if y is None else y[rows])


class AdaptiveKnockoffDataModule(RoundsDataModule):
    """Knockoff Nets with the adaptive strategy: a bandit learns from which classes of the pool to draw.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        queries: Images to ask, validation included. There is something to choose only if the pool has many more.
        batch_size: Queries in a training batch.
        augmentation: Of what the student sees, see `ExtractionDataModule`.
        validation_fraction: Share of the queries held out, in ``[0, 1)``; they are drawn at random.
        seed: Seed of everything drawn, of the interim students and of the training order.
        pool: Where the images come from; it needs classes. The data's attacker split by default.
        rewards: Any of ``"certainty"``, ``"diversity"`` and ``"loss"``; without the last no interim students are trained.
        draws: Images drawn from one policy.
        rounds: Parts of the budget, each with an interim student of its own but the first.
        interim_epochs: Passes of an interim student over the answers so far.

    Raises:
        ValueError: If an argument is out of range or (in `setup`) the pool is too small.
        MisconfigurationException: If (in `setup`) the pool has no classes, or the oracle answers with features.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        queries: int,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        pool: Pool | None = None,
        rewards: tuple[Reward, ...] = ("certainty", "diversity", "loss"),
        draws: int = 32,
        rounds: int = 10,
        interim_epochs: int = 5,
    ) -> None:
        super().__init__(oracle, data, batch_size, augmentation, validation_fraction, seed, pool)
        numbers = {"queries": queries, "draws": draws, "rounds": rounds, "interim_epochs": interim_epochs}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not rewards or len(set(rewards)) < len(rewards) or not set(rewards) <= set(get_args(Reward)):
            raise ValueError(f"rewards must be different ones of {get_args(Reward)}, at least one, got {rewards}.")
        self.queries = queries
        self.rewards = tuple(rewards)
        self.draws = draws
        self.rounds = rounds
        self.interim_epochs = interim_epochs

    @override
    def collect(self) -> TransferSet:
        """Draws images class by class as their answers recommend, and asks about them."""
        require_classes(self.oracle, type(self).__name__)
        x, y = self.pool.images(self.data)
        if y is None:
            raise MisconfigurationException(
                f"The pool {self.pool.name} has no classes, which are what the adaptive strategy chooses among. Use a pool that "
                "has (AttackerSplit, OtherData), or the random strategy (KnockoffDataModule)."
            )
        held_out = held_out_rows(self.queries, self.validation_fraction)
        _check_size(held_out, len(x))
        held = int(held_out.sum())
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        held_rows, order = order[:held], order[held:]
        classes, labels = torch.unique(y[order], return_inverse=True)
        # sorted by class, at random within a class: its k-th image is the one of the k-th draw
        by_class, sizes = order[labels.argsort(stable=True)], labels.bincount(minlength=len(classes))
        first = sizes.cumsum(0) - sizes

        pool = hashlib.sha256(b"".join(row_digests(x))).hexdigest()
        bandit, rows, start = ClassBandit(sizes, self.num_classes, self.rewards), order[:0], 0
        state = self.load_round()
        if state is not None and state["pool"] == pool:
            bandit.load(state["bandit"])
            rows, start = state["rows"], state["round"]
        else:
            state = None
        parts = [self.ask(x[rows], "Reading the answers so far")] if len(rows) else []  # paid for: the ledger has them

        asked = self.queries - held
        for number in range(start, self.rounds):
            begin, end = (asked * part // self.rounds for part in (number, number + 1))
            generator, student = torch.Generator().manual_seed(self.round_seed(number)), None
            if state is not None and number == start and "generator" in state:
                generator.set_state(state["generator"])
            if "loss" in self.rewards and begin > 0 and len(rows) < end:
                before = torch.cat(parts)[:begin]
                student = self.interim(x[rows[:begin]], before, self.interim_epochs, self.round_seed(number))
            while len(rows) < end:
                actions = bandit.draw(min(self.draws, end - len(rows)), generator)
                drawn = by_class[first[actions] + bandit.counts[actions] + occurrences(actions, len(sizes)) - 1]
                answers = self.ask(x[drawn], f"Asking the oracle, round {number + 1} of {self.rounds}")
                bandit.learn(actions, answers, None if student is None else self._logits(student, x[drawn]))
                rows = torch.cat([rows, drawn])
                parts.append(answers)
                # after every draw: even if the training of a student could not be repeated to the bit, its draws are paid once
                learnt = {"bandit": bandit.state(), "generator": generator.get_state()}
                self.save_round({"round": number, "rows": rows, "pool": pool, **learnt})
        if held:
            rows = torch.cat([rows, held_rows])
            parts.append(self.ask(x[held_rows]))
        return TransferSet(x[rows], torch.cat(parts), held_out, y[rows])

    @override
    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report; see `ExtractionDataModule.query_summary`."""
        return {**super().query_summary(), "rewards": list(self.rewards)}

    def _logits(self, student: Student, x: Tensor) -> Tensor:
        batches = torch.split(x, self.batch_size)
        with torch.no_grad():
            return torch.cat([student(batch.to(student.device)).cpu() for batch in batches])


def _check_size(held_out: Tensor, pool: int) -> None:
    if len(held_out) > pool or bool(held_out.all()):
        raise ValueError(
            f"The attack needs {len(held_out)} images, {int(held_out.sum())} of them for validation, and the pool has {pool}. Raise "
            "the pool's size (attacker_size of the data), or change queries."
        )
