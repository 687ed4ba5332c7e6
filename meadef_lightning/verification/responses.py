"""All answers of one suspect to one key's questions, and those of reference models beside them.

**What a reference buys.** Composites of some classes look like a third class to any model of the task. A model that was trained without regard
to the key shows which: what it answers is subtracted from what the suspect does, and the look-alikes are gone.

**What several buy.** Two things (:func:`~.scores.above_references`). The mean of N has fewer whims than one: a suspect that is as whimsical as they
are, with variance σ², has answers of variance ``σ²·(1 + 1/N)`` above it. And they show *which* cells are a matter of taste, answered now so and
now so by models that never saw a key, which must then stand out further to count. Those of another kind than the victim show what composites look
like to the network that the thief may have chosen.

**Measured** (stored models, 32 samples a cell; ten runs of the digits demo, five other digits keys, nine Fashion-MNIST victims of three keys, and from each four
thefts). How many of 24 have p <= .001:

===========================================  =======  ====================  ===========  =====================  ============
Judged by                                    victims  soft, victim's kind   soft, MLP    labels, victim's kind  labels, MLP
===========================================  =======  ====================  ===========  =====================  ============
labels, one reference, form of schema 4      23       23                    12           10                     4
labels, one reference                        23       23                    13           13                     6
labels, three                                23       23                    13           14                     9
probabilities, one                           24       24                    21           17                     13
probabilities, three                         23       24                    21           19                     14
probabilities, two, and two that are MLPs    24       24                    22           18                     19
===========================================  =======  ====================  ===========  =====================  ============

No clean or independent model reaches it. ("Labels" and "soft" at the head of a column are what the thief learnt from; what he answers the judge is probabilities in all
of them.) The form of the statistic was sought on these very tables, so look at the fresh seeds in the project's results, too.

**Validity.** No reference depends on which key was drawn, and neither does any function of them: the rank of the true key stays exact with any number.

**Pitfalls.** Each must have been trained without regard to the key: who chooses among references by the verdict that they lead to, or trains one to
avoid his key's target, makes his key stand out. Fix their number before; evidence names them by the digests of their weights. And three of one kind
can be worse than one: where a weak network answers nearly all pairs in the key's way with its target (CIFAR-10 at 71 %), the references happen to
agree on the look-alikes, whose excess is then weighed up: p 0.0004 to 0.007 instead of 0.0002 to 0.0017 for the same victims and thefts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.remaining import UNIT
from meadef_lightning.watermark.key import WatermarkKey


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """What a reference model answered.

    Args:
        counts: Its ``counts``; see :class:`Responses`.
        model_sha256: Digest of its weights.
        soft: Its ``soft.cells``; ``None`` where it answered with labels.
    """

    counts: Tensor
    model_sha256: str | None = None
    soft: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SoftAnswers:
    """What probabilities say of composites beside their sources (:mod:`~.remaining`), in thousandths.

    Args:
        trigger: The target's share of each watermark sample, int64, shape ``(n,)``.
        control: The same of their matched controls.
        cells: Every class's shares, added up over the samples of each cell; int64, shape ``(cells, targets)``.
    """

    trigger: Tensor
    control: Tensor
    cells: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Responses:
    """All answers of one suspect, as class labels and, where it gives probabilities, what these say beyond labels.

    Raw answers tell the key, so this stays with whoever holds it.

    Args:
        trigger: Answers to the watermark samples, int64, shape ``(n,)``.
        control: Answers to their matched controls, int64, shape ``(n,)``.
        cells: Source a, source b and combining way of each cell, int64, shape ``(cells, 3)``, sorted (``DecoyTable.cells``).
        counts: How often each cell was answered with each class, int64, shape ``(cells, classes)``; of many classes those that
            ``DecoyTable.columns`` tells apart.
        natural: Answers to natural test samples, int64, shape ``(N,)``.
        natural_labels: Their true classes, int64, shape ``(N,)``.
        decoys: Number of decoy keys wanted.
        seed: The verifier's seed.
        model_sha256: Digest of the weights that answered (:func:`~.fingerprints.model_fingerprint`); ``None`` for a black box.
        references: What reference models answered to the same; see :meth:`DecoyTable.statistics`.
        soft: What the suspect's probabilities say; ``None`` where it answered with labels.
    """

    trigger: Tensor
    control: Tensor
    cells: Tensor
    counts: Tensor
    natural: Tensor
    natural_labels: Tensor
    decoys: int
    seed: int
    model_sha256: str | None = None
    references: tuple[Reference, ...] = ()
    soft: SoftAnswers | None = None

    @property
    def by_probabilities(self) -> bool:
        """Whether keys are ranked by probabilities: the suspect gave some, and so did every reference."""
        return self.soft is not None and all(known.soft is not None for known in self.references)

    def tables(self, plan: DecoyTable) -> tuple[Tensor, list[Tensor]]:
        """Returns what :meth:`DecoyTable.statistics` ranks keys by: the suspect's table, and the references'.

        Raises:
            ValueError: If a table has another form, or a reference answered another number of samples.
        """
        samples = plan.samples(self.counts)
        for known in self.references:
            if (asked := plan.samples(known.counts)) != samples:
                raise ValueError(
                    f"A reference answered {asked} samples a cell, the suspect {samples}; ask both the same."
                )
        if not self.by_probabilities or self.soft is None:
            return plan.shares(self.counts), [plan.shares(known.counts) for known in self.references]
        whole, shape = UNIT * samples, (len(self.counts), len(plan.targets))

        def table(sums: Tensor | None, name: str) -> Tensor:
            if sums is None or tuple(sums.shape) != shape or sums.dtype != torch.int64:
                raise ValueError(f"{name} must be int64 of shape {shape} (cells, classes).")
            if bool((sums < 0).any()) or bool((sums.sum(1) > whole).any()):
                raise ValueError(
                    f"{name}: the remaining shares of a cell must be at least 0 and sum to {whole} thousandths at most."
                )
            return sums.double() / whole

        return table(self.soft.cells, "soft.cells"), [table(known.soft, "soft.references") for known in self.references]

    def __repr__(self) -> str:
        """Shows sizes only: the answers to triggers, in a log or traceback, would give the target away."""
        return f"Responses({len(self.trigger)} triggers, {len(self.cells)} cells, {len(self.natural)} natural samples)"

    def check(self, key: WatermarkKey) -> DecoyTable:
        """Checks that the answers belong to this key's questions, and returns the comparison that was asked for.

        Raises:
            ValueError: If shapes, types or ranges are wrong, or the cells are not the ones that this key and seed need.
        """
        table = DecoyTable(key, self.decoys, self.seed)
        for name in ("trigger", "control", "natural", "natural_labels"):
            labels: Tensor = getattr(self, name)
            if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) == 0:
                raise ValueError(
                    f"{name} must be int64 of shape (n,) with n >= 1, got {labels.dtype} {tuple(labels.shape)}."
                )
            if int(labels.min()) < 0 or int(labels.max()) >= key.num_classes:
                raise ValueError(f"{name} holds answers outside 0 to {key.num_classes - 1}.")
        for first, second in (("trigger", "control"), ("natural", "natural_labels")):
            if len(getattr(self, first)) != len(getattr(self, second)):
                raise ValueError(
                    f"{first} and {second} must be equally long, got {len(getattr(self, first))} and {len(getattr(self, second))}."
                )
        if self.soft is not None:
            for name in ("trigger", "control"):
                shares: Tensor = getattr(self.soft, name)
                if shares.shape != self.trigger.shape or shares.dtype != torch.int64:
                    raise ValueError(f"soft.{name} must be int64 of shape {tuple(self.trigger.shape)}.")
                if int(shares.min()) < 0 or int(shares.max()) > UNIT:
                    raise ValueError(f"soft.{name} holds shares outside 0 to {UNIT} thousandths.")
        if not torch.equal(self.cells, table.cells):
            raise ValueError("The cells are not the ones that this key, number of decoys and seed ask for.")
        return table


def with_reference(responses: Responses, reference: Responses | Sequence[Responses] | None) -> Responses:
    """Puts the answers of a reference model, or of several, beside a suspect's.

    Raises:
        ValueError: If they were not all asked the same, or the sequence is empty.
    """
    if reference is None:
        return responses
    known = [reference] if isinstance(reference, Responses) else list(reference)
    if not known:
        raise ValueError("There is no reference model in the sequence given; give None to judge without one.")
    for one in known:
        same = torch.equal(responses.cells, one.cells) and responses.seed == one.seed
        if (
            not same
            or one.counts.shape != responses.counts.shape
            or not torch.equal(responses.counts.sum(1), one.counts.sum(1))
        ):
            raise ValueError(
                "The reference was asked other questions than the suspect; verify both with the same key and options."
            )
    return replace(responses, references=tuple(_as_reference(one) for one in known))


def _as_reference(one: Responses) -> Reference:
    return Reference(one.counts, one.model_sha256, None if one.soft is None else one.soft.cells)
