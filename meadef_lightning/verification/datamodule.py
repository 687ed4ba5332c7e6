"""What a suspect is asked: watermark samples, their controls, the samples of every other key, and natural samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meadef_lightning.data.stored import Images, read_split
from meadef_lightning.verification.decoys import DecoyTable, seeded_permutation, seeded_stream
from meadef_lightning.verification.responses import Responses, SoftAnswers
from meadef_lightning.watermark.combiners import Combiner
from meadef_lightning.watermark.key import WatermarkKey

Batch = tuple[Tensor, Tensor]


class SourceData(Protocol):
    """What verification needs of a data module; :class:`~meadef_lightning.data.SplitDataModule` has it."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""

    def prepare_data(self) -> None:
        """Downloads what is missing."""

    def setup(self, stage: str) -> None:
        """Makes the splits."""

    def tensors(self, split: Literal["verification", "test"]) -> tuple[Tensor, Tensor]:
        """Returns samples ``(N, C, *spatial)`` in the model's input space and labels ``(N,)``, int64."""


def source_pairs(labels: Tensor, a: int, b: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs the samples of two classes: ``count`` different pairs that use every sample about equally often.

    The pairs depend on nothing but the labels, the two classes and the seed, so every key with these sources gets the same ones,
    and a shorter list is the beginning of a longer one.

    Args:
        labels: Class of each sample, shape ``(N,)``.
        a: Class of the first source.
        b: Class of the second source.
        count: Number of pairs, at most (samples of a) · (samples of b).
        seed: The verifier's seed.

    Returns:
        Positions of the first and of the second sample of each pair, each int64 of shape ``(count,)``.

    Raises:
        ValueError: If there are not enough pairs.
    """
    return _pair([(labels == c).nonzero().flatten() for c in (a, b)], a, b, count, seed)


def _pair(sides: Sequence[Tensor], a: int, b: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """:func:`source_pairs`, with the positions of the samples of ``a`` and of ``b`` known."""
    na, nb = (len(side) for side in sides)
    if count > na * nb:
        raise ValueError(f"{na} and {nb} samples make {na * nb} different pairs, fewer than {count}.")
    first, second = (
        side[seeded_permutation(len(side), "pairs", seed, a, b, place)] for place, side in enumerate(sides)
    )
    # (i mod na, i mod nb) runs through lcm(na, nb) different pairs; shifting by one after each run gives all na·nb
    i = torch.arange(count)
    return first[i % na], second[(i + i // math.lcm(na, nb)) % nb]


class _Indexed(Dataset[Batch]):
    """A map-style data set that makes a whole batch at once and says which of its items the batch holds.

    Samplers pick items (also Lightning's distributed one), so a run can be spread over processes and put together again.
    """

    def __init__(self, x: Images) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Batch:
        x, indices = self.__getitems__([index])
        return x[0], indices[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        items = torch.as_tensor(indices)
        return self.build(items), items

    def build(self, items: Tensor) -> Tensor:
        return self.x[items]


class _Composites(_Indexed):
    """Combined samples, made when they are asked for: item i combines ``x[first[i]]`` and ``x[second[i]]`` in way ``ways[i]``."""

    def __init__(
        self, x: Images, first: Tensor, second: Tensor, ways: Tensor, combiners: Sequence[Combiner], seed: int
    ) -> None:
        super().__init__(x)
        self.first, self.second, self.ways, self.combiners, self.seed = first, second, ways, combiners, seed

    def __len__(self) -> int:
        return len(self.ways)

    def build(self, items: Tensor) -> Tensor:
        ways = self.ways[items]
        combined: Tensor | None = None
        for way in sorted(set(ways.tolist())):
            chosen = (ways == way).nonzero().flatten()
            # a way that draws random numbers gets the same ones whenever the same batch is made
            start = int(seeded_stream(1, "combiner", self.seed, way, int(items[0]))[0]) >> 1
            a, b = (self.x[side[items[chosen]]] for side in (self.first, self.second))
            part: Tensor = self.combiners[way](a, b, torch.Generator().manual_seed(start))
            if len(chosen) == len(items):
                return part
            combined = part.new_empty(len(items), *part.shape[1:]) if combined is None else combined
            combined[chosen] = part
        if combined is None:
            raise IndexError("An empty batch was asked for.")
        return combined


def _as_is(batch: Any) -> Any:
    """Leaves a batch that the data set made as it is."""
    return batch


class VerificationDataModule(LightningDataModule):
    """Everything that a suspect is asked, as four predict loaders: trigger, control, decoy, natural.

    * *trigger*: pairs of source samples combined in the key's way;
    * *control*: the same pairs, each combined in one of the other ways of the key's space in turn, so that trigger ``i`` and
      control ``i`` are matched;
    * *decoy*: ``decoy_samples`` composites of every cell that the true key or a decoy key needs (:class:`DecoyTable`), ordered by
      combining way; the true key's own statistic comes from here, too;
    * *natural*: the test split as it is.

    Sources come from the *verification* split only. Batches are ``(x, index)``: samples in the model's input space, and their
    positions within the loader. A composite is made when its batch is, so memory stays at the two splits and four times a batch;
    splits of more than 4 GiB stay on disk (:mod:`meadef_lightning.data.stored`), and are read a batch at a time. The decoys are
    what costs: (source pairs asked) · ways · ``decoy_samples`` forwards, 23,040 for ten classes and eight ways, and about 240,000
    for a hundred classes and 999 decoys.

    Args:
        key: The key to be verified.
        data: Data module of the task.
        samples: Triggers, and controls, at most; fewer where the classes do not make so many different source pairs. The number
            is the same whatever the key's classes are, since a number that depends on them would give them away.
        decoys: Keys to compare with; from the size of the key space on, all of them are (an exact permutation test).
        decoy_samples: Composites of each cell, at least 2.
        seed: The verifier's seed: it pairs the sources and draws the decoys.
        batch_size: Samples a forward.

    Raises:
        ValueError: If a number is out of range (here), or a class has too few verification samples (in ``setup``).
        MisconfigurationException: In ``setup``, if key and data disagree on the number of classes.
    """

    loaders: tuple[str, ...] = ("trigger", "control", "decoy", "natural")
    """What each predict loader holds."""

    def __init__(
        self,
        key: WatermarkKey,
        data: SourceData,
        samples: int = 512,
        decoys: int = 9999,
        decoy_samples: int = 32,
        seed: int = 0,
        batch_size: int = 512,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("samples", samples, 1),
            ("decoy_samples", decoy_samples, 2),
            ("batch_size", batch_size, 1),
        ):
            if value < low:
                raise ValueError(f"{name}={value} must be at least {low}.")
        self.key, self.data = key, data
        self.samples, self.decoy_samples, self.batch_size = samples, decoy_samples, batch_size
        self.table = DecoyTable(key, decoys, seed)
        self.num_classes = key.num_classes
        self._datasets: tuple[_Indexed, ...] = ()

    def prepare_data(self) -> None:
        """Lets the task's data module download what it needs."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Reads the two splits and plans the questions.

        Args:
            stage: Given by Lightning; verification is prediction.
        """
        if self._datasets:
            return
        self.data.setup("predict")
        if self.data.num_classes != self.num_classes:
            raise MisconfigurationException(
                f"The key is for {self.num_classes} classes but the data has {self.data.num_classes}. "
                "Verify with the data of the task that the key was made for."
            )
        self.sources, self.natural = read_split(self.data, "verification"), read_split(self.data, "test")
        x, labels = self.sources
        if len(self.natural[0]) == 0:
            raise ValueError("The test split is empty; verification reports the suspect's accuracy on it.")
        triggers = self._number_of_triggers(labels)
        combiners = [spec.build() for spec in self.table.space.combiners]
        for combiner in combiners:
            # a way that cannot combine this data fails here, before a query, and whether or not it is the key's
            combiner(x[:1], x[:1], torch.Generator().manual_seed(0))

        def dataset(paired: tuple[Tensor, Tensor], ways: Tensor) -> _Composites:
            return _Composites(x, *paired, ways, combiners, self.table.seed)

        # sorted once: a search through all labels for each pair takes minutes where there are millions
        order, ends = labels.argsort(stable=True), torch.bincount(labels, minlength=self.num_classes).cumsum(0).tolist()

        def pairs(a: int, b: int, count: int) -> tuple[Tensor, Tensor]:
            sides = [order[ends[c - 1] if c else 0 : ends[c]] for c in (a, b)]
            return _pair(sides, a, b, count, self.table.seed)

        own = pairs(*self.key.source_classes, triggers)
        others = torch.tensor([way for way in range(len(combiners)) if way != self.table.way])
        cells = [pairs(a, b, self.decoy_samples) for a, b in self.table.pairs.tolist()]
        each = torch.cat([pair[0] for pair in cells]), torch.cat([pair[1] for pair in cells])
        self._datasets = (
            dataset(own, torch.full((triggers,), self.table.way)),
            dataset(own, others[torch.arange(triggers) % len(others)]),
            dataset(
                (each[0].repeat(len(combiners)), each[1].repeat(len(combiners))),
                torch.arange(len(combiners)).repeat_interleave(len(each[0])),
            ),
            _Indexed(self.natural[0]),
        )

    def _number_of_triggers(self, labels: Tensor) -> int:
        """Checks that every class has sources enough, whatever the key is, and returns the number of triggers."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"The verification split has labels from {int(labels.min())} to {int(labels.max())}, but the task has classes 0 to "
                f"{self.num_classes - 1}."
            )
        counts = torch.bincount(labels, minlength=self.num_classes)
        (small, less), (n, m) = counts.argsort(stable=True)[:2].tolist(), counts.sort().values[:2].tolist()
        few = f"Class {small} has {n} sample(s) in the verification split"
        if n == 0:
            raise ValueError(
                f"{few}, but every class is a possible source. Enlarge the split (verification_size) or add samples of that class."
            )
        if n * m < self.decoy_samples:
            raise ValueError(
                f"{few} and class {less} has {m}: together they make {n * m} different source pairs, fewer than "
                f"decoy_samples={self.decoy_samples}. Enlarge the split (verification_size) or lower decoy_samples to {n * m}."
            )
        if n * m < self.samples:
            rank_zero_warn(
                f"{few} and class {less} has {m}: {n * m} triggers are used instead of samples={self.samples}. "
                "Enlarge the split (verification_size) for narrower intervals."
            )
        return int(min(self.samples, n * m))

    @property
    def sizes(self) -> list[int]:
        """How many samples there are of each kind: trigger, control, decoy, natural; none before ``setup``."""
        return [len(dataset) for dataset in self._datasets]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """Returns the loaders trigger, control, decoy and natural, in this order."""
        return [
            DataLoader(dataset, batch_size=self.batch_size, shuffle=False, collate_fn=_as_is)
            for dataset in self._datasets
        ]

    def places(self, positions: Tensor, dataloader_idx: int) -> Tensor:
        """Returns the places of a loader's items in plain order: all kinds one after the other.

        Args:
            positions: What batches hold beside their samples, int64 ``(B,)``.
            dataloader_idx: Which of :meth:`predict_dataloader`.
        """
        return positions + sum(self.sizes[:dataloader_idx])

    def cells_of(self, places: Tensor) -> Tensor:
        """Returns which row of ``DecoyTable.cells`` a sample belongs to, by its place in plain order; -1 for what is no decoy sample."""
        ways, pairs = len(self.table.space.combiners), len(self.table.pairs)
        first, last = sum(self.sizes[:2]), sum(self.sizes[:3])
        group = (places - first) // self.decoy_samples  # asked way by way, kept pair by pair
        return torch.where((places >= first) & (places < last), group % pairs * ways + group // pairs, -1)

    def responses(self, answers: Sequence[Tensor], soft: tuple[Tensor, Tensor] | None = None) -> Responses:
        """Sorts the answers to the four loaders into what :func:`~meadef_lightning.verification.verdict.judge` reads.

        Args:
            answers: For each loader the answered classes in the order of its items, int64 in ``[0, num_classes)``.
            soft: Where the suspect gives probabilities: the key's target's remaining share of each sample, in plain order, and the sums of
                all classes' by cell, thousandths (:func:`~.remaining.remaining_shares`); int64, ``(sum(sizes),)`` and ``(cells, targets)``.

        Raises:
            ValueError: If there are not four, or one is incomplete.
        """
        if [len(answer) for answer in answers] != self.sizes:
            raise ValueError(
                f"The loaders ask {self.sizes} samples, got {[len(answer) for answer in answers]} answers."
            )
        trigger, control, decoy, natural = (answer.cpu().long() for answer in answers)
        ways, pairs, width = len(self.table.space.combiners), len(self.table.pairs), self.table.width
        # asked way by way, kept pair by pair
        by_cell = decoy.reshape(ways, pairs, self.decoy_samples).transpose(0, 1).reshape(pairs * ways, -1)
        codes = self.table.columns(by_cell) + torch.arange(pairs * ways)[:, None] * width
        counts = torch.bincount(codes.flatten(), minlength=pairs * ways * width).reshape(pairs * ways, width)
        answered = None
        if soft is not None:
            aimed = torch.split(soft[0].cpu(), self.sizes)
            answered = SoftAnswers(aimed[0], aimed[1], soft[1].cpu())
        return Responses(
            trigger=trigger,
            control=control,
            cells=self.table.cells,
            counts=counts,
            natural=natural,
            natural_labels=self.natural[1],
            decoys=self.table.decoys,
            seed=self.table.seed,
            soft=answered,
        )
