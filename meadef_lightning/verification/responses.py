"""All answers of one suspect to one key's questions, and those of reference models beside them.

**What a reference buys.** Composites of some classes look like a third class to any model of the task. A model that was trained without regard
to the key shows which: its statistic of every key is subtracted from the suspect's, and the look-alikes are gone.

**What several buy.** Two things (:func:`~.scores.above_references`). The mean of N has fewer whims than one: a suspect that is as whimsical as they
are, with variance σ², has statistics of variance ``σ²·(1 + 1/N)`` above it. And they show *which* keys are a matter of taste, answered now so and
now so by models that never saw a key, which must then stand out further to count.

**Measured** (stored models, 32 samples a cell, references of the victim's architecture, some of other seeds). p <= .001 with 1, 5 and 9 of them: thefts by
class labels from nine Fashion-MNIST victims 7, 9 and 9 of 9, by soft answers 8, 9 and 9, the victims 8 each time, MLPs 1, 1 and 2 of 18; thefts by class labels in
ten runs of the digits demo 6, 8 and 9 of 20, by soft answers 20 of 20 each time; clean and independent models never (of 70). The weight of the usual variance was
chosen there, too: 4 and 9 serve alike, less is worse.

**Validity.** No reference depends on which key was drawn, and neither does any function of them: the rank of the true key stays exact with any number.

**Pitfalls.** Each must have been trained without regard to the key: who chooses among references by the verdict that they lead to, or trains one to
avoid his key's target, makes his key stand out. Fix their number before; evidence names them by the digests of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.watermark.key import WatermarkKey


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """What a reference model answered.

    Args:
        counts: Its ``counts``; see :class:`Responses`.
        model_sha256: Digest of its weights.
    """

    counts: Tensor
    model_sha256: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Responses:
    """All answers of one suspect, as class labels. Raw answers tell the key, so this stays with whoever holds it.

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
    return replace(responses, references=tuple(Reference(one.counts, one.model_sha256) for one in known))
