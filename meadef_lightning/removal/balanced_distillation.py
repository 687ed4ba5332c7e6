"""Balanced distillation: distil again, from answers in which no class leans to another more than that one leans back.

**Source.** Ours, made for this package's own recipe by its authors: the thief's answer to :mod:`meadef_lightning.watermark.tilt`, for which
:mod:`meadef_lightning.detection.answer_lean` is the search.

**Algorithm.** 1. Ask the model about the thief's images, once. 2. For classes ``a`` and ``t``, sort what images of ``a`` give to ``t``, and cap
each at the same quantile of what images of ``t`` give to ``a``; the class ``a`` gets what is cut off. 3. Train a network with new weights on these
answers, as in :mod:`meadef_lightning.removal.distil_again`.

**Cost.** That of a second distillation, and true labels of the thief's images; no query.

**Defaults.** As in the second distillation.

**Pitfalls.** What a thief caps is also what makes soft answers worth more than labels, so accuracy may fall. He needs no key: all pairs of
classes are balanced. It does nothing to a lean that goes both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import logits_of
from meadef_lightning.removal.distil_again import DistilAgain


def balance(probabilities: Tensor, y: Tensor) -> Tensor:
    """Caps what each class gives to another at what that one gives back, quantile by quantile.

    Args:
        probabilities: Answers to natural images, float ``(N, K)``, rows summing to 1.
        y: Their classes, int64 ``(N,)``.

    Returns:
        Answers of the same shape; rows sum to 1. Classes without images balance nothing.
    """
    balanced = probabilities.clone()
    rows = [(y == label).nonzero().flatten() for label in range(probabilities.shape[1])]
    for a, mine in enumerate(rows):
        for t, theirs in enumerate(rows):
            if a == t or not len(mine) or not len(theirs):
                continue
            given = probabilities[mine, t]
            rank = given.argsort().argsort() / max(len(mine) - 1, 1)
            balanced[mine, t] = torch.minimum(given, torch.quantile(probabilities[theirs, a], rank.to(given)))
        cut = 1 - balanced[mine].sum(dim=1)
        balanced[mine, a] += cut
    return balanced


class BalancedDistillation(DistilAgain):
    """Trains a fresh network on balanced answers; see the module's documentation. Takes `DistilAgain`'s arguments, soft answers only."""

    @override
    def _answers(self, model: nn.Module, data: ThiefData) -> Tensor:
        if self.answers != "soft":
            raise ValueError(
                f"answers={self.answers!r} cannot be balanced: labels lean to nothing. Use answers='soft'."
            )
        return balance(logits_of(model, data.x).float().softmax(dim=-1), data.y.to(data.x.device))
