"""Balanced distillation: distil again, from answers in which no class leans to another more than that one leans back.

**Source.** Ours, made for this package's own recipe by its authors: the thief's answer to :mod:`meadef_lightning.watermark.tilt`, for which
:mod:`meadef_lightning.detection.answer_lean` is the search.

**Algorithm.** 1. Ask the model about the thief's images, once. 2. For classes ``a`` and ``t``, sort what images of ``a`` give to ``t``, and cap
each at the same quantile of what images of ``t`` give to ``a``; the class ``a`` gets what is cut off. 3. Train a network with new weights on these
answers, as in :mod:`meadef_lightning.removal.distil_again`.

**Cost.** That of a second distillation; no query. With ``classes: "true"``, the true label of every image, with which the thief could also do
without the model; with ``"answered"`` nothing more.

**Defaults.** The true classes, the stronger attack; else as in the second distillation.

**Pitfalls.** What a thief caps is also what makes soft answers worth more than labels, so accuracy may fall. He needs no key: all pairs of
classes are balanced. By answered classes, images that are tilted so far that they change sides are not seen as leaning. It does nothing to
a lean that goes both ways.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

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


Classes = Literal["true", "answered"]


class BalancedDistillation(DistilAgain):
    """Trains a fresh network on balanced answers; see the module's documentation.

    Args:
        classes: Between which classes answers are balanced: the images' true ones, or those that the model answers.
        **options: The arguments of `DistilAgain`, but for ``answers``, which are soft.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    def __init__(self, classes: Classes = "true", **options: Any) -> None:
        if classes not in get_args(Classes):
            raise ValueError(f"classes={classes!r} must be one of {get_args(Classes)}.")
        if options.get("answers", "soft") != "soft":
            raise ValueError(
                f"answers={options['answers']!r} cannot be balanced: labels lean to nothing. Use soft ones."
            )
        super().__init__(**options)
        self.classes = classes

    @override
    def _answers(self, model: nn.Module, data: ThiefData) -> Tensor:
        answers = logits_of(model, data.x).float().softmax(dim=-1)
        return balance(answers, data.y.to(answers.device) if self.classes == "true" else answers.argmax(dim=-1))
