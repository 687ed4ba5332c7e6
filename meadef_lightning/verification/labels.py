"""Which label of a suspect stands for which class of the task, estimated from its answers to natural samples.

A thief may number the classes in another order, or merge some, so that answers mean nothing to a key that names classes.

**Algorithm**

1. Ask natural samples and count how often each label was answered to each class.
2. Match labels and classes one to one so that as many answers as possible are right (an assignment problem, solved exactly);
   among equals the numbering as it is wins.
3. A class whose own label is hardly used (no label left for it, or one answered less than a twentieth as often as the class
   occurs) while most of its samples get one other label was *merged*: it joins the classes of that label.
4. A label that the suspect has beyond these stands for the class that it was answered to most often, and a label that was never
   answered, for any class.
5. If fewer than ``minimum_agreement`` of the natural answers are right then, nothing is claimed about labels: a refusal.

An answer with a merged label counts for one of its classes, drawn by a hash of the sample. So for a key whose target was merged
with ``m - 1`` other classes, success rates reach ``1 / m`` at most, and ``m - 1`` decoys are as good as the key. Worse, composites
of a class look like a watermark whose target was merged with it, to any model: judge such a suspect above a reference model, whose
classes are merged in the same way (:meth:`LabelMap.coarsening`). Keys whose target was not merged lose little.

**Why p-values stay valid.** The map is a function of the suspect and the natural samples; neither key, triggers nor decoys
enter. Suspect and map together are one more classifier, fixed before any composite was asked. If the suspect is
independent of the key, so is this classifier, and the key's rank among all keys is as uniform as it was. A wrong map costs
power, never the level.

**Evidence.** The map follows from the counts of step 1 alone, which tell nothing of a key. They are written down with it, so that who checks
the evidence derives it again (:meth:`LabelMap.from_dict`). A judge who asks with his own images counts anew.

**Pitfalls.** Do not choose between maps, or between a map and none, by the verdict that they lead to: decide before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from meadef_lightning.oracle.ledger import row_digests

MOST_LABELS: Final = 100_000
MOST_COUNTS: Final = 1 << 24
"""Labels times classes: evidence that needs more memory than this to be checked is none."""
_UNUSED = 0.05


@dataclass(frozen=True, eq=False)
class LabelMap:
    """What the labels of a suspect stand for. It tells nothing about a key, so it can be published.

    Args:
        classes: For each label the classes it stands for, bool, shape ``(labels, classes)``; at least one each.
        agreement: Share of the natural samples whose answer stands for their class, in ``[0, 1]``.
        samples: Number of natural samples.
        counts: How often each label was answered to each class, int64, shape ``(labels, classes)``: what the map was estimated from;
            ``None`` for one that was made otherwise.
    """

    classes: Tensor
    agreement: float
    samples: int
    counts: Tensor | None = None

    @property
    def merged(self) -> tuple[tuple[int, ...], ...]:
        """The classes of each label that stands for several, but not for any."""
        several = (self.classes.sum(dim=1) > 1) & ~self.classes.all(dim=1)
        return tuple(tuple(row.nonzero().flatten().tolist()) for row in self.classes[several])

    @property
    def kind(self) -> Literal["identity", "permutation", "merged"]:
        """Whether labels are the classes, the classes in another order, or fewer."""
        if self.merged:
            return "merged"
        known = ~self.classes.all(dim=1)
        same = torch.eye(*self.classes.shape, dtype=torch.bool)
        return "identity" if torch.equal(self.classes[known], same[known]) else "permutation"

    def __call__(self, labels: Tensor, x: Tensor) -> Tensor:
        """Turns labels into classes.

        Args:
            labels: The suspect's answers, int64, shape ``(B,)``; negative ones are none, and stay as they are. Labels beyond those
                known stand for any class.
            x: The samples they answer, shape ``(B, ...)``.

        Returns:
            Classes, int64, shape ``(B,)``, on the device of ``labels``; the same for the same samples.
        """
        device, labels = labels.device, labels.cpu()
        table = torch.cat([self.classes, torch.ones(1, self.classes.shape[1], dtype=torch.bool)])
        row = labels.clamp(0, len(table) - 1)
        members = (~table[row]).to(torch.uint8).argsort(dim=1, stable=True)  # the classes a label stands for come first
        counts = table.sum(dim=1)[row]
        draws = torch.zeros_like(labels)
        several = (counts > 1).nonzero().flatten()
        if len(several):
            digests = row_digests(x[several.to(x.device)])
            draws[several] = torch.tensor([int.from_bytes(digest[:7], "little") for digest in digests])
        classes = members.gather(1, (draws % counts)[:, None])[:, 0]
        return torch.where(labels < 0, labels, classes).to(device)

    def coarsening(self) -> LabelMap:
        """Returns what makes a model that knows all classes answer as vaguely as this suspect: merged classes become one of each other.

        The same sample is given the same class in both, where both mean the same label.
        """
        size = self.classes.shape[1]
        rows = torch.eye(size, dtype=torch.bool)
        for group in self.merged:
            members = torch.tensor(group)
            rows[members[:, None], members] = True
        return LabelMap(rows, self.agreement, self.samples)

    def describe(self) -> str:
        """What was found, in a sentence or two."""
        found = {
            "identity": "The suspect's labels are the classes as they are",
            "permutation": "The suspect numbers the classes in another order",
            "merged": f"The suspect answers some classes alike ({'; '.join(', '.join(map(str, group)) for group in self.merged)})",
        }[self.kind]
        text = f"{found}: {self.agreement:.1%} of {self.samples} natural answers are right that way."
        if self.kind == "merged":
            text += (
                " Such an answer counts for one of its classes, drawn at random: the accuracy, and the success rate of a key whose "
                "target is among them, come out that much lower, and such a key needs a reference model to stand out."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Returns the map as JSON values; of the counts, those above 0 as label, class and count."""
        counts = None
        if self.counts is not None:
            places = self.counts.nonzero()
            counts = torch.cat([places, self.counts[places[:, 0], places[:, 1]][:, None]], dim=1).tolist()
        return {
            "kind": self.kind,
            "classes": [row.nonzero().flatten().tolist() for row in self.classes],
            "agreement": self.agreement,
            "samples": self.samples,
            "counts": counts,
        }

    @classmethod
    def from_dict(cls, value: Any, num_classes: int) -> LabelMap:
        """Reads what :meth:`to_dict` returned, which may come from anybody, and derives the map again from its counts.

        Args:
            value: JSON values.
            num_classes: Classes of the task.

        Raises:
            ValueError: If it has another form, or the map does not follow from the counts; the message names the field.
        """
        names = {"kind", "classes", "agreement", "samples", "counts"}
        if not isinstance(value, Mapping) or value.keys() != names:
            raise ValueError(f"a map of labels has the fields {', '.join(sorted(names))}")
        labels, rows = len(value["classes"]) if isinstance(value["classes"], list) else 0, value["counts"]
        if not 1 <= labels <= MOST_LABELS or labels * num_classes > MOST_COUNTS:
            raise ValueError(f"classes must list the classes of 1 to {MOST_LABELS} labels")
        limits = (labels, num_classes, (1 << 30) + 1)
        if not isinstance(rows, list) or not rows or not all(_is_count(row, limits) for row in rows):
            raise ValueError(
                f"counts must be a list of label, class and count, with {labels} labels and {num_classes} classes"
            )
        counts = torch.zeros(labels, num_classes, dtype=torch.int64)
        label, answered, count = torch.tensor(rows, dtype=torch.int64).unbind(1)
        found = estimate(counts.index_put_((label, answered), count), sys.float_info.min)
        made = found.to_dict()
        if wrong := sorted(name for name in names if made[name] != value[name]):
            raise ValueError(f"the map does not follow from its counts. Fields that differ: {', '.join(wrong)}")
        return found


def _is_count(row: object, limits: tuple[int, int, int]) -> bool:
    """Whether a row is a label, a class and a count above 0."""
    return (
        isinstance(row, list)
        and len(row) == 3
        and all(type(number) is int and 0 <= number < limit for number, limit in zip(row, limits, strict=True))
        and row[2] > 0
    )


def align_labels(
    natural_answers: Tensor,
    natural_labels: Tensor,
    num_classes: int,
    *,
    num_labels: int | None = None,
    minimum_agreement: float = 0.5,
) -> LabelMap:
    """Estimates which label stands for which class, from natural samples only.

    Args:
        natural_answers: Labels that the suspect gave to natural samples, int64, shape ``(N,)``, not negative.
        natural_labels: Their true classes, int64, shape ``(N,)``, in ``[0, num_classes)``.
        num_classes: Classes of the task, ``K``.
        num_labels: Labels that the suspect has, if known: the width of its scores. By default ``K``, or as many as were answered.
        minimum_agreement: Share of right answers below which labels cannot be told, in ``(0, 1]``.

    Returns:
        The map.

    Raises:
        ValueError: If shapes or ranges are wrong, there are too many classes, the agreement is below the bound, or one label stands
            for all classes.
    """
    if not 0 < minimum_agreement <= 1:
        raise ValueError(f"minimum_agreement={minimum_agreement} must lie in (0, 1].")
    for name, values in (("natural_answers", natural_answers), ("natural_labels", natural_labels)):
        if values.ndim != 1 or values.dtype != torch.int64 or len(values) == 0 or len(values) != len(natural_labels):
            raise ValueError(
                f"{name} must be int64 of shape (N,), as many as natural_labels and at least one, got {values.dtype} of shape "
                f"{tuple(values.shape)}."
            )
    answers, truth = natural_answers.cpu(), natural_labels.cpu()
    if int(truth.min()) < 0 or int(truth.max()) >= num_classes:
        raise ValueError(f"natural_labels must lie in 0 to {num_classes - 1}.")
    labels = max(num_classes, int(answers.max()) + 1) if num_labels is None else num_labels
    if int(answers.min()) < 0 or not int(answers.max()) < labels <= MOST_LABELS:
        raise ValueError(
            f"natural_answers must lie in 0 to {min(labels, MOST_LABELS) - 1}, got {int(answers.min())} to "
            f"{int(answers.max())}. A suspect that gives no valid answer to natural samples cannot be judged."
        )
    if labels * num_classes > MOST_COUNTS:
        raise ValueError(
            f"{labels} labels and {num_classes} classes make too large a table to tell which stands for which, more than {MOST_COUNTS:.2g} "
            "entries. Give the suspect's numbering yourself: wrap it in a function that answers with classes of the task."
        )
    counts = torch.bincount(answers * num_classes + truth, minlength=labels * num_classes)
    return estimate(counts.reshape(labels, num_classes), minimum_agreement)


def estimate(counts: Tensor, minimum_agreement: float) -> LabelMap:
    """Estimates the map from counts; see the algorithm above.

    Args:
        counts: How often each label was answered to each class, int64, shape ``(labels, classes)``, at least one answer.
        minimum_agreement: As for :func:`align_labels`.

    Raises:
        ValueError: If the agreement is below the bound, or one label stands for all classes.
    """
    classes, samples = _matched(counts), int(counts.sum())
    agreement = float(counts[classes].sum()) / samples
    if bool((classes.all(dim=1) & (counts.sum(dim=1) > 0)).any()):
        raise ValueError(
            "The suspect answers natural samples of all classes with one label, which says nothing about a key. Check that it takes "
            "inputs like these (normalisation, size, channels)."
        )
    if agreement < minimum_agreement:
        raise ValueError(
            f"The suspect's labels cannot be told: matched as well as possible with the {counts.shape[1]} classes, {agreement:.1%} of its "
            f"{samples} natural answers are right, fewer than {minimum_agreement:.0%}. Check that it takes inputs like these "
            "(normalisation, size, channels), or name its labels yourself."
        )
    return LabelMap(classes, agreement, samples, counts)


def _matched(table: Tensor) -> Tensor:
    """The classes of each label, bool, from counts of answers, both ``(labels, classes)``."""
    labels, num_classes = table.shape
    # one count outweighs all that the diagonal adds, which decides among equals
    gain = table * (min(table.shape) + 1) + torch.eye(labels, num_classes, dtype=table.dtype)
    rows, columns = (torch.from_numpy(side) for side in linear_sum_assignment(gain.numpy(), maximize=True))
    classes = torch.zeros(labels, num_classes, dtype=torch.bool)
    classes[rows, columns] = True
    answered, occurs = table.sum(dim=1), table.sum(dim=0)
    use = torch.zeros(num_classes, dtype=table.dtype).index_put((columns,), answered[rows])
    best = table.argmax(dim=0)
    merged = (use < _UNUSED * occurs) & (2 * table.amax(dim=0) > occurs)
    classes[best[merged], merged.nonzero().flatten()] = True
    left = ~classes.any(dim=1)
    classes[left & (answered > 0), table.argmax(dim=1)[left & (answered > 0)]] = True
    classes[left & (answered == 0)] = True
    return classes
