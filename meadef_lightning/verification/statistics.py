"""The numbers behind a verdict: intervals, exact tests, and what answers of one model are worth. Nothing here touches a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

_TIE = 1e-9


def _count_of(successes: int, trials: int) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: needs trials >= 1 and 0 <= successes <= trials.")


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval of a share (Wilson 1927), two-sided, without continuity correction.

    Args:
        successes: Number of successes, in ``[0, trials]``.
        trials: Number of trials, at least 1.
        confidence: Coverage, in ``(0, 1)``.

    Raises:
        ValueError: If a number is out of range.
    """
    _count_of(successes, trials)
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    # where nothing (or everything) succeeded the bound is 0 (or 1) exactly, but rounding makes it 1e-17
    low = 0.0 if successes == 0 else float(interval.low)
    return low, 1.0 if successes == trials else float(interval.high)


def clopper_pearson_upper(successes: int, trials: int, confidence: float = 0.95) -> float:
    """Returns the exact one-sided upper bound of a share (Clopper & Pearson 1934).

    Zero successes in 200 trials still allow a rate of 1.49 %: this is what a threshold "never exceeded" is worth.

    Args:
        successes: Number of successes, in ``[0, trials]``.
        trials: Number of trials, at least 1.
        confidence: Coverage, in ``(0, 1)``.

    Raises:
        ValueError: If a number is out of range.
    """
    _count_of(successes, trials)
    return 1.0 if successes == trials else float(stats.beta.ppf(confidence, successes + 1, trials - successes))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Returns the exact one-sided p-value of McNemar's test that the first of two paired answers hits more often.

    Args:
        only_first: Pairs in which only the first answer hit, at least 0.
        only_second: Pairs in which only the second hit, at least 0.

    Returns:
        ``P(X >= only_first)`` for ``X ~ Binomial(only_first + only_second, 1/2)``; 1 without discordant pairs.

    Raises:
        ValueError: If a count is negative.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"Counts of discordant pairs must be at least 0, got {only_first} and {only_second}.")
    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(stats.binomtest(only_first, discordant, alternative="greater").pvalue)


def randomisation_p_value(true: float, decoys: ArrayLike) -> float:
    """Returns ``(1 + #{T_b >= T_0}) / (B + 1)``, the rank of the true key's statistic among its decoys'.

    Valid under "the suspect is independent of the key" whenever key and decoys are exchangeable: decoys drawn independently and
    uniformly from the space that the key was drawn from, or *all other* keys of that space (then it is the permutation test
    ``#{T_k >= T_0} / |K|``, the true key counting itself). Ties count against the key, and a tolerance of 1e-9 keeps rounding from
    breaking them. No assumption is made on how the answers of one model depend on each other.

    Args:
        true: Statistic of the true key.
        decoys: Statistics of the decoys, shape ``(B,)``, ``B >= 1``.

    Raises:
        ValueError: If there are no decoys, or a statistic is not finite.
    """
    values = np.asarray(decoys, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"Decoy statistics must have shape (B,) with B >= 1, got {values.shape}.")
    if not (np.isfinite(values).all() and np.isfinite(true)):
        raise ValueError("A statistic is NaN or infinite; the suspect's answers cannot be ranked.")
    return (1 + int((values >= true - _TIE).sum())) / (values.size + 1)


def conformal_p_value(statistic: float, null_statistics: ArrayLike) -> float:
    """Returns the conformal rank of a suspect among independently trained models, ``(1 + #{T_j >= T}) / (m + 1)``.

    Valid when the suspect, were it independent, would be exchangeable with those models (same task, data source, training).

    Args:
        statistic: The suspect's statistic under the key.
        null_statistics: Statistics of ``m >= 1`` independent models under the *same* key.

    Raises:
        ValueError: If there are no null statistics, or one is not finite.
    """
    if np.size(np.asarray(null_statistics)) == 0:
        raise ValueError("The conformal p-value needs the statistic of at least one independent model, got none.")
    return randomisation_p_value(statistic, null_statistics)


def intraclass_correlation(successes: ArrayLike, trials: int) -> float:
    """Estimates by moments how strongly answers within one cell go together (beta-binomial ρ, one-way ANOVA form).

    The variance of a cell's share is ``p(1-p)/n · [1 + (n-1)ρ]``; the observed variance over cells is solved for ρ.

    Args:
        successes: Hits of each cell, shape ``(C,)``, ``C >= 2``, each in ``[0, trials]``.
        trials: Answers in each cell, ``n >= 2``.

    Returns:
        ρ clipped to ``[0, 1]``; 0 where no cell, or every answer, hit, because then nothing varies.

    Raises:
        ValueError: If there are too few cells or trials, or a count is out of range.
    """
    hits = np.asarray(successes, dtype=np.float64)
    if hits.ndim != 1 or hits.size < 2 or trials < 2 or hits.min() < 0 or hits.max() > trials:
        raise ValueError(
            f"The correlation needs at least two cells of at least two answers, and hits between 0 and {trials}; "
            f"got {hits.shape} cells."
        )
    return correlation_of_sums(hits.size, float(hits.sum()), float((hits * hits).sum()), trials)


def correlation_of_sums(cells: int, hits: float, squares: float, trials: int) -> float:
    """Returns :func:`intraclass_correlation` from the sums of the cells' hits and of their squares."""
    share = hits / cells / trials
    if share in (0.0, 1.0):
        return 0.0
    inflation = (squares - hits * hits / cells) / (cells - 1) / (trials * share * (1 - share))
    return min(max((inflation - 1) / (trials - 1), 0.0), 1.0)


def effective_sample_size(n: int, rho: float) -> float:
    """Returns how many independent answers ``n`` answers of one model are worth: ``n / (1 + (n-1)ρ)``.

    Args:
        n: Answers, at least 1.
        rho: Correlation within the model, in ``[0, 1]``.

    Raises:
        ValueError: If an argument is out of range.
    """
    if n < 1 or not 0 <= rho <= 1:
        raise ValueError(f"The effective sample size needs n >= 1 and 0 <= rho <= 1, got n={n}, rho={rho}.")
    return n / (1 + (n - 1) * rho)


def summary(values: Sequence[float] | Tensor | NDArray[Any]) -> dict[str, float]:
    """Returns mean, standard deviation, median, 95 % and 99 % quantile and maximum of ``values``, shape ``(B,)``."""
    array = np.asarray(values, dtype=np.float64)
    median, q95, q99 = np.quantile(array, [0.5, 0.95, 0.99])
    return {
        "mean": float(array.mean()),
        "std": float(array.std()),
        "median": float(median),
        "q95": float(q95),
        "q99": float(q99),
        "max": float(array.max()),
    }
