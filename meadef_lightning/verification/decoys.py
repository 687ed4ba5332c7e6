"""The keys that were not drawn: which ones a key is compared with, and the statistics of all of them from one table of answers.

Nothing here touches a model. The answers of a suspect to *every* cell (source pair and combining way) give the statistic of every key at
once, so the true key and its decoys are computed from the same table by the same arithmetic, and their rank is an exact randomisation
test (see :func:`~.statistics.randomisation_p_value`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meadef_lightning.verification.scores import above_references, key_scores, possible_targets, usual_variance
from meadef_lightning.verification.statistics import correlation_of_sums
from meadef_lightning.watermark.key import KeySpace, WatermarkKey

MAX_DECOYS = 10_000_000
MAX_TABLE = 1 << 27
"""Entries that a table of answers may have: 1 GiB."""
MANY_CLASSES = 1024
"""Beyond these a table of answers tells only the classes apart that are a compared key's target."""
_BLOCK = 128
_ONE_WORD = 1 << 44  # keys up to which 64 random bits modulo their number favour none by more than 1e-6


def seeded_stream(count: int, *context: str | int) -> NDArray[np.uint64]:
    """Returns ``count`` uniform 64-bit numbers that depend on nothing but ``context`` (SHAKE-256).

    Evidence is checked again years later: unlike the streams of a library's generator, these never change with a version.
    """
    digest = hashlib.shake_256(json.dumps(context, separators=(",", ":")).encode()).digest(8 * count)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def seeded_permutation(count: int, *context: str | int) -> Tensor:
    """Returns a permutation of ``range(count)``, int64, that depends on nothing but ``context``."""
    return torch.from_numpy(np.argsort(seeded_stream(count, *context), kind="stable").astype(np.int64))


@dataclass(frozen=True)
class DecoyTable:
    """Which other keys a key is compared with, and how a table of answers gives all their statistics.

    A key is (source a, source b, target t, combining way c). A *cell* is (a, b, c); of each cell the suspect answers the same
    number of samples. The statistic of a key is how far its cell leans to its target, weighed with what the keys that share a source, the
    target and the way gain, and with the reversed sources: :func:`~.scores.key_scores`.

    When ``decoys`` is at least the size of the key space, every key of the space is compared. Otherwise that many keys are drawn,
    independently and uniformly, with a seed that mixes the verifier's with the key's salt: the owner, bound by the commitment,
    cannot steer the draw, nobody who reads the evidence can repeat it without the key, and two keys get separate draws.

    **Memory.** A table of answers has (source pairs) · ways · classes entries, which drawn decoys bound: a decoy adds a pair at most.
    Beyond ``MANY_CLASSES`` classes it has no column for a class that no compared key has as its target, which no statistic looks
    at; all these share one last column. So a table of
    999 decoys takes 64 MB at most, for a thousand classes as for a million; there is one for the suspect and one for each reference.

    Args:
        key: The true key.
        decoys: Number of decoy keys wanted, from 1 to ``MAX_DECOYS``.
        seed: The verifier's seed, at least 0 and below 2⁶³.

    Raises:
        ValueError: If a number is out of range, the key has only one combining way and hence no controls, or the table would have
            more than ``MAX_TABLE`` entries.
    """

    key: WatermarkKey
    decoys: int = 9999
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.decoys <= MAX_DECOYS:
            raise ValueError(f"decoys={self.decoys} must be between 1 and {MAX_DECOYS}; 9999 reaches p = 1e-4.")
        if not 0 <= self.seed < 1 << 63:  # as evidence holds it
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**63.")
        if len(self.space.combiners) < 2:
            raise ValueError(
                "The key's space has one combining way, so there are no controls to compare with. "
                "Use a key whose space has at least two ways."
            )
        if not self.enumerated and self._most_entries(self.decoys) > MAX_TABLE:
            fitting = max((n for n in (9, 99, 999, 9999, 99999) if self._most_entries(n) <= MAX_TABLE), default=1)
            raise ValueError(
                f"decoys={self.decoys} drawn among {self.key.num_classes} classes need a table of up to "
                f"{self._most_entries(self.decoys):.2g} entries, more than {MAX_TABLE:.2g}. Use decoys={fitting}, which reaches "
                f"p = {1 / (fitting + 1):.2g}."
            )

    def _width(self, decoys: int) -> int:
        """Most classes that a table with so many drawn decoys tells apart."""
        classes = self.key.num_classes
        return classes if classes <= MANY_CLASSES else min(decoys + 2, classes)

    def _most_entries(self, decoys: int) -> int:
        """Most entries of a table with so many drawn decoys."""
        pairs = min(decoys + 1, self.key.num_classes * (self.key.num_classes - 1))
        return pairs * len(self.space.combiners) * self._width(decoys)

    @cached_property
    def space(self) -> KeySpace:
        """The keys that are compared: the key's space, and the key's own way where that is not in it."""
        ways = self.key.space
        return KeySpace(self.key.num_classes, ways if self.key.combiner in ways else (*ways, self.key.combiner))

    @property
    def exact(self) -> bool:
        """Whether the key was drawn uniformly from the space it is compared with."""
        return self.key.drawn_uniformly and self.key.combiner in self.key.space

    @property
    def enumerated(self) -> bool:
        """Whether all keys of the space are compared instead of a draw."""
        return self.decoys >= self.space.size

    @property
    def way(self) -> int:
        """Position of the key's combining way in ``space.combiners``."""
        return self.space.combiners.index(self.key.combiner)

    @cached_property
    def drawn(self) -> Tensor:
        """The drawn decoys, shape ``(B, 4)``: source a, source b, target, way; int64. They may repeat, or hit the key."""
        size = self.space.size
        if size <= _ONE_WORD:
            bits = seeded_stream(self.decoys, "decoys", self.key.salt, self.seed)
            indices = (bits % np.uint64(size)).tolist()
        else:  # of a million classes there are 8e18 keys: one word modulo that would favour some by half
            words = seeded_stream(2 * self.decoys, "decoys", self.key.salt, self.seed).reshape(-1, 2).tolist()
            indices = [((high << 64) | low) % size for high, low in words]
        return torch.tensor([self.space.key_at(index) for index in indices], dtype=torch.int64)

    @cached_property
    def targets(self) -> Tensor:
        """The classes that a table of answers tells apart, sorted, int64 ``(K,)``: all, or of many the compared keys' targets."""
        if self.enumerated or self.key.num_classes <= MANY_CLASSES:
            return torch.arange(self.key.num_classes)
        return torch.tensor(sorted({*self.drawn[:, 2].tolist(), self.key.target_class}))

    @property
    def width(self) -> int:
        """Columns of a table of answers: one for each of ``targets``, and a last one for all other classes, if there are any."""
        return len(self.targets) + (len(self.targets) < self.key.num_classes)

    def columns(self, answers: Tensor) -> Tensor:
        """Returns the column of a table that counts each answered class, int64, in the shape of ``answers``."""
        if len(self.targets) == self.key.num_classes:
            return answers
        column = torch.searchsorted(self.targets, answers.contiguous())
        known = self.targets[column.clamp(max=len(self.targets) - 1)] == answers
        return torch.where(known, column, len(self.targets))

    @cached_property
    def pairs(self) -> Tensor:
        """The ordered source pairs that are asked, sorted, shape ``(P, 2)``, int64."""
        classes = self.key.num_classes
        if self.enumerated:
            codes = torch.arange(classes * classes)
            codes = codes[codes // classes != codes % classes]
        else:
            a, b = self.key.source_classes
            asked = {(a, b), *map(tuple, self.drawn[:, :2].tolist())}
            codes = torch.tensor(sorted(first * classes + second for first, second in asked))
        return torch.stack([codes // classes, codes % classes], dim=1)

    @property
    def cells(self) -> Tensor:
        """The cells, sorted by source a, source b and way, shape ``(P · ways, 3)``, int64."""
        ways = len(self.space.combiners)
        return torch.cat(
            [self.pairs.repeat_interleave(ways, 0), torch.arange(ways).repeat(len(self.pairs))[:, None]], dim=1
        )

    def samples(self, counts: Tensor) -> int:
        """Checks a table of counts, and returns the number of answers in each cell.

        Args:
            counts: As in :meth:`shares`.

        Raises:
            ValueError: If the table has another form, or its cells do not hold equally many answers.
        """
        return self._table(counts)[1]

    def _table(self, counts: Tensor) -> tuple[Tensor, int]:
        """Checks the counts and returns them as ``(pairs, ways, width)``, and the answers in each cell."""
        ways = len(self.space.combiners)
        shape = (len(self.pairs) * ways, self.width)
        if tuple(counts.shape) != shape or counts.dtype != torch.int64:
            raise ValueError(
                f"The table of answers must be int64 of shape {shape} (cells, classes), got {counts.dtype} of shape {tuple(counts.shape)}."
            )
        sizes = counts.sum(1)
        samples = int(sizes[0])
        if samples < 1 or bool((counts < 0).any()) or bool((sizes != samples).any()):
            raise ValueError("Every cell of the table must hold the same number of answers, at least one.")
        return counts.reshape(len(self.pairs), ways, self.width), samples

    def _position(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the rows of ``pairs`` that hold the given source pairs."""
        classes = self.key.num_classes
        return torch.searchsorted(self.pairs[:, 0] * classes + self.pairs[:, 1], a * classes + b)

    def _true_key(self) -> tuple[int, int, int]:
        """Position of the true key in a table ``(pairs, ways, targets)``."""
        a, b = self.key.source_classes
        target = int(self.columns(torch.tensor([self.key.target_class]))[0])
        return int(self._position(torch.tensor([a]), torch.tensor([b]))[0]), self.way, target

    def _other_keys(self) -> Tensor:
        """Marks every key of the asked cells but the true one, shape ``(pairs, ways, targets)``, bool."""
        possible = possible_targets(self.pairs, self.targets)
        mask = possible[:, None, :].repeat(1, len(self.space.combiners), 1)
        mask[self._true_key()] = False
        return mask

    def shares(self, counts: Tensor) -> Tensor:
        """Turns a table of counts into shares of answers.

        Args:
            counts: How often each cell was answered with each class, shape ``(cells, width)``, int64, in the order of ``cells`` and
                of :meth:`columns`.

        Returns:
            Float64, shape ``(cells, targets)``.

        Raises:
            ValueError: If the table has another form, or its cells do not hold equally many answers.
        """
        table, samples = self._table(counts)
        # whole numbers, divided last: equal counts give equal shares
        return (table.flatten(0, 1)[:, : len(self.targets)].double()) / samples

    def statistics(self, table: Tensor, references: Sequence[Tensor] = ()) -> tuple[float, Tensor]:
        """Computes the statistic of the true key and of its decoys.

        Some composites look like a third class to any model. Reference models that were trained without regard to the key show which, and
        how much that varies from model to model; see :func:`~.scores.above_references`. They do not depend on which key was drawn, so the
        rank of the true key stays exact, and the natural look-alikes no longer hide it.

        Args:
            table: How far each cell leans to each of ``targets``, e.g. :meth:`shares`, or how near a cell's features are to each class;
                float64, shape ``(cells, targets)``, in the order of ``cells``.
            references: The same of each reference model, on the same samples.

        Returns:
            The true key's statistic and the decoys', shape ``(B,)``, float64; of a table in ``[0, 1]`` without references in
            ``[-1, 1]``. Where all keys are compared these are all the others, ``B = size - 1``.

        Raises:
            ValueError: If a table has another form, or is not finite.
        """
        ways, classes = len(self.space.combiners), len(self.targets)
        shape = (len(self.pairs) * ways, classes)
        for part in (table, *references):
            if tuple(part.shape) != shape or part.dtype != torch.float64 or not bool(part.isfinite().all()):
                raise ValueError(
                    f"The scores must be finite float64 of shape {shape} (cells, classes), got {part.dtype} of shape {tuple(part.shape)}."
                )
        own, *known = (part.reshape(len(self.pairs), ways, classes) for part in (table, *references))
        result = self._of_keys(own, torch.stack(known) if known else None)
        return float(result[-1]), result[:-1]

    def _of_keys(self, own: Tensor, known: Tensor | None) -> Tensor:
        """Returns the statistics of the decoys and, last, of the true key, from tables ``(pairs, ways, targets)``."""
        pair, way, column = self._true_key()
        usual = None if known is None or len(known) == 1 else usual_variance(known, self.pairs, self.targets)

        def values(columns: slice) -> Tensor:
            # columns do not depend on one another, so a large table is gone through in blocks
            part = own[..., columns]
            if known is not None:
                part = above_references(part, known[..., columns], usual)
            return key_scores(part, self.pairs, classes=self.targets[columns])

        if self.enumerated:
            every = values(slice(None))
            return torch.cat([every[self._other_keys()], every[pair, way, column][None]])
        a, b, target, ways = self.drawn.unbind(1)
        places = torch.cat([self._position(a, b), torch.tensor([pair])])
        ways = torch.cat([ways, torch.tensor([way])])
        targets = torch.cat([self.columns(target), torch.tensor([column])])
        result = torch.empty(len(targets), dtype=torch.float64)
        for columns in self._blocks():
            here = ((targets >= columns.start) & (targets < columns.stop)).nonzero().flatten()
            result[here] = values(columns)[places[here], ways[here], targets[here] - columns.start]
        return result

    def _blocks(self) -> list[slice]:
        """Cuts the columns of ``targets`` into blocks, and those of few classes into one."""
        size = len(self.targets)
        step = size if size <= 2 * _BLOCK else _BLOCK
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def correlation(self, counts: Tensor) -> float | None:
        """Returns :func:`~.statistics.intraclass_correlation` of the other keys' successes; ``None`` with one answer a cell, or one key."""
        table, samples = self._table(counts)
        if samples == 1:
            return None
        true = int(table[self._true_key()])
        cells, hits, squares = -1, -true, -true * true
        for columns in self._blocks():
            possible = possible_targets(self.pairs, self.targets[columns])[:, None, :]
            part = table[..., columns] * possible
            cells += int(possible.sum()) * len(self.space.combiners)
            hits, squares = hits + int(part.sum()), squares + int((part * part).sum())
        return correlation_of_sums(cells, hits, squares, samples) if cells > 1 else None
