"""A sequential test for suspects whose queries cost: asks in small batches, and stops as soon as the evidence suffices.

**Source.** Ville (1939); testing by betting (Shafer 2021; Waudby-Smith & Ramdas 2024); the mixture is Robbins' (1970).

**Algorithm.** Every trigger has a matched control: the same sources, combined in another way.

1. Under H₀, that the two answers of a pair are exchangeable given all earlier answers, a *discordant* pair (one of the two was
   answered with the target, the other not) falls to the trigger with probability 1/2, like a fair coin. Less does no harm.
2. Bet on the trigger: at success rate θ a pair multiplies the capital by 2θ (trigger) or 2(1-θ) (control); concordant pairs leave it.
3. Mix over θ ~ Beta(a, b) restricted to [1/2, 1], so that no bet is ever placed on the control. With s and f pairs so far

   ``e = 2^(s+f) · B(a+s, b+f)·P(Beta(a+s, b+f) > 1/2) / (B(a, b)·P(Beta(a, b) > 1/2))``.

   Under H₀ this is a test supermartingale that starts at 1, so by Ville's inequality it *ever* reaches 1/alpha with probability
   alpha at most: looking after each pair, and stopping at will, costs nothing.
4. Ask triggers and controls mixed in secret random order, batch by batch; stop at e >= 1/alpha or when the budget is spent. A black box is
   asked other composites and natural samples among them, so that its owner does not see which two classes and which way are meant.

**Cost.** A perfect copy is noticed at alpha = 10⁻³ after 13 pairs, 26 queries. With WSR 70 % and WFPR 10 %, and answers independent
of each other, half of all runs end within 23 pairs and nine in ten within 35. Cover doubles the queries of a pair to four.

**Pitfalls.** H₀ is about this key's way of combining against other ways. A model that by itself sees the target in composites of
this way violates it without being a copy, and the answers of one model may go together. So this screens: it says whether the
full verification is worth its queries. It is never a verdict, which needs the comparison with other keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor, nn

from meadef_lightning.verification.datamodule import SourceData, VerificationDataModule
from meadef_lightning.verification.decoys import seeded_permutation
from meadef_lightning.verification.suspect import INVALID, OutputKey, Queryable, SuspectModule, answered_labels
from meadef_lightning.watermark.key import WatermarkKey

_MOST_DECOYS = 999
SCREENING_NOTE = "A screening note, not a verdict: it compares the key's way of combining with other ways only. Verify with decoy keys before a claim."


def log_e_value(only_trigger: ArrayLike, only_control: ArrayLike, prior: tuple[float, float] = (1.0, 1.0)) -> Any:
    """Computes the logarithm of the e-value above.

    Args:
        only_trigger: Discordant pairs that fell to the trigger so far, at least 0; any shape.
        only_control: Those that fell to the control, same shape.
        prior: ``a`` and ``b`` of the mixture, above 0.

    Returns:
        Natural logarithms, float64, same shape; 0 before the first discordant pair.

    Raises:
        ValueError: If a count is negative, the prior is not positive, or leaves hardly any weight to rates above one half.
    """
    s, f = np.asarray(only_trigger, dtype=np.float64), np.asarray(only_control, dtype=np.float64)
    if min(s.min(initial=0), f.min(initial=0)) < 0 or not (min(prior) > 0 and math.isfinite(sum(prior))):
        raise ValueError(f"Counts must be at least 0 and both numbers of prior={prior} above 0.")

    def log_mass(a: NDArray[np.float64], b: NDArray[np.float64]) -> Any:
        with np.errstate(divide="ignore"):  # no mass left above one half: all is lost, e = 0
            return special.betaln(a, b) + np.log(special.betainc(b, a, 0.5))

    a, b = (np.asarray(value, dtype=np.float64) for value in prior)
    if not np.isfinite(log_mass(a, b)):
        raise ValueError(
            f"prior={prior} leaves no weight to rates above one half, on which alone is bet; (1, 1) is uniform."
        )
    return (s + f) * math.log(2) + log_mass(a + s, b + f) - log_mass(a, b)


def e_process(
    trigger_hits: ArrayLike, control_hits: ArrayLike, prior: tuple[float, float] = (1.0, 1.0)
) -> NDArray[np.float64]:
    """Computes the logarithm of the e-value after each pair.

    Args:
        trigger_hits: Whether each trigger was answered with the target, bool, shape ``(n,)``.
        control_hits: Whether its control was, same shape.
        prior: See :func:`log_e_value`.

    Returns:
        Natural logarithms, float64, shape ``(n,)``.

    Raises:
        ValueError: If the shapes differ.
    """
    trigger, control = np.asarray(trigger_hits, dtype=bool), np.asarray(control_hits, dtype=bool)
    if trigger.ndim != 1 or trigger.shape != control.shape:
        raise ValueError(f"Hits must be two arrays of shape (n,), got {trigger.shape} and {control.shape}.")
    return np.asarray(log_e_value((trigger & ~control).cumsum(), (control & ~trigger).cumsum(), prior))


@dataclass(frozen=True)
class SequentialResult:
    """What a sequential test found, and what it cost.

    Args:
        alpha: Level.
        stopped: ``"evidence"`` (e reached 1/alpha) or ``"budget"`` (no more pairs could be asked).
        log_e: Natural logarithm of the largest e-value on the way.
        p_value: ``min(1, 1/e)`` of that, valid at any time.
        pairs: Pairs of a trigger and a control that were asked.
        only_trigger: Pairs in which only the trigger was answered with the target.
        only_control: Pairs in which only the control was.
        queries: Samples the suspect answered, two a pair and the cover.
        note: What this is worth.
    """

    alpha: float
    stopped: Literal["evidence", "budget"]
    log_e: float
    p_value: float
    pairs: int
    only_trigger: int
    only_control: int
    queries: int
    note: str = SCREENING_NOTE

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return asdict(self)


def sequential_test(
    batches: Iterable[tuple[ArrayLike, ArrayLike]], alpha: float = 1e-3, prior: tuple[float, float] = (1.0, 1.0)
) -> SequentialResult:
    """Reads pairs of answers, batch by batch, until the evidence suffices; no batch is drawn after that.

    Args:
        batches: Hits of triggers and of their controls, bool, each of shape ``(n,)``; consumed lazily.
        alpha: Level, in ``(0, 1)``.
        prior: See :func:`log_e_value`.

    Raises:
        ValueError: If ``alpha`` is out of range, or a batch has another form.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie strictly between 0 and 1; 0.001 is sensible for screening.")
    trigger, control = np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)
    largest = 0.0
    for more_trigger, more_control in batches:
        trigger = np.concatenate([trigger, np.asarray(more_trigger, dtype=bool)])
        control = np.concatenate([control, np.asarray(more_control, dtype=bool)])
        largest = max(0.0, float(e_process(trigger, control, prior).max(initial=0.0)))
        if largest >= -math.log(alpha):
            break
    return SequentialResult(
        alpha=alpha,
        stopped="evidence" if largest >= -math.log(alpha) else "budget",
        log_e=largest,
        p_value=math.exp(-largest),
        pairs=len(trigger),
        only_trigger=int((trigger & ~control).sum()),
        only_control=int((control & ~trigger).sum()),
        queries=2 * len(trigger),
    )


class SequentialTest:
    """Asks a suspect as little as it takes.

    Args:
        key: The key.
        data: Data module of the task; sources come from its verification split.
        alpha: Level, fixed beforehand.
        budget: Queries at most, at least 2.
        batch_pairs: Pairs asked at once, at least 1; the test can stop after each batch.
        seed: The verifier's seed: it pairs the sources and mixes the order.
        prior: See :func:`log_e_value`; (1, 1) is uniform.
        cover: Samples that a black box is asked beside every pair, in turn composites of other classes and natural samples, each once,
            as long as there are any. They count as queries and towards the budget; their answers are not used.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        key: WatermarkKey,
        data: SourceData,
        alpha: float = 1e-3,
        budget: int = 512,
        batch_pairs: int = 8,
        seed: int = 0,
        prior: tuple[float, float] = (1.0, 1.0),
        cover: int = 2,
    ) -> None:
        if budget < 2 or batch_pairs < 1 or cover < 0:
            raise ValueError(
                f"budget={budget} must be at least 2 queries, a pair, batch_pairs={batch_pairs} at least 1 and cover={cover} at least 0."
            )
        sequential_test([], alpha)
        log_e_value(0, 0, prior)
        self.key, self.alpha, self.batch_pairs, self.seed, self.prior = key, alpha, batch_pairs, seed, prior
        self.budget, self.cover = budget, cover
        # the other keys' cells are cover, and else planned but never asked
        decoys = max(1, min(budget * cover // 2, _MOST_DECOYS))
        self.questions = VerificationDataModule(
            key, data, samples=budget // 2, decoys=decoys, decoy_samples=2, seed=seed
        )

    def run(self, suspect: nn.Module | Queryable, output_key: OutputKey | None = None) -> SequentialResult:
        """Asks until the evidence suffices or the budget is spent.

        Args:
            suspect: A module that maps samples to scores ``(B, K)`` or labels ``(B,)``, asked in eval mode on its device, or a black box
                with ``query(x)``.
            output_key: Where the answers are in the suspect's output; see :class:`~meadef_lightning.verification.SuspectModule`.

        Raises:
            ValueError: If the suspect's answers do not fit, or are invalid.
            MisconfigurationException: If key and data disagree on the number of classes.
        """
        self.questions.prepare_data()
        self.questions.setup("predict")
        cover = 0 if isinstance(suspect, nn.Module) else self.cover
        pairs = min(self.questions.sizes[0], self.budget // (2 + cover))
        if pairs == 0:
            raise ValueError(
                f"budget={self.budget} does not pay for one pair and its cover, {2 + cover} queries. Raise it, or lower cover={cover}."
            )
        asked: list[int] = []
        with _evaluated(suspect):
            result = sequential_test(
                self._ask(SuspectModule(suspect, self.key.num_classes, output_key), pairs, cover, asked),
                self.alpha,
                self.prior,
            )
        return replace(result, queries=sum(asked))

    def _cover(self) -> tuple[Tensor, Tensor]:
        """Returns the decoys and the natural samples that may be cover, each in a secret order, as items of their data sets."""
        table, sizes = self.questions.table, self.questions.sizes
        decoys = seeded_permutation(sizes[2], "cover", self.key.salt, self.seed)
        # the key's own classes would tell more, and some of their composites are triggers
        own = (table.pairs == torch.tensor(self.key.source_classes)).all(1)[decoys // 2 % len(table.pairs)]
        return decoys[~own], seeded_permutation(sizes[3], "cover natural", self.key.salt, self.seed)

    def _ask(self, suspect: SuspectModule, pairs: int, cover: int, asked: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the hits of one batch of triggers and of their controls after the other; notes the size of each."""
        trigger, control, decoy, natural = (loader.dataset for loader in self.questions.predict_dataloader())
        device = next((weight.device for weight in suspect.parameters()), torch.device("cpu"))
        composites, plain = self._cover() if cover else (torch.zeros(0), torch.zeros(0))
        for start in range(0, pairs, self.batch_pairs):
            items = list(range(start, min(start + self.batch_pairs, pairs)))
            # item by item in turn; a composite first
            first, last = start * cover, (start + len(items)) * cover
            asking = [
                (trigger, items),
                (control, items),
                (decoy, composites[(first + 1) // 2 : (last + 1) // 2].tolist()),
                (natural, plain[first // 2 : last // 2].tolist()),
            ]
            x = torch.cat([dataset.__getitems__(chosen)[0] for dataset, chosen in asking if chosen])  # type: ignore[attr-defined]
            asked.append(len(x))
            order = seeded_permutation(len(x), "sequential", self.key.salt, self.seed, start)
            answers = suspect.select(suspect(x[order].to(device)))
            labels = answered_labels(answers, len(x), self.key.num_classes).cpu()[order.argsort()]
            if bool((labels == INVALID).any()):
                raise ValueError(
                    "The suspect gave no valid answer (NaN, or a label that is no class). Check its weights, and that it takes inputs "
                    "normalised like this data."
                )
            hits = labels == self.key.target_class
            yield hits[: len(items)], hits[len(items) : 2 * len(items)]


@contextmanager
def _evaluated(suspect: nn.Module | Queryable) -> Iterator[None]:
    """Puts a module in eval mode, without gradients, and leaves it as it was."""
    modes = [(module, module.training) for module in suspect.modules()] if isinstance(suspect, nn.Module) else []
    try:
        if isinstance(suspect, nn.Module):
            suspect.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
