"""Suspects whose labels are translated: asks natural samples, estimates the map, and answers with classes of the task from then on.

What the map is, and why verdicts stay valid, is said in :mod:`~meadef_lightning.verification.labels`. A suspect that is wrapped here is
judged as any other; :func:`~meadef_lightning.verification.verify` writes the map into the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.verification.labels import MOST_LABELS, LabelMap, align_labels
from meadef_lightning.verification.remaining import as_probabilities
from meadef_lightning.verification.suspect import INVALID, Queryable, answered_labels


class RelabelledModule(nn.Module):
    """A model whose answers are translated; its state tells the map, so that a fingerprint covers it.

    Args:
        model: Maps samples to scores ``(B, labels)`` or labels ``(B,)``.
        labels: What its labels stand for.
    """

    def __init__(self, model: nn.Module, labels: LabelMap) -> None:
        super().__init__()
        self.model, self.translation = model, labels
        self.register_buffer("label_map", labels.classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Answers with classes of the task: scores ``(B, K)`` where :func:`_translated` can, or int64 of shape ``(B,)``."""
        return _translated(self.translation, self.model(x), x)


class RelabelledBlackBox:
    """The same for a black box.

    Args:
        black_box: Anything with ``query(x)``.
        labels: What its labels stand for.
    """

    def __init__(self, black_box: Queryable, labels: LabelMap) -> None:
        self.black_box, self.translation = black_box, labels

    def query(self, x: Tensor) -> Tensor:
        """Answers with classes of the task, as :class:`RelabelledModule`."""
        return _translated(self.translation, self.black_box.query(x), x)


def relabelled(
    suspect: nn.Module | Queryable,
    natural: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    batch_size: int = 512,
    per_class: int = 50,
    minimum_agreement: float = 0.5,
    device: torch.device | str | None = None,
) -> tuple[nn.Module | Queryable, LabelMap]:
    """Asks a suspect natural samples, and translates its labels from then on.

    Args:
        suspect: A module that maps samples to scores or labels, or a black box with ``query(x)``.
        natural: Natural samples ``(N, C, *spatial)`` and their true classes ``(N,)``.
        num_classes: Classes of the task.
        batch_size: Samples asked at once.
        per_class: Samples asked of each class, at most: the first ones. A service sees them before anything else, so they are few.
        minimum_agreement: See :func:`align_labels`.
        device: Where a module is asked; by default where it is.

    Returns:
        The suspect with classes of the task as answers, and the map.

    Raises:
        ValueError: If it gives no valid answers, or its labels cannot be told.
    """
    if per_class < 1 or batch_size < 1:
        raise ValueError(f"per_class={per_class} and batch_size={batch_size} must be at least 1.")
    x, truth = _first(*natural, per_class)
    answers, widths = [], set[int | None]()
    with _ready(suspect, device) as ask:
        for batch in torch.split(x, batch_size):
            answer = ask(batch)
            answers.append(_told(answer, len(batch)).cpu())
            widths.add(answer.shape[1] if answer.ndim == 2 else None)
    if len(widths) != 1:
        raise ValueError("The suspect answers some batches with other numbers of labels than others.")
    told = torch.cat(answers)
    if invalid := int((told == INVALID).sum()):
        raise ValueError(
            f"The suspect gave no valid answer (NaN, or a label that is none) to {invalid} of {len(told)} natural samples. Check its "
            "weights, and that it takes inputs normalised like this data."
        )
    labels = align_labels(told, truth, num_classes, num_labels=widths.pop(), minimum_agreement=minimum_agreement)
    if isinstance(suspect, nn.Module):
        return RelabelledModule(suspect, labels), labels
    return RelabelledBlackBox(suspect, labels), labels


def _first(x: Tensor, truth: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """The first samples of each class, in their order."""
    order = truth.argsort(stable=True)
    counts = torch.bincount(truth)
    place = torch.arange(len(truth)) - (counts.cumsum(0) - counts)[truth[order]]
    chosen = order[place < per_class].sort().values
    return x[chosen], truth[chosen]


def _translated(labels: LabelMap, answers: Any, x: Tensor) -> Tensor:
    """Translates answers; scores as such where every label stands for one class, and labels otherwise.

    Returns:
        Scores ``(B, classes)``, probabilities where several labels stand for a class (whether the suspect's scores are logits is then
        decided by this batch), or classes, int64 ``(B,)``, with ``INVALID`` where there is no valid answer.
    """
    told = _told(answers, len(x))
    stands_for = labels.classes.byte()
    if answers.ndim != 2 or answers.shape[1] != len(stands_for) or bool((stands_for.sum(1) != 1).any()):
        return labels(told, x)
    scores: Tensor = answers
    if bool((stands_for.sum(0) == 1).all()):
        return scores[:, stands_for.argmax(0).to(scores.device)]
    return as_probabilities(scores) @ stands_for.to(scores.device).float()


def _told(answers: Any, samples: int) -> Tensor:
    """The labels that a suspect answered, of whatever number."""
    wide = isinstance(answers, Tensor) and answers.ndim == 2
    return answered_labels(answers, samples, answers.shape[1] if wide else MOST_LABELS)


@contextmanager
def _ready(suspect: nn.Module | Queryable, device: torch.device | str | None) -> Iterator[Any]:
    """Asks a black box as it is, a module in eval mode, without gradients, and afterwards where and as it was."""
    if not isinstance(suspect, nn.Module):
        yield suspect.query
        return
    training = [module for module in suspect.modules() if module.training]
    like = next(iter(suspect.parameters()), None)
    home = torch.device("cpu") if like is None else like.device
    place = home if device is None else torch.device(device)
    try:
        suspect.eval().to(place)
        with torch.no_grad():
            yield lambda x: suspect(x.to(place))
    finally:
        suspect.to(home)
        for module in training:
            module.training = True
