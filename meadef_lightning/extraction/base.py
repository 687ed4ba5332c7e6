"""What every theft through an oracle shares: a transfer set, and the loaders that train and test a student on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from meadef_lightning import processes
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.loading import EpochShuffle, ResumableDataModule, ResumableLoader
from meadef_lightning.extraction.pools import AttackerSplit, Pool
from meadef_lightning.oracle import BlackBox, row_digests


@dataclass(frozen=True)
class TransferSet:
    """What a thief trains on: the inputs that were asked, and the victim's answers to them.

    Args:
        x: Queries, ``(N, C, H, W)`` on the CPU, in the victim's input space.
        answers: What the oracle answered, ``(N, K)`` float32 or ``(N,)`` int64.
        held_out: ``(N,)`` bool: rows that validate the student instead of training it.
        y: True classes, ``(N,)`` int64, where the pool has them. The student never sees them; they only serve to report an
            accuracy on the held-out rows.
    """

    x: Tensor
    answers: Tensor
    held_out: Tensor
    y: Tensor | None = None


def held_out_rows(rows: int, fraction: float) -> Tensor:
    """Marks the last ``round(fraction · rows)`` of ``rows`` rows, as a bool tensor ``(rows,)``, for validation."""
    return torch.arange(rows) >= rows - round(fraction * rows)


class TensorBatches(Dataset[tuple[Tensor, ...]]):
    """Tensors in memory, fetched a whole batch at a time; its loaders need ``collate_fn=as_is``.

    Args:
        tensors: Tensors with the same number of rows.
        rows: Which of their rows to serve, int64 ``(M,)``, in any order and any number of times, without copying the tensors;
            all by default.

    Raises:
        ValueError: If the numbers of rows differ.
    """

    def __init__(self, *tensors: Tensor, rows: Tensor | None = None) -> None:
        if len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError(f"All tensors need the same number of rows, got {[len(tensor) for tensor in tensors]}.")
        self.tensors = tensors
        self.rows = torch.arange(len(tensors[0])) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[self.rows[index]] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The rows with these indices of each tensor, as one batch."""
        rows = self.rows[torch.as_tensor(indices)]
        return tuple(tensor[rows] for tensor in self.tensors)


def require_classes(oracle: BlackBox, attack: str) -> None:
    """Refuses an oracle that answers with an encoder's features, for an attack that needs classes.

    Args:
        oracle: The oracle.
        attack: Name of the attack, for the message.

    Raises:
        MisconfigurationException: If the oracle answers with features.
    """
    if oracle.labels == "feature":
        raise MisconfigurationException(
            f"{attack} needs to know the victim's class of an input, but this oracle answers with an encoder's features. Ask a "
            "classifier, or use an attack on encoders."
        )


def as_is(batch: Any) -> Any:
    """Collate nothing: the batch arrives whole."""
    return batch


class ExtractionDataModule(ResumableDataModule, ABC):
    """Base of the thefts: an attack says which inputs to ask (:meth:`collect`), everything else is shared.

    The transfer set is collected once, before the student's training, on one process; the others are told. With a ledger that
    has a path an interrupted theft continues without asking anything twice. Validation batches are ``(x, answer)``, or
    ``(x, answer, y)`` with the true classes where the pool has them. Tests run on the data's test split, ``(x, y)``.

    Args:
        oracle: The victim's only door.
        data: The victim's data splits, of which a theft may see the attacker's only (and be tested on the test split).
        batch_size: Queries in a training batch.
        augmentation: Maps a batch ``(B, C, H, W)`` to one of the same shape; what the student sees is augmented with it anew in
            every epoch, under the answer to the clean query. It should draw for each image anew
            (`meadef_lightning.data.augmentation.RandomShiftFlip`); torchvision's transforms draw once per batch.
        validation_fraction: Share of the queries held out, in ``[0, 1)``; with 0 there is no validation.
        seed: Seed of everything the attack draws, and of the training order.
        pool: Where the images come from; the data's attacker split by default.

    Attributes:
        one_process: Whether the attack can only be run by one process; of several, `meadef run` lets rank zero run it.

    Raises:
        ValueError: If a number is out of range.
    """

    one_process: ClassVar[bool] = False

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {validation_fraction}.")
        self.oracle = oracle
        self.data = data
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.pool = AttackerSplit() if pool is None else pool
        self._transfer: TransferSet | None = None
        self._spent = 0

    @abstractmethod
    def collect(self) -> TransferSet:
        """Chooses the queries and asks them (:meth:`ask`). Runs once, on one process, before the student's training."""

    def epoch_rows(self, transfer: TransferSet) -> Tensor:
        """Which rows of the transfer set an epoch of training is made of.

        Args:
            transfer: The transfer set.

        Returns:
            Row numbers, int64 ``(M,)``: all that are not held out, once, unless an attack repeats or leaves out some.
        """
        return (~transfer.held_out).nonzero().flatten()

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return self.data.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the queries."""
        return self.data.image_shape

    @property
    def feature_dim(self) -> int | None:
        """Number of features of an encoder's answers; ``None`` before `setup`, if the oracle answers with classes, and if nothing was asked yet."""
        answers = None if self._transfer is None else self._transfer.answers
        return (
            answers.shape[1] if answers is not None and answers.ndim == 2 and self.oracle.labels == "feature" else None
        )

    @property
    def queries_spent(self) -> int:
        """Distinct inputs in the transfer set: what it costs with an empty ledger. 0 before `setup`."""
        return self._spent

    @override
    def prepare_data(self) -> None:
        self.data.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Collects the transfer set, once, if the stage needs it.

        Args:
            stage: ``"test"`` and ``"predict"`` need no answers.

        Raises:
            ValueError: If the pool does not hold what the attack needs.
            BudgetExceededError: If the ledger's budget does not cover the queries.
            LedgerError: If the ledger belongs to another victim or policy, or cannot be used.
        """
        self.data.setup(stage)
        if stage in ("test", "predict") or self._transfer is not None:
            return
        transfer = self._collect_once()
        if not bool((~transfer.held_out).any()):
            raise ValueError(
                f"All {len(transfer.x)} queries are held out for validation; raise the number of queries, or lower validation_fraction."
            )
        self._spent = len(set(row_digests(transfer.x)))
        self._transfer = transfer
        rank_zero_info(
            f"{len(transfer.x)} queries, {self._spent} of them distinct, were answered ({self.oracle.labels})."
        )

    def ask(self, x: Tensor, description: str = "Asking the oracle") -> Tensor:
        """Asks the oracle under a progress bar, where there is a terminal to show it.

        Args:
            x: ``(N, C, H, W)`` in the victim's input space.
            description: What the bar says.

        Returns:
            The oracle's answers, see :meth:`meadef_lightning.oracle.Oracle.query`.
        """
        console = Console()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(description, total=len(x))
            return self.oracle.query(x, progress=lambda rows: bar.advance(task, rows))

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Queries with their answers, shuffled anew in each epoch."""
        transfer = self._ready()
        train = TensorBatches(transfer.x, transfer.answers, rows=self.epoch_rows(transfer))
        return self.resumable_loader(
            train,
            batch_size=self.batch_size,
            sampler=EpochShuffle(train, self.seed),
            collate_fn=as_is,
            # A last batch of one image would be the end of a student with batch normalisation
            drop_last=len(train) > self.batch_size,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would advance the global one
        )

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Held-out queries with their answers and, where known, true classes; no loader at all if none are held out."""
        transfer = self._ready()
        rows = transfer.held_out
        if not bool(rows.any()):
            return []
        truth = [] if transfer.y is None else [transfer.y[rows]]
        held_out = TensorBatches(transfer.x[rows], transfer.answers[rows], *truth)
        return DataLoader(held_out, batch_size=self.batch_size, collate_fn=as_is, generator=torch.Generator())

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Test split of the data."""
        return self.data.test_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Test split of the data."""
        return self.data.predict_dataloader()

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments what the student sees while it trains.

        Args:
            batch: ``(x, answer)``.
            dataloader_idx: Number of the loader.

        Returns:
            The batch, augmented while a trainer trains.
        """
        if self.trainer is None:
            return batch
        if self.augmentation is not None and self.trainer.training:
            x, answers = batch
            batch = self.augmentation.to(x.device)(x), answers
        # Lightning calls this hook instead of the model's, not beside it
        return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)

    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report: pool, kind of answers, queries, distinct ones, budget."""
        return {
            "pool": self.pool.name,
            "labels": self.oracle.labels,
            "queries": 0 if self._transfer is None else len(self._transfer.x),
            "distinct": self._spent,
            "augmented": self.augmentation is not None,
            "budget": self.oracle.ledger.budget,
        }

    def _collect_once(self) -> TransferSet:
        """The transfer set: the first process collects it, the others are told, and all fail if it fails."""
        transfer = self._collect_somewhere()
        # another data set's classes would be no truth about the victim's
        return transfer if self.pool.in_domain else replace(transfer, y=None)

    def _collect_somewhere(self) -> TransferSet:
        if self.trainer is None or self.trainer.world_size == 1:
            return self.collect()
        return processes.first(self.collect)

    def _ready(self) -> TransferSet:
        if self._transfer is None:
            raise RuntimeError(
                "The oracle was not asked yet: call setup('fit') first, or hand the data module to a Trainer."
            )
        return self._transfer
