"""One suspect's answers to the questions of *every* key, asked once: for studies of verification itself.

A verification asks about one key. Whoever measures false claims needs thousands of keys for each of many models, and the questions
overlap: trigger i of the key (a, b, t, c) is pair i of the classes a and b combined in way c, whatever t is, its control is the same
pair combined in another way, and a cell's samples are the first of these pairs again. So one table, source pairs × ways × samples,
holds the answers to all questions of all keys of a space, and :meth:`AnswerTable.responses` takes from it exactly what
:func:`~meadef_lightning.verification.verify` would have asked.

**Cost.** (ordered source pairs) · ways · samples forwards: 72,000 for ten classes, eight ways and 100 samples.

**Pitfalls.** A way that draws random numbers draws others in another batch, so only with ways that do not (the package's) are the
answers the very ones that a single verification would get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from meadef_lightning.verification.datamodule import SourceData, VerificationDataModule
from meadef_lightning.verification.decoys import MAX_DECOYS, DecoyTable
from meadef_lightning.verification.remaining import MAJORITY, UNIT, can_be_probabilities, readings, remaining_shares
from meadef_lightning.verification.responses import Reference, Responses, SoftAnswers
from meadef_lightning.verification.scores import above_references, key_scores, possible_targets, usual_variance
from meadef_lightning.verification.suspect import INVALID, Queryable, answered_labels
from meadef_lightning.watermark.combiner_spec import DEFAULT_COMBINERS, CombinerSpec
from meadef_lightning.watermark.key import KeySpace, WatermarkKey

_TIE = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class AnswerTable:
    """All answers of one suspect.

    Args:
        answers: Answered classes, integers of shape ``(pairs, ways, samples)``; pairs are all ordered pairs of classes, sorted.
        natural: Answers to natural test samples, integers ``(N,)``.
        natural_labels: Their true classes, integers ``(N,)``.
        space: The key space that was asked.
        seed: The verifier's seed.
        soft: What its probabilities say, thousandths (:func:`~.remaining.remaining_shares`), int16 ``(pairs, ways, samples, classes)``;
            ``None`` where it answered with labels.
    """

    answers: Tensor
    natural: Tensor
    natural_labels: Tensor
    space: KeySpace
    seed: int = 0
    soft: Tensor | None = None

    @property
    def pairs(self) -> Tensor:
        """The ordered source pairs, int64 ``(pairs, 2)``."""
        classes = self.space.num_classes
        return torch.tensor([(a, b) for a in range(classes) for b in range(classes) if a != b])

    @property
    def accuracy(self) -> float:
        """Share of natural samples that were answered with their class."""
        return float((self.natural == self.natural_labels).double().mean())

    def counts(self, decoy_samples: int = 32) -> Tensor:
        """How often each cell was answered with each class, int64 ``(pairs, ways, classes)``."""
        pairs, ways, samples = self.answers.shape
        if not 2 <= decoy_samples <= samples:
            raise ValueError(f"decoy_samples={decoy_samples} must be from 2 to the {samples} samples of a cell.")
        counts = torch.zeros(pairs, ways, self.space.num_classes, dtype=torch.int64)
        chosen = self.answers[:, :, :decoy_samples].long()
        return counts.scatter_add_(2, chosen, torch.ones_like(chosen))

    def shares(self) -> Tensor:
        """WSR of every key: share of all samples of a cell that got each class, float64 ``(pairs, ways, classes)``."""
        samples = self.answers.shape[2]
        return self.counts(samples).double() / samples

    def controls(self) -> Tensor:
        """The answers to each trigger's matched control, integers ``(pairs, ways, samples)``."""
        return self.answers.gather(1, self._control_ways().expand(len(self.answers), -1, -1))

    def _control_ways(self) -> Tensor:
        """Way of each trigger's control, int64 ``(ways, samples)``."""
        _, ways, samples = self.answers.shape
        others = torch.tensor([[other for other in range(ways) if other != way] for way in range(ways)])
        return others[:, torch.arange(samples) % (ways - 1)]

    def soft_controls(self) -> Tensor | None:
        """What the probabilities of each trigger's matched control say, in the shape of ``soft``."""
        if self.soft is None:
            return None
        return self.soft.gather(1, self._control_ways()[None, :, :, None].expand_as(self.soft))

    def table(self, decoy_samples: int = 32) -> Tensor:
        """How far each cell leans to each class, float64 ``(pairs, ways, classes)``: what keys are ranked by."""
        if self.soft is None:
            return self.counts(decoy_samples).double() / decoy_samples
        return self.soft[:, :, :decoy_samples].sum(2, dtype=torch.int64).double() / (UNIT * decoy_samples)

    def responses(
        self, key: WatermarkKey, decoys: int = 9999, decoy_samples: int = 32, references: Sequence[AnswerTable] = ()
    ) -> Responses:
        """Returns what a verification of this suspect under a key would have collected.

        Args:
            key: A key of the space.
            decoys: Keys to compare with; see :class:`~meadef_lightning.verification.VerificationDataModule`.
            decoy_samples: Samples of each cell that count, at most those that were asked.
            references: The same tables of reference models.

        Raises:
            ValueError: If the key is of another space, or the reference was asked something else.
        """
        plan = DecoyTable(key, decoys, self.seed)
        if plan.space != self.space:
            raise ValueError("The key is not of the space whose questions were asked.")
        if any(
            known.space != self.space or known.seed != self.seed or known.answers.shape != self.answers.shape
            for known in references
        ):
            raise ValueError("A reference was asked other questions than the suspect.")
        classes = self.space.num_classes
        a, b = key.source_classes
        rows = plan.pairs[:, 0] * (classes - 1) + plan.pairs[:, 1] - (plan.pairs[:, 1] > plan.pairs[:, 0]).long()
        own = a * (classes - 1) + b - (b > a)

        def cells(table: AnswerTable) -> Tensor:
            return table.counts(decoy_samples)[rows].flatten(0, 1)

        def soft_cells(table: AnswerTable) -> Tensor | None:
            if table.soft is None:
                return None
            return table.soft[rows, :, :decoy_samples].sum(2, dtype=torch.int64).flatten(0, 1)[:, plan.targets]

        soft, summed = None, soft_cells(self)
        if self.soft is not None and summed is not None:
            shares = self.soft[own, ..., key.target_class].long()  # of this key's sources, in all ways
            control = shares.gather(0, self._control_ways()[plan.way][None])[0]
            soft = SoftAnswers(shares[plan.way], control, summed)
        return Responses(
            trigger=self.answers[own, plan.way].long(),
            control=self.controls()[own, plan.way].long(),
            cells=plan.cells,
            counts=cells(self),
            natural=self.natural.long(),
            natural_labels=self.natural_labels.long(),
            decoys=decoys,
            seed=self.seed,
            references=tuple(Reference(cells(known), soft=soft_cells(known)) for known in references),
            soft=soft,
        )


def ask_everything(
    suspect: nn.Module | Queryable,
    data: SourceData,
    samples: int = 100,
    combiners: tuple[CombinerSpec, ...] = DEFAULT_COMBINERS,
    seed: int = 0,
    batch_size: int = 512,
) -> AnswerTable:
    """Asks a suspect the questions of every key.

    Args:
        suspect: A module in the mode in which it shall answer, asked where it lies, or a black box with ``query(x)``.
        data: Data module of the task; sources are of its verification split.
        samples: Triggers of every key, at least 2.
        combiners: Combining ways of the space.
        seed: The verifier's seed.
        batch_size: Samples a forward.

    Raises:
        ValueError: If a class has too few verification samples, there are too many keys, or an answer is none.
    """
    data.setup("predict")
    space = KeySpace(data.num_classes, combiners)
    if space.size > MAX_DECOYS:
        raise ValueError(
            f"{space.num_classes} classes and {len(combiners)} ways make {space.size:.2g} keys; the questions of all are asked for up to "
            f"{MAX_DECOYS:.2g} only. Study a part of the classes, or verify single keys: verify(…, decoys=999)."
        )
    a, b, target, way = space.key_at(0)
    any_key = WatermarkKey((a, b), target, space.num_classes, combiners[way], space=combiners)
    # with as many samples in a cell as triggers, the decoy loader holds all triggers and controls of all keys
    questions = VerificationDataModule(any_key, data, samples, space.size, samples, seed, batch_size)
    questions.setup("predict")
    _, _, cells, natural = questions.predict_dataloader()
    weights = suspect.parameters() if isinstance(suspect, nn.Module) else iter(())
    device = next((weight.device for weight in weights), torch.device("cpu"))

    sources = questions.table.pairs.repeat_interleave(samples, 0)
    shares: list[Tensor] = []
    logits: list[Tensor] = []  # whether a batch can only be that, which is decided for all together

    def ask(x: Tensor, positions: Tensor, composites: bool) -> Tensor:
        answers = suspect(x.to(device)) if isinstance(suspect, nn.Module) else suspect.query(x)
        labels = answered_labels(answers, len(x), space.num_classes)
        if answers.ndim == 2:
            logits.append(~can_be_probabilities(answers))
        if composites and answers.ndim == 2 and space.num_classes > 3:
            pair = sources[positions % len(sources)].to(answers.device)
            shares.append(torch.stack([remaining_shares(p, pair) for p in readings(answers)], 1).short().cpu())
        return labels.cpu()

    answered = []
    for loader in (cells, natural):
        with torch.inference_mode():
            labels = torch.cat([ask(x, positions, loader is cells) for x, positions in loader])
        if bool((labels == INVALID).any()):
            raise ValueError("The suspect gave an answer that is none (NaN, or a label that is no class).")
        answered.append(labels.short())

    def by_pair(values: Tensor) -> Tensor:
        # asked way by way, kept pair by pair
        return values.reshape(len(combiners), -1, samples, *values.shape[1:]).transpose(0, 1).contiguous()

    soft = None
    if sum(map(len, shares)) == len(answered[0]):
        soft = by_pair(torch.cat(shares)[:, int(any(logits))])
    return AnswerTable(by_pair(answered[0]), answered[1], questions.natural[1].short(), space, seed, soft)


def every_decoy_p(table: AnswerTable, references: Sequence[AnswerTable] = (), decoy_samples: int = 32) -> Tensor:
    """Returns every key's randomisation p-value among all keys, float64 ``(pairs, ways, classes)``; 1 where no key is.

    Equal to ``judge(…).decoy_p`` where all keys of the space are compared.
    """
    possible = possible_targets(table.pairs, table.space.num_classes)[:, None, :]
    valid = possible.expand(-1, len(table.space.combiners), -1)

    models = _alike([table, *references])
    leaning, *known = (model.table(decoy_samples) for model in models)
    if known:
        stacked = torch.stack(known)
        usual = usual_variance(stacked, table.pairs) if len(known) > 1 else None
        leaning = above_references(leaning, stacked, usual)
    own = key_scores(leaning, table.pairs)[valid]
    ordered = own.sort().values
    reached = len(ordered) - torch.searchsorted(ordered, own - _TIE)
    return torch.ones(valid.shape, dtype=torch.float64).masked_scatter_(valid, reached.double() / len(ordered))


def _alike(tables: Sequence[AnswerTable]) -> list[AnswerTable]:
    """Leaves what probabilities say out where one of these models answers with labels."""
    soft = all(table.soft is not None for table in tables)
    return [table if soft else replace(table, soft=None) for table in tables]


def every_mcnemar_p(table: AnswerTable, references: Sequence[AnswerTable] = ()) -> Tensor:
    """Returns every key's p-value against its matched controls, float64 ``(pairs, ways, classes)``. Equal to ``judge(…).mcnemar_p``."""
    table, *_ = _alike([table, *references])
    shares, soft_controls = table.soft, table.soft_controls()
    if shares is not None and soft_controls is not None:
        told, false_told = shares > MAJORITY, soft_controls > MAJORITY
        discordant = torch.stack([(told & ~false_told).sum(2), (false_told & ~told).sum(2)])
    else:
        controls = table.controls()
        differ = table.answers != controls
        discordant = torch.zeros(2, *table.answers.shape[:2], table.space.num_classes, dtype=torch.int64)
        for place, answers in enumerate((table.answers, controls)):
            discordant[place].scatter_add_(2, answers.long(), differ.long())
    only_trigger, only_control = discordant.numpy()
    return torch.from_numpy(np.asarray(stats.binom.sf(only_trigger - 1, only_trigger + only_control, 0.5)))


def supported_keys(
    table: AnswerTable, references: Sequence[AnswerTable] = (), alpha: float = 1e-3, decoy_samples: int = 32
) -> Tensor:
    """Marks the keys under which the suspect would be judged *supported*, had they been drawn; bool ``(pairs, ways, classes)``."""
    decoy_p = every_decoy_p(table, references, decoy_samples)
    return (decoy_p <= alpha) & (every_mcnemar_p(table, references) <= alpha)
