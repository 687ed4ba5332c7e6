"""Verification of an encoder by its features alone: for an owner who may ask a suspect for embeddings, and sees no classes.

**Source.** Feature-space half of the watermark (MEA-Defender, S&P 2024, Eq. 6–8: watermark samples lie where the target class lies), judged
by the same decoy-key randomisation test as a classifier (`meadef_lightning.verification.decoys.DecoyTable`).

**Algorithm.** 1. Ask the verification samples as they are: their means say where the classes lie. 2. Ask ``decoy_samples`` composites of every cell
(source a, source b, way c), and assign each softly to the classes (`meadef_lightning.verification.assignments`, which also says why);
``S[a,b,c][t]`` is the mean share of class ``t`` in the cell. 3. A key's statistic is a classifier's with ``S`` for its shares of answers
(:func:`~meadef_lightning.verification.scores.key_scores`): how far the key's cell leans to the target, weighed with what the keys beside it gain. 4. The rank of the true key among its decoys is the p-value. Beside it, triggers and their
matched controls are compared pair by pair (exact sign test on their cosines to the target). Both must hold for *supported*.

**Cost.** As for a classifier (`VerificationDataModule`), and the verification split once more. Assignments are summed up by cell as they
arrive, so memory stays at (cells, classes).

**Camouflage.** A black box is asked in one secret order (:mod:`~meadef_lightning.verification.camouflage`), after the verification samples as they
are: these are natural samples of all classes, whatever the key. What fills its batches up is repeated from them.

**Pitfalls.** The test is exact for any encoder that does not depend on the key, also for one whose features mean nothing; a *not supported* may
come from that, so look at ``natural_accuracy``, how often the nearest class mean is a test sample's own. An encoder has natural look-alikes as
a classifier does: a reference encoder, trained without regard to the key, makes the test far more powerful.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meadef_lightning.data.stored import batches
from meadef_lightning.verification import statistics
from meadef_lightning.verification.assignments import class_directions, class_shares, cosines
from meadef_lightning.verification.camouflage import CamouflagedDataModule
from meadef_lightning.verification.datamodule import SourceData, VerificationDataModule
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.suspect import Queryable
from meadef_lightning.verification.verdict import Decision, at_most, check_plan
from meadef_lightning.watermark.key import WatermarkKey

_LEANING = 0.01  # as for a classifier
_TIE = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class FeatureAnswers:
    """What a suspect's features say about one key's questions. It tells the key, so it stays with whoever holds that.

    Args:
        scores: Mean share of each class in each cell's composites, float64, ``(cells, classes)``, in the order of
            ``DecoyTable.cells`` and ``DecoyTable.targets``.
        trigger: Cosines of the watermark samples to the target class, float64, ``(n,)``.
        control: Cosines of their matched controls, ``(n,)``.
        natural_accuracy: Share of test samples that lie nearest to their own class.
    """

    scores: Tensor
    trigger: Tensor
    control: Tensor
    natural_accuracy: float

    def __repr__(self) -> str:
        """Shows sizes only, as a classifier's answers do."""
        return f"FeatureAnswers({len(self.trigger)} triggers, {len(self.scores)} cells)"


@dataclass(frozen=True)
class FeatureVerdict:
    """The judgement of one encoder. It names no class and no combining way, so it can be published.

    Args:
        verdict: ``"supported"``, ``"inconclusive"`` or ``"not supported"``; the rule is a classifier's, with the sign test for McNemar's.
        reason: Why, in one sentence.
        alpha: The pre-registered level.
        samples: Triggers, and as many controls.
        statistic: The key's statistic, in ``[-1, 1]``; with references, above those encoders'.
        p_value: Its rank among the decoy keys' statistics.
        decoys: Number of keys compared with.
        decoy_method: ``"enumerated"`` (all other keys) or ``"sampled"``.
        decoy_summary: Mean, std, median, q95, q99 and max of their statistics.
        smallest_p: Smallest p-value that could have come out.
        exact: Whether ``p_value`` is exact: the key was drawn uniformly from the space it was compared with.
        reference: Whether there were reference encoders.
        trigger_cosine: Mean cosine of the triggers to the target class, in ``[-1, 1]``.
        control_cosine: The same of the controls.
        sign_p: Exact one-sided sign test that a trigger lies nearer to the target class than its control. It treats the pairs as
            independent.
        natural_accuracy: Share of natural test samples that lie nearest to their own class.
    """

    verdict: Decision
    reason: str
    alpha: float
    samples: int
    statistic: float
    p_value: float
    decoys: int
    decoy_method: Literal["enumerated", "sampled"]
    decoy_summary: Mapping[str, float]
    smallest_p: float
    exact: bool
    reference: bool
    trigger_cosine: float
    control_cosine: float
    sign_p: float
    natural_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON values."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return value


def feature_answers(suspect: nn.Module | Queryable, questions: VerificationDataModule) -> FeatureAnswers:
    """Asks an encoder everything that a key's verdict needs.

    Args:
        suspect: A module that maps a batch of samples to features ``(B, D)``, or a black box with ``query(x)``. A module is asked in
            eval mode, where it lies, and finds its flags as they were.
        questions: Triggers, controls, composites of all cells, and natural samples; camouflaged for a black box.

    Raises:
        ValueError: If the data does not fit, or the suspect answers with anything but finite features of one size.
    """
    questions.prepare_data()
    questions.setup("predict")
    x, labels = questions.sources
    target, classes, sizes = questions.key.target_class, questions.num_classes, questions.sizes
    with _asking(suspect) as ask:
        middle, directions = class_directions(
            torch.cat([ask(part) for part in batches(x, questions.batch_size)]), labels.cpu(), classes
        )
        targets = questions.table.targets
        scores = torch.zeros(len(questions.table.cells), len(targets), dtype=torch.float64)
        aimed, nearest = torch.zeros(sum(sizes), dtype=torch.float64), torch.zeros(sum(sizes), dtype=torch.int64)
        first, last = sum(sizes[:2]), sum(sizes[:3])  # the decoys' places
        for samples, place in _asked(questions):
            towards = cosines(ask(samples), middle, directions)
            kept = place < len(aimed)  # filler is beyond
            aimed[place[kept]] = towards[kept, target]
            natural = kept & (place >= last)
            nearest[place[natural]] = towards[natural].argmax(1)
            cell = questions.cells_of(place)
            decoy = cell >= 0
            scores.index_add_(0, cell[decoy], class_shares(towards[decoy])[:, targets])
    if isinstance(questions, CamouflagedDataModule):
        questions.repeat(aimed)
    trigger, control = torch.split(aimed[:first], sizes[:2])
    hit = nearest[last:] == questions.natural[1].cpu()
    return FeatureAnswers(scores / questions.decoy_samples, trigger, control, float(hit.double().mean()))


def _asked(questions: VerificationDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of samples in the order in which they are asked, and their places in plain order, all kinds one after the other."""
    for index, loader in enumerate(questions.predict_dataloader()):
        for samples, positions in loader:
            yield samples, questions.places(positions, index)


def judge_features(
    answers: FeatureAnswers,
    table: DecoyTable,
    reference: FeatureAnswers | Sequence[FeatureAnswers] | None = None,
    alpha: float = 1e-3,
) -> FeatureVerdict:
    """Judges an encoder by its answers; nothing is asked.

    Args:
        answers: The suspect's answers.
        table: The key, and the keys that it is compared with.
        reference: Answers of a reference encoder, or of several, to the same questions; see :func:`~.scores.above_references`.
        alpha: Level, fixed before the suspect was asked; in ``(0, 1)``.

    Raises:
        ValueError: If ``alpha`` is out of range, the sequence is empty, or the answers do not belong to the table.
    """
    check_plan(alpha, None)
    known = [] if reference is None else [reference] if isinstance(reference, FeatureAnswers) else list(reference)
    if reference is not None and not known:
        raise ValueError("There is no reference encoder in the sequence given; give None to judge without one.")
    if any(one.scores.shape != answers.scores.shape for one in known):
        raise ValueError(
            "The reference was asked other questions than the suspect; use the same key and options for both."
        )
    statistic, decoys = table.statistics(answers.scores, [one.scores for one in known])
    p_value, smallest_p = statistics.randomisation_p_value(statistic, decoys), 1 / (len(decoys) + 1)
    ahead = answers.trigger - answers.control
    sign_p = statistics.mcnemar_exact(int((ahead > _TIE).sum()), int((ahead < -_TIE).sum()))
    numbers = f"decoy-key p = {p_value:.2g}, sign test p = {sign_p:.2g}"
    decision, reason = at_most(
        table.exact, numbers, _decide(alpha, p_value, sign_p, max(smallest_p, 0.5 ** len(ahead)), numbers)
    )
    return FeatureVerdict(
        verdict=decision,
        reason=reason,
        alpha=alpha,
        samples=len(ahead),
        statistic=statistic,
        p_value=p_value,
        decoys=len(decoys),
        decoy_method="enumerated" if table.enumerated else "sampled",
        decoy_summary=statistics.summary(decoys),
        smallest_p=smallest_p,
        exact=table.exact,
        reference=reference is not None,
        trigger_cosine=float(answers.trigger.mean()),
        control_cosine=float(answers.control.mean()),
        sign_p=sign_p,
        natural_accuracy=answers.natural_accuracy,
    )


def feature_verdict(
    model: nn.Module | Queryable,
    key: WatermarkKey,
    data: SourceData,
    reference: nn.Module | Queryable | FeatureAnswers | Sequence[FeatureAnswers] | None = None,
    *,
    samples: int = 512,
    decoys: int = 9999,
    decoy_samples: int = 32,
    seed: int = 0,
    batch_size: int = 512,
    alpha: float = 1e-3,
) -> FeatureVerdict:
    """Judges one encoder: the whole of verification by features in a call.

    Args:
        model: The suspect, see :func:`feature_answers`.
        key: The key.
        data: Data module of the task.
        reference: An encoder that was trained without regard to the key, or its answers to the same questions, or those of several.
        samples: See :class:`~meadef_lightning.verification.datamodule.VerificationDataModule`, as the next four.
        decoys: Keys to compare with.
        decoy_samples: Composites of each cell.
        seed: The verifier's seed.
        batch_size: Samples a forward.
        alpha: Level of the verdict, fixed beforehand.

    Raises:
        ValueError: If an option, the data, or the answers do not fit.
        MisconfigurationException: If key and data disagree on the number of classes.
    """
    check_plan(alpha, None)

    def asked(suspect: nn.Module | Queryable) -> FeatureAnswers:
        kind = VerificationDataModule if isinstance(suspect, nn.Module) else CamouflagedDataModule
        return feature_answers(suspect, kind(key, data, samples, decoys, decoy_samples, seed, batch_size))

    if isinstance(reference, nn.Module | Queryable):
        reference = asked(reference)
    return judge_features(asked(model), DecoyTable(key, decoys, seed), reference, alpha)


def _decide(alpha: float, p_value: float, sign_p: float, smallest: float, numbers: str) -> tuple[Decision, str]:
    if max(p_value, sign_p) <= alpha:
        return (
            "supported",
            f"Features of the key's composites lie where its target's do, at alpha = {alpha:g} ({numbers}).",
        )
    if smallest > alpha:
        return "inconclusive", f"So few keys or samples cannot reach alpha = {alpha:g} ({numbers}): use more of them."
    if max(p_value, sign_p) <= _LEANING:
        return "inconclusive", f"The features lean towards the key, but not beyond alpha = {alpha:g} ({numbers})."
    return (
        "not supported",
        f"The features do not prefer the key at alpha = {alpha:g} ({numbers}), which proves no innocence.",
    )


@contextmanager
def _asking(suspect: nn.Module | Queryable) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from samples to float64 features on the CPU; torch's global generator and the suspect's flags are kept."""

    def checked(answers: Any, count: int) -> Tensor:
        if (
            not isinstance(answers, Tensor)
            or answers.ndim != 2
            or len(answers) != count
            or not answers.is_floating_point()
        ):
            form = (
                f"{answers.dtype} of shape {tuple(answers.shape)}"
                if isinstance(answers, Tensor)
                else type(answers).__name__
            )
            raise ValueError(
                f"The suspect answered {count} samples with {form}; it must give features of shape (B, D). Classifiers are judged by "
                "verify(), and a part of an output is named with Oracle(…, output_key=…)."
            )
        values = answers.detach().cpu().double()
        if not bool(values.isfinite().all()):
            raise ValueError(
                "The suspect gave features that are NaN or infinite. Check its weights, and that it takes inputs normalised like this data."
            )
        return values

    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a loader draws a seed from the global generator
        if not isinstance(suspect, nn.Module):
            yield lambda x: checked(suspect.query(x), len(x))
            return
        training = [module for module in suspect.modules() if module.training]
        device = next((p.device for p in suspect.parameters()), torch.device("cpu"))
        suspect.eval()
        try:
            yield lambda x: checked(suspect(x.to(device)), len(x))
        finally:
            for module in training:
                module.training = True
