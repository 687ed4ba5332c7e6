"""ActiveThief: choose from a large pool, round by round, the images that teach an interim student the most.

**Source.** Pal et al., "ActiveThief: Model Extraction Using Active Learning and Unannotated Public Data" (AAAI 2020), with its
strategies: uncertainty (entropy), greedy k-center (after Sener & Savarese, 2018), DFAL (Ducoffe & Precioso, 2018, on Moosavi-Dezfooli
et al., "DeepFool", 2016, Algorithm 2), and DFAL followed by k-center.

**Algorithm.** 1. Draw images at random: for validation, and to begin with. Ask about them. 2. Train an interim student from fresh
weights on all answers so far, validation excepted. 3. Pick images by its view of those not asked yet. 4. Ask about them. 5. Repeat
2–4 ``rounds`` times; the student that is attached to the Trainer is then trained from scratch on all answers. An image is picked

* ``"random"``: at random (no interim student is trained);
* ``"entropy"``: where the student's answer has the largest entropy;
* ``"kcenter"``: where its probabilities are farthest from those of all images asked or picked so far, one after the other;
* ``"dfal"``: where the least perturbation changes its mind; the image is asked, not its perturbation;
* ``"dfal+kcenter"``: by k-center among the ``shortlist`` times as many that DFAL prefers.

**Budget.** Exactly ``queries`` images: ``v = round(validation_fraction · queries)`` for validation, ``i = round(initial_fraction ·
queries)`` to begin with, and the rest in ``rounds`` parts that differ by one at most, the larger ones first. As many are distinct,
unless the pool holds an image twice. Any kind of answer will do; the interim student's view is all a strategy sees.

**Defaults.** 20 % for validation, 10 % to begin with and 10 rounds, as in the paper. The paper stops the training of every student
by its F1 on the validation images; ours train for a fixed number of epochs, and validation only watches. The shortlist is a multiple
of a round's part, where the paper has a fixed number. DeepFool takes at most 5 steps and looks at the 10 likeliest classes.

**Pitfalls.** Published code goes on training the student of the round before, whose old picks then weigh more; leaves the validation
images out of the count of queries; measures k-center from the last round's picks only; and runs DeepFool image by image. Entropy
alone tends to pick near-duplicates. A confident student's probabilities differ by rounding only: few epochs make better picks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction.base import TransferSet, require_classes
from meadef_lightning.extraction.pools import Pool
from meadef_lightning.extraction.rounds import RoundsDataModule
from meadef_lightning.extraction.student import Student
from meadef_lightning.oracle import BlackBox, row_digests

Strategy = Literal["random", "entropy", "kcenter", "dfal", "dfal+kcenter"]
"""How images are picked."""


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats, ``(B,)``, of rows of probabilities ``(B, K)``."""
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(dim=-1)


def greedy_k_center(candidates: Tensor, centers: Tensor, count: int) -> Tensor:
    """Picks candidates, each the farthest from all centers and those picked before it.

    With ``centers`` fixed, the largest distance of a candidate to its nearest center is then at most twice the least possible
    (Gonzalez, 1985). Memory grows with the number of candidates, not with its product with that of picks.

    Args:
        candidates: ``(N, D)``.
        centers: ``(M, D)``; with none the first candidate is picked first.
        count: How many to pick, at most ``N``.

    Returns:
        Their indices in the order picked, int64 ``(count,)``; among equally far ones the first.

    Raises:
        ValueError: If ``count`` is larger than the number of candidates.
    """
    if not 0 <= count <= len(candidates):
        raise ValueError(f"count={count} must lie in [0, {len(candidates)}], the number of candidates.")
    distance = candidates.new_full((len(candidates),), math.inf)
    for part in torch.split(centers, 256):
        # not by matrix products, which cannot tell nearby probabilities apart
        apart = torch.cdist(candidates, part, compute_mode="donot_use_mm_for_euclid_dist")
        distance = torch.minimum(distance, apart.amin(dim=1)) if len(part) else distance
    picked = torch.empty(count, dtype=torch.int64, device=candidates.device)
    for position in range(count):
        index = distance.argmax()
        picked[position] = index
        distance = torch.minimum(distance, torch.linalg.vector_norm(candidates - candidates[index], dim=1))
        distance[index] = -math.inf  # never again, also if all others are copies of centers
    return picked


def deepfool_distance(
    model: nn.Module, x: Tensor, steps: int = 5, classes: int = 10, overshoot: float = 0.02
) -> Tensor:
    """L2 length of the perturbation that DeepFool needs to change the model's class: its estimate of the distance to the border.

    Each step goes to the nearest border of the model's linearisation, ``r = |f_k − f_l| / ‖w‖² · w`` with ``w = ∂f_l/∂x − ∂f_k/∂x``
    (Moosavi-Dezfooli et al., 2016, Algorithm 2), from a point that lies ``overshoot`` beyond the steps so far. For an affine model
    one step is exact. All rows step together; those that have crossed stay where they are.

    Args:
        model: Maps ``(B, C, H, W)`` to ``(B, K)`` logits; in eval mode, so that rows do not depend on each other.
        x: ``(B, C, H, W)``.
        steps: Most steps. Rows that have not crossed by then get the length so far.
        classes: How many of the likeliest classes are looked at; one backward pass is needed for each.
        overshoot: Part of the perturbation added to be across; not counted in the length.

    Returns:
        ``(B,)`` of the dtype of the logits; infinity where the gradients vanish before the border.

    Raises:
        ValueError: If fewer than two classes are looked at.
    """
    shift, order = torch.zeros_like(x), torch.empty(0)
    stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step in range(steps):
        with torch.enable_grad():
            inputs = (x.detach() + (1 + overshoot) * shift).requires_grad_()
            logits = model(inputs)
            if step == 0:
                order = logits.detach().topk(min(classes, logits.shape[1]), dim=1).indices
                if order.shape[1] < 2:
                    raise ValueError(f"DeepFool needs two classes, got classes={classes} of {logits.shape[1]}.")
            before = logits.argmax(dim=1) == order[:, 0]  # not across yet
            if not bool(before.any()):
                break
            values = logits.gather(1, order)
            columns = values.sum(dim=0).unbind()
            gradients = [torch.autograd.grad(column, inputs, retain_graph=True)[0].flatten(1) for column in columns]
        values, slopes = values.detach(), torch.stack(gradients, dim=1)
        slopes = slopes[:, 1:] - slopes[:, :1]
        lengths = torch.linalg.vector_norm(slopes, dim=2)
        ahead = torch.where(lengths > 0, (values[:, 1:] - values[:, :1]).abs() / lengths, math.inf)
        nearest, index = ahead.min(dim=1, keepdim=True)
        stuck |= before & nearest[:, 0].isinf()
        way = slopes.take_along_dim(index[:, :, None], dim=1)[:, 0] / lengths.take_along_dim(index, dim=1)
        moving = before[:, None] & nearest.isfinite()
        shift = shift + torch.where(moving, nearest * way, 0.0).view_as(x)
    length: Tensor = torch.linalg.vector_norm(shift.flatten(1), dim=1)
    return length.masked_fill(stuck, math.inf)


class ActiveThiefDataModule(RoundsDataModule):
    """The ActiveThief attack: a pool of images, of which the most telling ones are asked; see the module's description.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        queries: Images to ask, validation included.
        strategy: How they are picked.
        rounds: Rounds of picking.
        epochs: Passes of an interim student over the answers so far.
        initial_fraction: Share of the queries that is drawn at random to begin with, in ``(0, 1)``.
        shortlist: With ``"dfal+kcenter"``, images that DFAL leaves to k-center for each that is picked, at least 1.
        batch_size: Queries in a training batch, and images that a strategy looks at at once.
        augmentation: Maps a batch to one of the same shape, for the final student only, see `ExtractionDataModule`.
        validation_fraction: Share of the queries held out, below 1.
        seed: Seed of the random draws, the interim students and the training order.
        pool: Where the images come from; the data's attacker split by default.

    Raises:
        MisconfigurationException: If the oracle answers with features.
        ValueError: If a number is out of range, or (in `setup`) the pool is too small.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        queries: int,
        strategy: Strategy = "dfal+kcenter",
        rounds: int = 10,
        epochs: int = 10,
        initial_fraction: float = 0.1,
        shortlist: float = 5.0,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        validation_fraction: float = 0.2,
        seed: int = 0,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(oracle, data, batch_size, augmentation, validation_fraction, seed, pool)
        require_classes(oracle, type(self).__name__)
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy={strategy!r} must be one of {', '.join(get_args(Strategy))}.")
        if min(rounds, epochs) < 1 or not shortlist >= 1:
            raise ValueError(f"rounds={rounds}, epochs={epochs} and shortlist={shortlist} must be at least 1.")
        self.queries, self.strategy, self.rounds, self.epochs = queries, strategy, rounds, epochs
        self.initial_fraction, self.shortlist = initial_fraction, shortlist
        if self.parts[1] < 1 or self.parts[-1] < 1:
            raise ValueError(
                f"queries={queries} leave {self.parts[0]} images for validation, {self.parts[1]} to begin with and "
                f"{sum(self.parts[2:])} for {rounds} rounds; the last two need one each at least. Raise queries, or change "
                "initial_fraction, validation_fraction or rounds."
            )

    @property
    def parts(self) -> list[int]:
        """How the queries are spent: on validation, to begin with, and in each round."""
        held_out, initial = (round(part * self.queries) for part in (self.validation_fraction, self.initial_fraction))
        each, more = divmod(self.queries - held_out - initial, self.rounds)
        return [held_out, initial, *(each + (number < more) for number in range(self.rounds))]

    @override
    def collect(self) -> TransferSet:
        """Asks about random images, then about what the strategy picks in each round."""
        x, y = self.pool.images(self.data)
        if self.queries > len(x):
            raise ValueError(
                f"The attack needs {self.queries} images and the pool has {len(x)}. Raise the pool's size (attacker_size of the "
                "data), or lower queries."
            )
        held_out, initial, *parts = self.parts
        generator = torch.Generator().manual_seed(self.seed)
        asked, done = torch.randperm(len(x), generator=generator)[: held_out + initial], 0
        images = hashlib.sha256(b"".join(row_digests(x))).hexdigest()
        state = self.load_round()
        if state is not None and state["images"] == images:
            asked, done = state["asked"], int(state["done"])
        answers = self.ask(x[asked], f"Asking about {len(asked)} images")
        for number in range(done, self.rounds):
            rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, asked, False).nonzero().flatten()
            seed = self.round_seed(number)
            if self.strategy == "random":
                order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
                picked = rest[order[: parts[number]]]
            else:
                student = self.interim(x[asked[held_out:]], answers[held_out:], self.epochs, seed)
                picked = rest[self.pick(student, x, rest, asked[held_out:], parts[number])]
            asked = torch.cat([asked, picked])
            # kept before they are asked: even if the training of a student could not be repeated to the bit, its picks are paid once
            self.save_round({"images": images, "asked": asked, "done": number + 1})
            answers = torch.cat([answers, self.ask(x[picked], f"Asking, round {number + 1} of {self.rounds}")])
        known = None if y is None else y[asked]  # else not the victim's classes
        return TransferSet(x[asked], answers, held_out=torch.arange(self.queries) < held_out, y=known)

    def pick(self, student: Student, x: Tensor, rest: Tensor, asked: Tensor, count: int) -> Tensor:
        """Picks images by the strategy.

        Args:
            student: The interim student.
            x: The pool, ``(N, C, H, W)`` on the CPU.
            rest: Indices of the images to pick from, int64.
            asked: Indices of the images that the student was trained on, int64.
            count: How many to pick.

        Returns:
            Indices into ``rest``, int64 ``(count,)``.
        """

        def look(view: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
            return torch.cat([view(x[part].to(student.device)).cpu() for part in torch.split(rows, self.batch_size)])

        def probabilities(batch: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.softmax(student(batch), dim=1)

        if self.strategy == "entropy":
            return entropy(look(probabilities, rest)).argsort(descending=True, stable=True)[:count]
        candidates = torch.arange(len(rest))
        if self.strategy != "kcenter":
            candidates = look(lambda batch: deepfool_distance(student, batch), rest).argsort(stable=True)
            if self.strategy == "dfal":
                return candidates[:count]
            candidates = candidates[: math.ceil(self.shortlist * count)]
        chosen = greedy_k_center(look(probabilities, rest[candidates]), look(probabilities, asked), count)
        return candidates[chosen]

    @override
    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report; see `ExtractionDataModule.query_summary`."""
        return {**super().query_summary(), "strategy": self.strategy, "rounds": self.rounds}
