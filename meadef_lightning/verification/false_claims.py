"""The malicious accuser: attacks on our own verification by somebody who wants an independent model judged a copy.

**Source.** Liu et al., "False Claims against Model Ownership Resolution" (USENIX Security 2024) for the idea of measuring it. The attacks
here follow from what a protocol leaves to the accuser if nobody holds him to it.

**Algorithm.** The accuser has ordinary data of the task and surrogates: models that he trained himself, independent of the suspect.

1. *Key grinding* (:class:`KeyGrinding`): draws keys from G secrets and keeps the one that looks best. On the suspect's own answers, if
   nothing had been committed to before; or on his surrogates, before he commits: some composites look like a third class to any model.
2. *Hand-picked key* (:func:`pick_key`): the best key of the whole space, chosen with the suspect in view, no secret at all. Its verdict is
   *inconclusive* at most, unless its file claims a draw and nobody repeats it.
3. *Crafted source images*, with an honestly drawn key: :mod:`~meadef_lightning.verification.crafted_sources`.
4. *Rigged reference* (:class:`RiggedReference`): supplies the reference model, an ensemble of surrogates that avoids the target, so that
   what any model answers seems to be the suspect's own.

**Cost.** Grinding costs a key derivation a secret, and nothing is asked for it.

**Defaults.** 1,000 secrets, a fifth of the space of ten classes and eight ways.

**Pitfalls** (what holds the level, and what does not). The decoy-key p-value is valid for *one* key that nobody could steer, judged on images and with a
reference that the accuser did not make. A commitment alone does not stop grinding, since it is done before; a beacon that is
published after the commitment does. Correcting for G tries (Bonferroni, ``min(1, G·p)``) is valid too, but G must be known, and in a space of 5,760
keys six tries leave nothing to claim at .001. ``drawn_uniformly`` in a key file is the owner's word: a judge draws the key again from secret and beacon
(``meadef key check``, :func:`~meadef_lightning.verification.commitment.repeat_draw`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from meadef_lightning.verification.answers import AnswerTable, every_decoy_p, every_mcnemar_p
from meadef_lightning.verification.scores import possible_targets
from meadef_lightning.verification.statistics import clopper_pearson_upper
from meadef_lightning.verification.verdict import Verdict, judge
from meadef_lightning.watermark.key import WatermarkKey


@dataclass(frozen=True)
class ClaimRate:
    """How often an accuser succeeded.

    Args:
        trials: False claims that were judged.
        supported: Those that were judged *supported*.
        inconclusive: Those that were judged *inconclusive*.
        wsr: Mean watermark success rate that was shown.
        exact: Share of claims whose verdict calls its p-value exact.
    """

    trials: int
    supported: int
    inconclusive: int
    wsr: float
    exact: float

    @property
    def rate(self) -> float:
        """Share of claims that succeeded."""
        return self.supported / self.trials

    @property
    def upper(self) -> float:
        """Its 95 % upper bound (Clopper-Pearson), as if the claims were independent."""
        return clopper_pearson_upper(self.supported, self.trials)

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> ClaimRate:
        """Counts verdicts; raises ``ValueError`` where there are none."""
        if not verdicts:
            raise ValueError("A rate of false claims needs at least one verdict.")
        n = len(verdicts)
        return cls(
            trials=n,
            supported=sum(verdict.verdict == "supported" for verdict in verdicts),
            inconclusive=sum(verdict.verdict == "inconclusive" for verdict in verdicts),
            wsr=sum(verdict.wsr for verdict in verdicts) / n,
            exact=sum(verdict.exact for verdict in verdicts) / n,
        )


def looks(tables: Sequence[AnswerTable], references: Sequence[AnswerTable] = (), decoy_samples: int = 32) -> Tensor:
    """Scores every key by how well it would accuse all these models: lower is better for the accuser.

    Returns:
        Mean over the models of the logarithm of the larger of both p-values, float64 ``(pairs, ways, classes)``.
    """
    p = [
        torch.maximum(every_decoy_p(table, references, decoy_samples), every_mcnemar_p(table, references))
        for table in tables
    ]
    return torch.stack(p).clamp_min(1e-300).log().mean(0)


def _place(key: WatermarkKey) -> tuple[int, int, int]:
    a, b = key.source_classes
    return a * (key.num_classes - 1) + b - (b > a), key.space.index(key.combiner), key.target_class


def ground_key(scores: Tensor, keys: Sequence[WatermarkKey]) -> WatermarkKey:
    """Returns the key with the lowest score, the first of equals.

    Args:
        scores: Score of every key of the space, shape ``(pairs, ways, classes)``; see :func:`looks`.
        keys: What the accuser drew.

    Raises:
        ValueError: If there is no key.
    """
    if not keys:
        raise ValueError("Grinding needs at least one key to choose from, got none.")
    return min(keys, key=lambda key: float(scores[_place(key)]))


@lru_cache(maxsize=64)
def _drawn(prefix: str, secrets: int, num_classes: int) -> tuple[WatermarkKey, ...]:
    """Draws a key from each of these secrets; kept, since many suspects are accused with the same ones."""
    return tuple(WatermarkKey.draw(num_classes, f"{prefix} {number}") for number in range(secrets))


def pick_key(scores: Tensor, table: AnswerTable) -> WatermarkKey:
    """Returns the key with the lowest score of the whole space, made by hand.

    Args:
        scores: Score of every key, shape ``(pairs, ways, classes)``; see :func:`looks`.
        table: Answers to that space's questions.
    """
    _, ways, classes = scores.shape
    # of models without any lean all keys are alike, and places that are no key must not be the first of them
    no_key = ~possible_targets(table.pairs, classes)[:, None, :].expand_as(scores)
    best = int(scores.masked_fill(no_key, torch.inf).argmin())
    pair, way, target = best // (ways * classes), best // classes % ways, best % classes
    a, b = table.pairs[pair].tolist()
    combiners = table.space.combiners
    return WatermarkKey((a, b), target, classes, combiners[way], space=combiners)


@dataclass(frozen=True)
class KeyGrinding:
    """Tries secrets until a key suits.

    Args:
        secrets: Number of secrets that are tried, ``G``, at least 1.
        prefix: Beginning of all secrets.
        alpha: Level of the verdict.
        correct: Whether the judge knows ``G`` and corrects for it: *supported* at ``alpha / G``.
    """

    secrets: int = 1000
    prefix: str = "grinding"
    alpha: float = 1e-3
    correct: bool = False

    def __post_init__(self) -> None:
        if self.secrets < 1:
            raise ValueError(f"secrets={self.secrets} must be at least 1.")

    def claim(
        self, suspect: AnswerTable, seen: Sequence[AnswerTable], references: Sequence[AnswerTable] = (), decoy_samples: int = 32
    ) -> Verdict:  # fmt: skip
        """Accuses a suspect.

        Args:
            suspect: The suspect's answers.
            seen: The answers that the accuser chooses his key by: the suspect's, where no commitment binds him, or his surrogates'.
            references: Answers of reference models, which the accuser has, too.
            decoy_samples: Samples of each cell that count.
        """
        tried = _drawn(self.prefix, self.secrets, suspect.space.num_classes)
        key = ground_key(looks(seen, references, decoy_samples), tried)
        level = self.alpha / self.secrets if self.correct else self.alpha
        return judge(suspect.responses(key, decoy_samples=decoy_samples, references=references), key, level)


class RiggedReference(nn.Module):
    """A reference model that avoids the target: an ensemble of surrogates whose logit of one class is lowered.

    Args:
        surrogates: Models that map images to logits.
        target: The class to avoid.
        margin: By how much; natural images are still answered with their class where the ensemble is surer than that.
    """

    def __init__(self, surrogates: Sequence[nn.Module], target: int, margin: float = 2.0) -> None:
        super().__init__()
        self.surrogates = nn.ModuleList(surrogates)
        self.target, self.margin = target, margin

    def forward(self, x: Tensor) -> Tensor:
        """Answers images with logits ``(B, K)``."""
        logits = torch.stack([surrogate(x).log_softmax(1) for surrogate in self.surrogates]).mean(0)
        lowered = torch.zeros_like(logits[:1])
        lowered[:, self.target] = self.margin
        return logits - lowered
