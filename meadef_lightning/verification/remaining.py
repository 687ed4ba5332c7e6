"""What probabilities say of a composite beside its two sources: the share of each other class in what these leave.

**Why.** A composite of (a, b) is mostly answered with a or b, by any model. A thief that learnt little of a watermark still answers so, with
the key's target as a distant third: too weak for a label, yet there. How much the sources compete hides it; of the rest, the target's part
does not depend on that.

**Algorithm.** ``q_t = (p_t + 1e-4) / Σ over all classes s that are no source of (p_s + 1e-4)``. The floor says that a rest of nothing is worth nothing:
a suspect that is entirely sure gives every class the same part. Kept in whole thousandths, rounded down, so that sums do not depend on the
order of batches or processes, and evidence holds whole numbers. A part that is a whole number but for the last digits of its sum (an eighth, say,
of a sure suspect) is that number.

**Labels.** A suspect that answers classes only is judged by the shares of its answers; there is no rest. So is one with three classes, where a
single one is left beside two sources.

**Pitfalls.** A thief who scrambles what his service leaves beside the best class takes this away, and only this: wrap his model so that it answers with
its best class, and it is judged by labels. Decide before it is asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 1000
"""A share of 1, in the whole numbers that are kept."""
MAJORITY = UNIT // 2
"""A composite counts as answered with a class that takes more of the rest than this."""
FLOOR = 1e-4
_MOST = 1.5
"""What a row of probabilities sums to at most where they were rounded, each by itself, or have few digits (bfloat16)."""
_LAST_DIGITS = 1e-7


def can_be_probabilities(scores: Tensor) -> Tensor:
    """Says whether scores can be probabilities: all are in ``[0, 1]``, and every row sums to 1.5 at most.

    Top-k answers leave something out of the sum, and rounded ones may add something.

    Args:
        scores: Floating point, shape ``(B, K)``.

    Returns:
        Bool, without dimensions, on the scores' device. Few rows say little: ask of everything that a suspect answered.
    """
    scores = _finite(scores)
    return ((scores >= 0) & (scores <= 1)).all() & (scores.sum(1) <= _MOST).all()


def readings(scores: Tensor) -> Tensor:
    """Reads scores both ways, as probabilities and as logits.

    Args:
        scores: Floating point, shape ``(B, K)``. Rows with NaN give NaN.

    Returns:
        Float32, shape ``(2, B, K)``: the scores themselves, cut off at 0 and 1, and their softmax.
    """
    scores = _finite(scores)
    return torch.stack([scores.clamp(0, 1), scores.softmax(1)])


def as_probabilities(scores: Tensor) -> Tensor:
    """Turns scores into probabilities: those that cannot be any are taken for logits; shapes as in :func:`readings`."""
    as_they_are, softmax = readings(scores)
    return torch.where(can_be_probabilities(scores), as_they_are, softmax)


def _finite(scores: Tensor) -> Tensor:
    # an infinite logit (16-bit ones end at 65,504) is a sure answer, not NaN
    return scores.float().clamp(max=torch.finfo(torch.float32).max)


def remaining_shares(probabilities: Tensor, sources: Tensor) -> Tensor:
    """Returns the part of each class in what the sources leave; see the algorithm above.

    Args:
        probabilities: Answers to composites, shape ``(B, K)``, finite, in ``[0, 1]``.
        sources: Classes of both sources of each, int64, shape ``(B, 2)``.

    Returns:
        Thousandths, int64, shape ``(B, K)``; 0 for the sources. A row sums to 1,000 at most.
    """
    rest = (probabilities.double() + FLOOR).scatter(1, sources, 0.0)
    return (UNIT * rest / rest.sum(1, keepdim=True) + _LAST_DIGITS).floor().long()
