"""How many samples and decoys: the power of a verification, stated before anything is asked.

**Algorithm.** A verdict needs two tests at ``alpha`` (:func:`~meadef_lightning.verification.verdict.judge`).

1. *McNemar*: of n matched pairs a pair is discordant with probability ``q = wsr·(1 - wfpr) + wfpr·(1 - wsr)``, and then falls to the
   trigger with ``wsr·(1 - wfpr) / q``. The power is the exact double binomial sum. Answers of one model that go together, with
   correlation ``rho``, count as ``n / (1 + (n - 1)·rho)`` pairs.
2. *Decoys*: let a share ``rivals`` of the key space score at least as high as the true key. Of B drawn decoys a Binomial(B, rivals)
   number does, and the test rejects where at most ``alpha·(B + 1) - 1`` do. Among all keys of a space the number is fixed.

Whatever the two have to do with each other, both reject with probability at least ``1 - (miss of the one) - (miss of the other)``.

**Defaults.** ``rivals=0.0005`` means three of 5,760 keys. Of 61 thefts with WSR > 50 % of digits and Fashion-MNIST, above a reference
model, 35 had no rival and 52 had three at most. For a task of your own, use what its demos show: ``decoy_p`` less ``smallest_p``.

**Pitfalls.** Stated power is as good as the assumed effect. It says nothing about thefts that carry less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from meadef_lightning.verification.decoys import MAX_DECOYS
from meadef_lightning.verification.statistics import effective_sample_size

_MAX_SAMPLES = 1 << 15


@dataclass(frozen=True)
class Power:
    """How likely a verification reaches its level, under an assumed effect.

    Args:
        mcnemar: Probability that McNemar's test rejects.
        decoys: Probability that the decoy-key test rejects.
        both: Lower bound of the probability that both do, whatever they have to do with each other.
        smallest_mcnemar_p: Smallest p-value that so many samples can give.
        smallest_decoy_p: Smallest p-value that so many decoys can give.
    """

    mcnemar: float
    decoys: float
    both: float
    smallest_mcnemar_p: float
    smallest_decoy_p: float


def _share(name: str, value: float, open_end: bool = False) -> None:
    if not (0 < value < 1 if open_end else 0 <= value <= 1):
        raise ValueError(f"{name}={value} must lie {'strictly between 0 and 1' if open_end else 'in [0, 1]'}.")


def mcnemar_power(wsr: float, wfpr: float, samples: int, alpha: float = 1e-3, rho: float = 0.0) -> float:
    """Returns the probability that the exact one-sided McNemar test rejects at ``alpha``.

    Args:
        wsr: Assumed rate at which triggers are answered with the target, in ``[0, 1]``.
        wfpr: Assumed rate of the matched controls, in ``[0, 1]``.
        samples: Pairs of a trigger and its control, at least 1.
        alpha: Level, in ``(0, 1)``.
        rho: Correlation of answers within the model, in ``[0, 1]``.

    Raises:
        ValueError: If a number is out of range.
    """
    _share("wsr", wsr)
    _share("wfpr", wfpr)
    _share("alpha", alpha, open_end=True)
    pairs = max(int(effective_sample_size(samples, rho)), 1)
    first, second = wsr * (1 - wfpr), wfpr * (1 - wsr)
    if first + second == 0:
        return 0.0
    discordant = np.arange(1, pairs + 1)
    # with so many discordant pairs more than this number of them must fall to the trigger
    critical = stats.binom.isf(alpha, discordant, 0.5)
    rejected = stats.binom.sf(critical, discordant, first / (first + second))
    return min(float((stats.binom.pmf(discordant, pairs, min(first + second, 1.0)) * rejected).sum()), 1.0)


def decoy_power(rivals: float, decoys: int, alpha: float = 1e-3, space: int | None = None) -> float:
    """Returns the probability that the decoy-key test rejects at ``alpha``.

    Args:
        rivals: Share of the other keys that score at least as high as the true one, in ``[0, 1]``.
        decoys: Keys to compare with, at least 1.
        alpha: Level, in ``(0, 1)``.
        space: Size of the key space. Where ``decoys`` reaches it, all its keys are compared; ``None`` takes it for larger.

    Raises:
        ValueError: If a number is out of range.
    """
    _share("rivals", rivals)
    _share("alpha", alpha, open_end=True)
    if decoys < 1:
        raise ValueError(f"decoys={decoys} must be at least 1.")
    if space is not None and decoys >= space:
        return float(1 + round(rivals * (space - 1)) <= alpha * space + 1e-9)
    return float(stats.binom.cdf(np.floor(alpha * (decoys + 1) + 1e-9) - 1, decoys, rivals))


def power(
    wsr: float,
    wfpr: float = 0.1,
    samples: int = 512,
    decoys: int = 9999,
    *,
    alpha: float = 1e-3,
    rivals: float = 5e-4,
    rho: float = 0.0,
    space: int | None = None,
) -> Power:
    """States the power of a verification; see :func:`mcnemar_power` and :func:`decoy_power` for the arguments.

    Raises:
        ValueError: If a number is out of range.
    """
    compared = decoys + 1 if space is None else min(decoys + 1, space)
    first, second = mcnemar_power(wsr, wfpr, samples, alpha, rho), decoy_power(rivals, decoys, alpha, space)
    return Power(first, second, max(first + second - 1, 0.0), 0.5**samples, 1 / compared)


def smallest_plan(
    wsr: float, wfpr: float = 0.1, *, alpha: float = 1e-3, rivals: float = 5e-4, rho: float = 0.0, target: float = 0.9
) -> tuple[int, int]:
    """Finds how many samples and drawn decoys a verification needs, each missing in half of what ``target`` leaves.

    Args:
        wsr: See :func:`mcnemar_power`, as the next two.
        wfpr: Assumed rate of the matched controls.
        alpha: Level.
        rivals: See :func:`decoy_power`.
        rho: Correlation of answers within the model.
        target: Wanted probability of a *supported* verdict, in ``(0, 1)``.

    Returns:
        Samples (one less does not suffice) and decoys (no fewer do).

    Raises:
        ValueError: If a number is out of range, or no number of samples or decoys suffices for such an effect.
    """
    _share("target", target, open_end=True)
    each = 1 - (1 - target) / 2

    enough = 1
    while mcnemar_power(wsr, wfpr, enough, alpha, rho) < each:
        if enough >= _MAX_SAMPLES:
            raise ValueError(
                f"{_MAX_SAMPLES} samples do not reach alpha={alpha:g} with power {each:g} at wsr={wsr}, wfpr={wfpr}, rho={rho}: the "
                "effect is too small, or the answers of one model are worth too few independent ones."
            )
        enough *= 2
    samples = next(n for n in range(enough // 2 + 1, enough + 1) if mcnemar_power(wsr, wfpr, n, alpha, rho) >= each)

    _share("rivals", rivals)
    allowed = np.arange(
        1, max(int(alpha * MAX_DECOYS), 1) + 1
    )  # keys that may reach the true one's score, itself included
    numbers = np.ceil(allowed / alpha - 1e-9).astype(np.int64) - 1
    fits = (numbers <= MAX_DECOYS) & (stats.binom.cdf(allowed - 1, numbers, rivals) >= each)
    if not fits.any():
        raise ValueError(
            f"No number of decoys up to {MAX_DECOYS} reaches alpha={alpha:g} where a share rivals={rivals:g} of the keys scores as high "
            "as the true one. Combine several keys, or use a key from a larger space."
        )
    return samples, max(int(numbers[fits.argmax()]), 1)
