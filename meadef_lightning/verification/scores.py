"""The statistic of every key at once: how much the suspect prefers a key, weighed with the keys beside it.

**Source.** A matched filter: the weight of every cell follows what a watermark looks like in a whole table of answers.

**Why not the key's own cell alone.** A stolen watermark is no needle. Whoever answers composites of (a, b) with t also answers some
composites of (a, b') and of (a', b) with t, since each half alone pulls towards t, and composites of (b, a), which are those of (a, b) seen the
other way round. Single cells are noisy and, in a hard or leaky theft, a few unrelated ones reach higher by chance; a whole row, a whole
column and the reversed pair that lean towards one target do not.

**Algorithm.** ``R[a,b,c,t]`` is how far composites of (a, b) in way c lean to t: the mean share of answers t, or, where the suspect gives
probabilities, of t in what they leave beside both sources (:mod:`~meadef_lightning.verification.remaining`). With reference models it is the
excess above theirs (:func:`above_references`).

1. own: ``d[a,b,c,t] = R[a,b,c,t] - G[c,t]``, where ``G`` is the mean over all asked source pairs without t: what way c does to any sources,
   e.g. in a suspect that answers t far too often;
2. ``M[a,b,c,t] = R[a,b,c,t] - (G[c,t] + mean over c' ≠ c of R[a,b,c',t]) / 2``: above what the way does to any sources and what other ways
   do to these. Row: the sum of ``M`` over the asked pairs (a, b'), ``b' ≠ b``, divided by their number, but by 8 at least; column: the same
   over (a', b). Few neighbours say little;
3. reversed: the mean over c' ≠ c of ``d[b,a,c',t]``, or 0 where (b, a) was not asked. A victim learns to answer the *key's* sources in other
   ways as it should (``L_eva``), not the reversed ones;
4. ``T = (own + 2·row + 2·column + 2·reversed) / 7``.

**Validity.** T is a function of a key and a table which does not depend on which key is the true one, so a rank among all keys stays
an exact randomisation p-value. With drawn decoys the asked pairs are those of all compared keys alike, so these stay exchangeable.

**Defaults.** The form was found by linear discriminants on stored tables of classifiers and encoders, each fitted on other keys than it was tried
on, and then rounded; weights of 1 and 2 serve alike. See :mod:`~meadef_lightning.verification.responses` for what it finds.

**Pitfalls.** With three classes keys have no rows and columns. Equal statistics may differ in the last digits here; the rank forgives 1e-9.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR_REFERENCES = 4.0
"""How many references' worth of trust the usual variance has, beside a cell's own variance among the references."""
NEIGHBOUR_WEIGHT = 2.0
"""Weight of the row, of the column, and of the reversed pair of a key in comparison with its own cell."""
FEW_NEIGHBOURS = 8
"""Fewer neighbours than these weigh accordingly less."""


def possible_targets(pairs: Tensor, classes: int | Tensor) -> Tensor:
    """Marks the classes that are no source of a pair, bool, shape ``(pairs, classes)``: a key's target is one of them.

    Args:
        pairs: Classes of the first and second source, int64, shape ``(pairs, 2)``.
        classes: How many classes there are, or which of them are looked at, int64 ``(K,)``.
    """
    columns = torch.arange(classes) if isinstance(classes, int) else classes
    return (columns != pairs[:, :1]) & (columns != pairs[:, 1:])


def reversed_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the row of (b, a) for each pair (a, b).

    Args:
        pairs: Sorted by first and second source, int64, shape ``(pairs, 2)``, each pair once.

    Returns:
        Rows, int64 ``(pairs,)``, and whether each is there, bool; where it is not, the row means nothing.
    """
    size = int(pairs.max()) + 1
    codes, wanted = pairs[:, 0] * size + pairs[:, 1], pairs[:, 1] * size + pairs[:, 0]
    rows = torch.searchsorted(codes, wanted).clamp_max(len(pairs) - 1)
    return rows, codes[rows] == wanted


def key_scores(table: Tensor, pairs: Tensor, weight: float = NEIGHBOUR_WEIGHT, classes: Tensor | None = None) -> Tensor:
    """Computes the statistic of every key of the asked source pairs; see the algorithm above.

    Args:
        table: ``R``, ``[i, c, t]`` for pair i, way c and class t; float64, shape ``(pairs, ways, K)``, ``ways >= 2``. A key's statistic
            needs the column of its target only.
        pairs: Classes of the first and second source, int64, shape ``(pairs, 2)``, each pair once, sorted.
        weight: Weight of row, column and reversed pair each, at least 0; 0 looks at the key's own cell alone.
        classes: Classes of the columns, int64 ``(K,)``; by default 0, 1, …

    Returns:
        T, float64, shape ``(pairs, ways, K)``; it means nothing where the class is one of the pair's sources. A table in
        ``[0, 1]`` gives values in ``[-1, 1]``.
    """
    _, ways, columns = table.shape
    valid = possible_targets(pairs, columns if classes is None else classes)[:, None, :].to(table.dtype)
    table = table * valid

    def other_ways(values: Tensor) -> Tensor:
        return (values.sum(1, keepdim=True) - values) / (ways - 1)

    own = (table - table.sum(0) / valid.sum(0).clamp_min(1)) * valid
    beside = (own + table - other_ways(table)) / 2

    def neighbours(source: Tensor) -> Tensor:
        """Averages ``M`` over the other pairs that have the same class in this place."""
        # rows for the sources that occur only: of a million classes a thousand do
        names, row = torch.unique(source, return_inverse=True)
        total = table.new_zeros(len(names), ways, columns).index_add_(0, row, beside)[row] - beside
        count = table.new_zeros(len(names), 1, columns).index_add_(0, row, valid)[row] - 1
        return total / count.clamp_min(FEW_NEIGHBOURS)

    rows, there = reversed_pairs(pairs)
    reverse = other_ways(own)[rows] * there[:, None, None]
    return (own + weight * (neighbours(pairs[:, 0]) + neighbours(pairs[:, 1]) + reverse)) / (1 + 3 * weight)


def usual_variance(known: Tensor, pairs: Tensor, classes: Tensor | None = None) -> Tensor:
    """How much reference models differ on a cell, usually: the mean over all keys of the variance among them.

    Args:
        known: Tables of N references, float64, shape ``(N, pairs, ways, K)``, ``N >= 2``.
        pairs: As in :func:`key_scores`, like the next.
        classes: Classes of the columns.

    Returns:
        A scalar, float64.
    """
    valid = possible_targets(pairs, known.shape[-1] if classes is None else classes)[:, None, :]
    variance = known.var(0) * valid
    return variance.sum() / (valid.sum() * known.shape[2]).clamp_min(1)


def above_references(own: Tensor, known: Tensor, usual: Tensor | None = None) -> Tensor:
    """Compares a suspect's table with those of models without the key.

    **Source.** The moderated t-statistic of Smyth, "Linear models and empirical Bayes methods for assessing differential expression in
    microarray experiments" (2004, §3): a cell's variance among N references, of which there are always few, is drawn towards the usual one.

    **Algorithm.** ``excess = own − mean of the references``. With one reference that is all. With several, let ``v`` be a cell's variance
    among them and ``u`` the usual one: ``excess · sqrt(u / w)``, ``w = (4·u + (N − 1)·v) / (4 + N − 1)``. Composites of some
    classes are a matter of taste, answered now so and now so by models that never saw the key; such cells must stand out further to count.

    **Validity.** The same function of every cell, so a rank of keys stays exact.

    Args:
        own: The suspect's table, float64, any shape.
        known: The references' tables, float64, shape ``(N, *own.shape)``, ``N >= 1``.
        usual: :func:`usual_variance` of all keys; by default the mean over these tables.

    Returns:
        Float64, in the shape of ``own``, and on its scale.
    """
    excess, degrees = own - known.mean(0), len(known) - 1
    if degrees == 0:
        return excess
    variance = known.var(0)
    usual = variance.mean() if usual is None else usual
    moderated = (PRIOR_REFERENCES * usual + degrees * variance) / (PRIOR_REFERENCES + degrees)
    # references that agree on every cell leave nothing to weigh
    return excess * torch.where(usual > 0, usual / moderated, 1.0).sqrt()
