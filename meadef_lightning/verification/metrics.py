"""What is measured on a suspect, as torchmetrics: they accumulate over batches and reduce over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def as_labels(answers: Tensor) -> Tensor:
    """Turns answers into class labels.

    Args:
        answers: Logits or probabilities, floating point of shape ``(B, K)``, or labels, integers of shape ``(B,)``.

    Returns:
        Labels, int64, shape ``(B,)``.

    Raises:
        ValueError: If the answers have another form.
    """
    if answers.ndim == 2 and answers.is_floating_point():
        return answers.argmax(dim=1)
    if answers.ndim == 1 and not (answers.is_floating_point() or answers.is_complex() or answers.dtype == torch.bool):
        return answers.long()
    raise ValueError(
        "Answers are logits or probabilities of shape (B, K), or integer labels of shape (B,); "
        f"got {answers.dtype} of shape {tuple(answers.shape)}."
    )


class _Share(Metric):
    """Share of hits among all answers; subclasses define what a hit is."""

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool | None = None
    hits: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def _count(self, hit: Tensor) -> None:
        self.hits += hit.sum()
        self.total += hit.numel()

    def compute(self) -> Tensor:
        """Returns the share, a float scalar in ``[0, 1]``; NaN before the first update."""
        return self.hits.float() / self.total


class WatermarkSuccessRate(_Share):
    """WSR: share of the answers to watermark samples that equal the key's target class (S&P 2024, §V-A).

    Args:
        target: The key's target class. It is part of the secret: do not log the metric's arguments.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> wsr = WatermarkSuccessRate(target=2)
        >>> wsr.update(torch.tensor([2, 2, 0, 2]))
        >>> wsr.update(torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]))
        >>> round(wsr.compute().item(), 3)
        0.667
    """

    higher_is_better = True

    def __init__(self, target: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.target = target

    def update(self, answers: Tensor) -> None:
        """Counts a batch of answers, ``(B, K)`` scores or ``(B,)`` labels; see :func:`as_labels` for errors."""
        self._count(as_labels(answers) == self.target)


class FalsePositiveRate(WatermarkSuccessRate):
    """WFPR: the same share on *control* samples, the key's sources combined in ways that are not the key's.

    Args:
        target: The key's target class.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> wfpr = FalsePositiveRate(target=2)
        >>> wfpr(torch.tensor([0, 1, 0, 2])).item()
        0.25
    """

    higher_is_better = False


class Fidelity(_Share):
    """Agreement of a suspect with the victim: share of samples that both answer with the same class.

    Args:
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> fidelity = Fidelity()
        >>> fidelity(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0])).item()
        0.5
    """

    higher_is_better = True

    def update(self, suspect: Tensor, victim: Tensor) -> None:
        """Counts a batch.

        Args:
            suspect: Answers of the suspect, ``(B, K)`` scores or ``(B,)`` labels.
            victim: Answers of the victim on the same samples, in either form.

        Raises:
            ValueError: If the forms are wrong or the numbers of answers differ.
        """
        first, second = as_labels(suspect), as_labels(victim)
        if first.shape != second.shape:
            raise ValueError(f"Fidelity compares answers on the same samples, got {len(first)} and {len(second)}.")
        self._count(first == second)
