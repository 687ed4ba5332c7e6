"""Several keys, several suspects: one valid answer from many p-values.

**Source.** Fisher (1932) for one suspect and independent keys; Holm (1979) for many questions at once.

**Several keys against one suspect.** An owner may embed R keys, each drawn on its own. Given the suspect, their decoy-key p-values
are independent, provided that each key has decoys of its own: either all other keys of the space, or a draw, which
:class:`~meadef_lightning.verification.decoys.DecoyTable` seeds with the key's salt. Each takes finitely many values and is no
smaller, stochastically, than a uniform number, so Fisher's product is valid, if a little conservative. The bare product of p-values
is *not* a p-value. With two keys the reach grows from 1/5,760 to 5·10⁻⁷.

**Many questions.** Who asks M suspects about K keys gets M·K chances of a coincidence. Holm's adjusted p-values keep the probability
of *any* false claim below alpha, however the questions depend on one another. (Who tried G secrets before one suited needs ``G·p``.)

**Pitfalls.** Combine the keys that were committed to, all of them: choosing those that fired is grinding again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from meadef_lightning.verification.responses import Responses
from meadef_lightning.verification.verdict import Decision, Verdict, at_most, judge
from meadef_lightning.watermark.key import WatermarkKey

_LEANING = 0.01


def _p_values(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not ((array > 0) & (array <= 1)).all():
        raise ValueError(
            f"p-values must lie in (0, 1] and there must be at least one, got {array.size} from "
            f"{array.min() if array.size else 'nothing'} to {array.max() if array.size else 'nothing'}."
        )
    return array


def combine_fisher(p_values: ArrayLike) -> float:
    """Combines independent p-values of one suspect under several keys: Fisher's method.

    Args:
        p_values: Numbers in ``(0, 1]``, shape ``(R,)``, ``R >= 1``. Independent, each at most as likely to be below u as u says; the
            discrete ones of a randomisation test are.

    Returns:
        ``P(chi² with 2R degrees of freedom >= -2·Σ ln p)``; with one p-value, that one.

    Raises:
        ValueError: If one is not in ``(0, 1]``, or there is none.
    """
    return float(stats.combine_pvalues(_p_values(p_values).ravel(), method="fisher").pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjusts p-values for their number (Holm 1979): reject those at or below alpha, and any false claim has probability <= alpha.

    Args:
        p_values: Numbers in ``(0, 1]``, any shape, e.g. ``(suspects, keys)``. They may depend on one another.

    Returns:
        Adjusted p-values, float64, same shape, in the same order of size as the given ones.

    Raises:
        ValueError: If one is not in ``(0, 1]``, or there is none.
    """
    array = _p_values(p_values)
    order = array.argsort(axis=None, kind="stable")
    stepped = array.ravel()[order] * np.arange(array.size, 0, -1)
    adjusted = np.empty(array.size)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted.reshape(array.shape)


@dataclass(frozen=True)
class JointVerdict:
    """The judgement of one suspect under several keys. Like :class:`Verdict` it names neither class nor combining way.

    Args:
        verdict: ``"supported"``, ``"inconclusive"`` or ``"not supported"``: is the suspect a copy of the model with these keys?
        reason: Why, in one sentence.
        notes: What the p-values assume.
        alpha: The pre-registered level.
        decoy_p: Fisher's combination of the keys' decoy p-values.
        mcnemar_p: The same of their McNemar p-values.
        smallest_p: The smallest ``decoy_p`` that could have come out.
        exact: Whether every key was drawn uniformly from the space it was compared with.
        adjusted_p: Each key's decoy p-value, adjusted for their number by Holm: which keys does the suspect carry?
        verdicts: The verdict under each key alone.
    """

    verdict: Decision
    reason: str
    notes: tuple[str, ...]
    alpha: float
    decoy_p: float
    mcnemar_p: float
    smallest_p: float
    exact: bool
    adjusted_p: tuple[float, ...]
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON values."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return value


def judge_keys(cases: Sequence[tuple[Responses, WatermarkKey]], alpha: float = 1e-3) -> JointVerdict:
    """Judges one suspect by its answers to the questions of several keys.

    As with one key, both tests must reach ``alpha``: Fisher's combination of the decoy p-values, which alone holds the level, and
    that of the McNemar p-values, which can only lower the rate of false claims.

    Args:
        cases: The suspect's answers, and the key, for every key that was committed to; at least one.
        alpha: Level, fixed before the suspect was asked; in ``(0, 1)``.

    Raises:
        ValueError: If there is no key, two keys share their salt (then their decoys, and so their p-values, may depend on each other), or
            answers do not belong to their key.
    """
    return combine_verdicts([(judge(responses, key, alpha), key) for responses, key in cases])


def combine_verdicts(cases: Sequence[tuple[Verdict, WatermarkKey]]) -> JointVerdict:
    """Combines what one suspect's answers say under several keys; see :func:`judge_keys`.

    Args:
        cases: The verdict, and the key, for every key that was committed to; at least one.

    Raises:
        ValueError: If there is no key, two keys share their salt, or the verdicts were made at different levels.
    """
    keys, verdicts = [key for _, key in cases], tuple(verdict for verdict, _ in cases)
    if not keys:
        raise ValueError("A joint verdict needs the answers to at least one key, got none.")
    if len({key.salt for key in keys}) < len(keys):
        raise ValueError(
            f"Two of the {len(keys)} keys share their salt, so their decoys are not separate draws. Give every key once, each drawn "
            "from a secret of its own."
        )
    levels = sorted({verdict.alpha for verdict in verdicts})
    if len(levels) > 1:
        raise ValueError(
            f"The verdicts were made at different levels ({', '.join(f'{level:g}' for level in levels)}), and a joint one has one level that was "
            "fixed before. Verify every key at the same alpha."
        )
    [alpha] = levels
    decoy_p = combine_fisher([verdict.decoy_p for verdict in verdicts])
    mcnemar_p = combine_fisher([max(verdict.mcnemar_p, 1e-300) for verdict in verdicts])
    smallest_p = combine_fisher([verdict.smallest_p for verdict in verdicts])
    numbers = f"{len(verdicts)} keys, decoy-key p = {decoy_p:.2g}, McNemar p = {mcnemar_p:.2g}, both combined by Fisher"
    exact = all(verdict.exact for verdict in verdicts)  # one key that was picked may bring all of the product
    decision, reason = at_most(exact, numbers, _decide(alpha, decoy_p, smallest_p, mcnemar_p, numbers))
    return JointVerdict(
        verdict=decision,
        reason=reason,
        notes=(
            "Fisher's combination needs keys that were drawn independently of one another; each was compared with decoys of its own.",
            "All keys that were committed to must be among them: leaving out those that did not fire makes the p-value too small.",
            *dict.fromkeys(note for verdict in verdicts for note in verdict.notes),
        ),
        alpha=alpha,
        decoy_p=decoy_p,
        mcnemar_p=mcnemar_p,
        smallest_p=smallest_p,
        exact=exact,
        adjusted_p=tuple(holm([verdict.decoy_p for verdict in verdicts]).tolist()),
        verdicts=verdicts,
    )


def _decide(alpha: float, decoy_p: float, smallest_p: float, mcnemar_p: float, numbers: str) -> tuple[Decision, str]:
    if max(decoy_p, mcnemar_p) <= alpha:
        return (
            "supported",
            f"The suspect prefers the keys to keys that were never embedded at alpha = {alpha:g} ({numbers}).",
        )
    if smallest_p > alpha:
        return "inconclusive", (
            f"The comparison cannot reach alpha = {alpha:g}, since its smallest possible p-value is {smallest_p:.2g} ({numbers}): use "
            "more decoys, or more keys."
        )
    if max(decoy_p, mcnemar_p) <= _LEANING:
        return "inconclusive", f"The answers lean towards the keys but not beyond alpha = {alpha:g} ({numbers})."
    return "not supported", (
        f"The suspect does not prefer the keys at alpha = {alpha:g} ({numbers}), which does not prove that it is independent: a "
        "negative verdict never proves innocence."
    )
