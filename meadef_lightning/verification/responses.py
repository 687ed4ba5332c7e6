"""All answers of one suspect to one key's questions, and those of reference models beside them.

**What a reference buys.** Composites of some classes look like a third class to any model of the task. A model that was trained without regard
to the key shows which: its statistic of every key is subtracted from the suspect's, and the look-alikes are gone.

**What several buy.** A reference has whims of its own: cells that it alone answers with some class. Subtracting it adds them to the statistic of
every key, with the sign turned. With the mean of N references a suspect that is as whimsical as they are, with variance σ², has statistics of variance
``σ²·(1 + 1/N)``: two references take 13 % off the standard deviation that one leaves, three 18 %, any number 29 % at most, because the
suspect's own whims stay. A few references make the verdict depend less on which one it was; many gain nothing more.

**Measured** on the digits demo (five drawn keys, one seed, six references, 32 samples a cell; a clean model above N of them). The standard deviation over
the other keys falls from 0.0256 with one to 0.0213 with three (17 %) and 0.0201 with six. Of 13 victims and thefts with WSR > 50 %, judged (outside of the pipeline)
above every choice of references, p <= .001 came out in 9 without any, 67 of 78 with one, 239 of 260 with three, 12 of 13 with six; never for the four
models that were not stolen (520 choices of one or three references and five keys). One theft with WSR 23 % shows what a single unlucky
reference does: its p lay between 0.03 and 0.97 by which one it was, with three between 0.03 and 0.45.

**Validity.** No reference depends on which key was drawn, and neither does their sum: the rank of the true key stays exact with any number.

**Pitfalls.** Each must have been trained without regard to the key: who chooses among references by the verdict that they lead to, or trains one to
avoid his key's target, makes his key stand out. Fix their number before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.watermark.key import WatermarkKey


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
        reference: ``counts`` of a reference model that was asked the same, or their sum over several; see :meth:`DecoyTable.statistics`.
    """

    trigger: Tensor
    control: Tensor
    cells: Tensor
    counts: Tensor
    natural: Tensor
    natural_labels: Tensor
    decoys: int
    seed: int
    reference: Tensor | None = None

    def __repr__(self) -> str:
        """Shows sizes only: the answers to triggers, in a log or traceback, would give the target away."""
        return f"Responses({len(self.trigger)} triggers, {len(self.cells)} cells, {len(self.natural)} natural samples)"

    @property
    def references(self) -> int:
        """How many reference models answered, for each of which ``reference`` holds as many answers as ``counts``."""
        return 0 if self.reference is None else int(self.reference[0].sum()) // int(self.counts[0].sum())

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

    Of several the answers are added up: the statistic is linear, so what is subtracted from it then is the mean of theirs.

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
    return replace(responses, reference=torch.stack([one.counts for one in known]).sum(0))
