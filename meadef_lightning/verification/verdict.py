"""From a suspect's answers to a verdict: pure functions, nothing is asked again.

**Keys that were not drawn.** The decoy-key p-value is the rank of a key among all keys, and an error probability only because the key was
drawn uniformly. Who picks one by hand may pick one that the suspect, or any model of the task, favours, whose rank is small for innocents, too. A
commitment made before rules out the first only, and correcting for the choice leaves nothing (smallest p times number of keys is 1). So such
a key is *inconclusive* at most; its rank is reported as it is. The remedy costs nothing: draw the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from meadef_lightning.verification import statistics
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.remaining import MAJORITY
from meadef_lightning.verification.responses import Responses
from meadef_lightning.watermark.key import WatermarkKey

Decision = Literal["supported", "inconclusive", "not supported"]

PAPER_THRESHOLD = 0.30
_LEANING = 0.01
_NOT_DRAWN = (
    "The answers look like the key's watermark, but the key was not drawn, so that how it ranks among other keys does not tell how often "
    "an innocent is accused ({}). Draw a key with `meadef key draw`, commit to it, and embed that one."
)


@dataclass(frozen=True)
class Verdict:
    """The judgement of one suspect. It names no class and no combining way, so it can be published.

    Args:
        verdict: ``"supported"``, ``"inconclusive"`` or ``"not supported"``.
        reason: Why, in one sentence.
        notes: What the p-values assume.
        alpha: The pre-registered level.
        answers: What both tests looked at: ``"probabilities"``, of which the remaining shares (:mod:`~.remaining`) are taken, or
            ``"labels"``, where the suspect or a reference gave no more. Rates are of labels in either case.
        samples: Triggers, and as many controls.
        wsr: Watermark success rate, in ``[0, 1]``.
        wsr_ci: Its 95 % Wilson interval, which treats the triggers as independent (see ``effective_samples``).
        wfpr: The rate on the matched controls.
        wfpr_ci: Its 95 % Wilson interval.
        only_trigger: Pairs in which the trigger was answered with the target, or its probabilities leave the target more than half of what
            they leave beside the sources, and the control was not.
        only_control: Pairs in which only the control was.
        mcnemar_p: Exact one-sided p-value of these two numbers.
        statistic: The key's statistic T₀ from the cell table (:mod:`~meadef_lightning.verification.scores`): how far its cell and those
            beside it lean to the target, in ``[-1, 1]``; with reference models, above theirs (:func:`~.scores.above_references`).
        reference: Whether there were reference models; of several, the notes say how many.
        decoy_p: Randomisation p-value of T₀.
        decoys: Number of keys compared with.
        decoy_method: ``"enumerated"`` (all other keys) or ``"sampled"``.
        decoy_summary: Mean, std, median, q95, q99 and max of their statistics.
        smallest_p: Smallest decoy p-value that could have come out.
        exact: Whether ``decoy_p`` is exact: the key was drawn uniformly from the space it was compared with. Where it is not, the
            verdict is *inconclusive* at most.
        icc: Correlation of answers within one model (moment estimate over the other keys); ``None`` if not estimable.
        effective_samples: Independent answers that the triggers are worth at this correlation.
        conformal_p: Rank of T₀ among independent models, where their statistics were given.
        null_models: How many were given.
        null_rate_upper: 95 % upper bound on the rate at which independent models reach T₀.
        natural_accuracy: The suspect's accuracy on natural test samples.
        paper_threshold: ``{"threshold": 0.3, "exceeded": …}``, the paper's fixed rule, for comparison only.
    """

    verdict: Decision
    reason: str
    notes: tuple[str, ...]
    alpha: float
    answers: Literal["probabilities", "labels"]
    samples: int
    wsr: float
    wsr_ci: tuple[float, float]
    wfpr: float
    wfpr_ci: tuple[float, float]
    only_trigger: int
    only_control: int
    mcnemar_p: float
    statistic: float
    reference: bool
    decoy_p: float
    decoys: int
    decoy_method: Literal["enumerated", "sampled"]
    decoy_summary: Mapping[str, float]
    smallest_p: float
    exact: bool
    icc: float | None
    effective_samples: float | None
    conformal_p: float | None
    null_models: int
    null_rate_upper: float | None
    natural_accuracy: float
    paper_threshold: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON values."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return value


def decoy_statistics(responses: Responses, key: WatermarkKey) -> tuple[float, Tensor]:
    """Returns the true key's statistic and the decoys', shape ``(B,)``, float64, e.g. for a histogram.

    The array is in the order of the keys: publish it sorted, or as a histogram.

    Raises:
        ValueError: If the answers do not belong to this key; see :meth:`Responses.check`.
    """
    plan = responses.check(key)
    return plan.statistics(*responses.tables(plan))


def check_plan(alpha: float, null_statistics: Sequence[float] | None) -> None:
    """Checks what was fixed beforehand; callers do so before a query is spent.

    Raises:
        ValueError: If ``alpha`` is not in ``(0, 1)``, or null statistics are given but empty or not finite.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie strictly between 0 and 1; 0.001 is sensible for screening.")
    if null_statistics is not None:
        statistics.conformal_p_value(0.0, null_statistics)


def judge(
    responses: Responses, key: WatermarkKey, alpha: float = 1e-3, null_statistics: Sequence[float] | None = None
) -> Verdict:
    """Judges a suspect by its answers.

    *Supported* needs both tests at ``alpha``: the decoy-key randomisation test (does the suspect prefer this key to keys that
    were never embedded?) and McNemar's test against matched controls (does it prefer the key's way of combining to other ways
    of combining the same sources?). Probabilities say more than labels, and are looked at where the suspect and all references give
    them: then a sample counts as answered with the target that takes more than half of what is left beside the sources. Under
    independence the first alone holds the level; demanding both can only lower the rate of false claims. *Inconclusive* is what leans that way (both at 0.01), could not have reached ``alpha`` at all, or was not drawn.

    Args:
        responses: The suspect's answers.
        key: The key.
        alpha: Level, fixed before the suspect was asked; in ``(0, 1)``.
        null_statistics: ``Verdict.statistic`` of independently trained models under the same key, reported beside.

    Returns:
        The verdict.

    Raises:
        ValueError: If ``alpha`` or a null statistic is out of range, or the answers do not belong to this key.
    """
    check_plan(alpha, null_statistics)
    table = responses.check(key)
    statistic, decoys = table.statistics(*responses.tables(table))
    decoy_p = statistics.randomisation_p_value(statistic, decoys)
    smallest_p = 1 / (len(decoys) + 1)

    hit, false_hit = responses.trigger == key.target_class, responses.control == key.target_class
    n = len(hit)
    told, false_told, soft = hit, false_hit, responses.by_probabilities
    if soft and responses.soft is not None:
        told, false_told = responses.soft.trigger > MAJORITY, responses.soft.control > MAJORITY
    only_trigger, only_control = int((told & ~false_told).sum()), int((false_told & ~told).sum())
    mcnemar_p = statistics.mcnemar_exact(only_trigger, only_control)
    hits, false_hits = int(hit.sum()), int(false_hit.sum())

    nulls = None if null_statistics is None else [float(value) for value in null_statistics]
    conformal_p = None if nulls is None else statistics.conformal_p_value(statistic, nulls)
    icc = table.correlation(responses.counts)
    numbers = f"decoy-key p = {decoy_p:.2g}, McNemar p = {mcnemar_p:.2g}"
    decision, reason = at_most(
        table.exact, numbers, _decide(alpha, decoy_p, smallest_p, mcnemar_p, 0.5**n, hits / n, numbers)
    )
    return Verdict(
        verdict=decision,
        reason=reason,
        notes=_notes(table, nulls, len(responses.references)),
        alpha=alpha,
        answers="probabilities" if soft else "labels",
        samples=n,
        wsr=hits / n,
        wsr_ci=statistics.wilson_interval(hits, n),
        wfpr=false_hits / n,
        wfpr_ci=statistics.wilson_interval(false_hits, n),
        only_trigger=only_trigger,
        only_control=only_control,
        mcnemar_p=mcnemar_p,
        statistic=statistic,
        reference=bool(responses.references),
        decoy_p=decoy_p,
        decoys=len(decoys),
        decoy_method="enumerated" if table.enumerated else "sampled",
        decoy_summary=statistics.summary(decoys),
        smallest_p=smallest_p,
        exact=table.exact,
        icc=icc,
        effective_samples=None if icc is None else statistics.effective_sample_size(n, icc),
        conformal_p=conformal_p,
        null_models=0 if nulls is None else len(nulls),
        null_rate_upper=None if nulls is None or conformal_p is None else _rate_upper(conformal_p, len(nulls)),
        natural_accuracy=float((responses.natural == responses.natural_labels).double().mean()),
        paper_threshold={"threshold": PAPER_THRESHOLD, "exceeded": hits / n > PAPER_THRESHOLD},
    )


def at_most(exact: bool, numbers: str, found: tuple[Decision, str]) -> tuple[Decision, str]:
    """Lowers *supported* to *inconclusive* where the key was not drawn; see the module's documentation.

    Args:
        exact: Whether it was (:attr:`DecoyTable.exact`), or all keys were.
        numbers: The p-values, for the reason.
        found: Decision and reason if it had been.
    """
    return ("inconclusive", _NOT_DRAWN.format(numbers)) if found[0] == "supported" and not exact else found


def _rate_upper(conformal_p: float, models: int) -> float:
    """Bounds the rate at which independent models reach the statistic; the rank says how many of these did."""
    return statistics.clopper_pearson_upper(round(conformal_p * (models + 1)) - 1, models)


def _decide(
    alpha: float, decoy_p: float, smallest_p: float, mcnemar_p: float, smallest_mcnemar: float, wsr: float, numbers: str
) -> tuple[Decision, str]:
    """Returns the decision and the sentence that gives its reason."""
    if decoy_p <= alpha and mcnemar_p <= alpha:
        return "supported", (
            f"The suspect answers {wsr:.1%} of the watermark samples with the key's target, and leans to it more than other keys and other "
            f"ways of combining the same sources explain at alpha = {alpha:g} ({numbers})."
        )
    if smallest_p > alpha:
        return "inconclusive", (
            f"The comparison with other keys cannot reach alpha = {alpha:g}, since its smallest possible p-value is {smallest_p:.2g} "
            f"({numbers}): use more decoys, or a key from a larger key space."
        )
    if smallest_mcnemar > alpha:
        return "inconclusive", (
            f"The number of watermark samples cannot reach alpha = {alpha:g}, since the smallest possible p-value of the matched controls is "
            f"{smallest_mcnemar:.2g} ({numbers}): use more samples."
        )
    if decoy_p <= _LEANING and mcnemar_p <= _LEANING:
        return "inconclusive", (
            f"The answers lean towards the key but not beyond the pre-registered alpha = {alpha:g} ({numbers}), which proves neither "
            "theft nor independence."
        )
    return "not supported", (
        f"The suspect does not prefer this key to other keys and to its controls at alpha = {alpha:g} ({numbers}), which does not "
        "prove that it is independent: a negative verdict never proves innocence."
    )


def _notes(table: DecoyTable, nulls: Sequence[float] | None, references: int) -> tuple[str, ...]:
    notes = []
    if references:
        above = (
            "what a reference model gives"
            if references == 1
            else f"the mean of what {references} reference models give, in units of how much they differ on each answer"
        )
        notes.append(
            f"What every key's statistic is made of is above {above}. A reference must have been trained without regard to the key."
        )
    if table.exact:
        notes.append(
            "The decoy-key p-value is exact if the key was drawn once, from a secret or beacon fixed before; trying G secrets until "
            "one suits multiplies it by up to G."
        )
    if not table.key.drawn_uniformly:
        notes.append(
            "The key was picked by hand: its decoy-key p-value is a rank and no error probability, whenever the key was fixed, and does "
            "not support a claim. Draw keys with `meadef key draw`."
        )
    if table.key.combiner not in table.key.space:
        notes.append(
            "The key's combining way is not in its declared key space and was added to it: the decoy-key p-value is not exact."
        )
    notes.append(
        "Intervals and McNemar's test treat the answers of one model as independent; effective_samples says how many independent ones "
        "they are worth. The decoy-key p-value needs no such assumption."
    )
    if nulls is not None:
        notes.append(
            "The conformal p-value assumes that the given models are exchangeable with an independent suspect."
        )
    return tuple(notes)
