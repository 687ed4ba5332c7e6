"""Knowledge-distillation extraction: ask the oracle about the attacker's own images once, and train on the answers.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), used as an attack; the loss is
`meadef_lightning.extraction.student.distillation_loss`. Published attacks often ask again about every augmented view in every
epoch, and report the number of *images* as queries. Here nothing is asked that is not counted.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.loading import EpochShuffle, ResumableLoader
from meadef_lightning.oracle import Oracle, row_digests


class TensorBatches(Dataset[tuple[Tensor, ...]]):
    """Tensors in memory, fetched a whole batch at a time; its loaders need ``collate_fn=as_is``.

    Args:
        tensors: Tensors with the same number of rows.

    Raises:
        ValueError: If the numbers of rows differ.
    """

    def __init__(self, *tensors: Tensor) -> None:
        if len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError(f"All tensors need the same number of rows, got {[len(tensor) for tensor in tensors]}.")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The rows with these indices of each tensor, as one batch."""
        rows = torch.as_tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


def as_is(batch: Any) -> Any:
    """Collate nothing: the batch arrives whole."""
    return batch


def augmented_views(x: Tensor, augmentation: nn.Module, views: int, seed: int, batch_size: int) -> Tensor:
    """The images themselves, followed by augmented copies of all of them.

    Args:
        x: ``(N, C, H, W)`` on the CPU.
        augmentation: Maps a batch to a batch of the same shape, with randomness from torch's global generator.
        views: Rows per image, the image itself included.
        seed: Seed of the augmentation; the global generator is left as it was.
        batch_size: Images augmented at once.

    Returns:
        ``(views · N, C, H, W)``; row ``v · N + i`` is view ``v`` of image ``i``, and view 0 is the image.

    Raises:
        ValueError: If the augmentation changes the shape.
    """
    parts = [x]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for batch in torch.split(x, batch_size) * (views - 1):
            view = augmentation(batch)
            if view.shape != batch.shape:
                raise ValueError(
                    f"The augmentation turned a batch of shape {tuple(batch.shape)} into {tuple(view.shape)}; queries must keep "
                    "the victim's input shape."
                )
            parts.append(view)
    return torch.cat(parts)


class DistillationDataModule(LightningDataModule):
    """Queries from the attacker split and the victim's answers to them, as batches ``(x, answer)``.

    The oracle is asked once, before training, and on one process. With a ledger that has a path an interrupted run continues
    where it stopped and a second run pays nothing. An augmentation is used in one of two honest ways:

    * ``views=1``: the answer belongs to the clean query; the student sees the query augmented anew in every epoch. Costs no
      further queries, and assumes that the victim would answer the same.
    * ``views=V``: every image is asked as itself and as ``V − 1`` augmented copies, each of which is a query and is paid for.
      The student sees exactly what was asked.

    A share of the images, with all their views, is held out for validation: batches ``(x, answer, y)`` with the true classes,
    which only serve to report an accuracy. Tests run on the data's test split, ``(x, y)``. Images and answers are kept in memory.

    Args:
        oracle: The victim's only door.
        data: The data, of which only the attacker split is asked. Its split order is fixed, so a smaller number of queries is a
            subset of a larger one.
        queries: Rows to ask, validation included; by default one per view of every image of the attacker split. If ``views``
            does not divide it, the rest is not asked.
        batch_size: Queries in a training batch.
        augmentation: Maps a batch ``(B, C, H, W)`` to one of the same shape. It should draw for each image anew
            (`meadef_lightning.data.augmentation.RandomShiftFlip`); torchvision's transforms draw once per batch.
        views: Queries per image, see above.
        validation_fraction: Share of the images held out, below 1; with 0 there is no validation.
        seed: Seed of the training order and of the augmented copies.

    Raises:
        ValueError: If a number is out of range, ``views`` is above 1 without an augmentation, or (in `setup`) the attacker split
            is too small.
    """

    split: Final = "attacker"
    """Split of the data that is asked; disjoint from what trained the victim."""

    def __init__(
        self,
        oracle: Oracle,
        data: SplitDataModule,
        queries: int | None = None,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        views: int = 1,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or views < 1:
            raise ValueError(f"batch_size and views must be at least 1, got {batch_size} and {views}.")
        if views > 1 and augmentation is None:
            raise ValueError(
                f"views={views} asks for augmented copies of each image; give an augmentation, or views=1."
            )
        if queries is not None and queries < views:
            raise ValueError(f"queries={queries} is less than the {views} of one image; raise it, or lower views.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {validation_fraction}.")
        self.oracle = oracle
        self.data = data
        self.queries = queries
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.views = views
        self.validation_fraction = validation_fraction
        self.seed = seed
        self._train: TensorBatches | None = None
        self._validation: TensorBatches | None = None
        self._spent = 0
        self._done = 0

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return self.data.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the queries."""
        return self.data.image_shape

    @property
    def queries_spent(self) -> int:
        """Distinct inputs among the queries of this attack: what it costs with an empty ledger. 0 before `setup`."""
        return self._spent

    @override
    def prepare_data(self) -> None:
        self.data.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Ask the oracle, once, if the stage needs answers.

        Args:
            stage: ``"test"`` and ``"predict"`` need no answers.

        Raises:
            ValueError: If the attacker split is too small.
            BudgetExceededError: If the ledger's budget does not cover the queries; none was forwarded.
            LedgerError: If the ledger belongs to another victim or policy, or cannot be used.
        """
        self.data.setup(stage)
        if stage in ("test", "predict") or self._train is not None:
            return
        x, y = self.data.tensors(self.split)
        images = len(x) if self.queries is None else self.queries // self.views
        held_out = round(self.validation_fraction * images)
        if images > len(x) or images - held_out < 1:
            raise ValueError(
                f"The attack needs {images} images, {held_out} of them for validation, and the attacker split has {len(x)}. "
                "Raise attacker_size of the data, or lower queries."
            )
        x, y = x[:images], y[:images]
        if self.views > 1 and self.augmentation is not None:
            x = augmented_views(x, self.augmentation, self.views, self.seed, self.batch_size)
            y = y.repeat(self.views)
        answers = self._ask_once(x)
        self._spent = len(set(row_digests(x)))
        train = torch.arange(images).repeat(self.views) < images - held_out
        self._train = TensorBatches(x[train], answers[train])
        self._validation = TensorBatches(x[~train], answers[~train], y[~train])
        rank_zero_info(f"{len(x)} queries, {self._spent} of them distinct, were answered ({self.oracle.labels}).")

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Queries with their answers, shuffled anew in each epoch."""
        train = self._ready(self._train)
        loader = ResumableLoader(
            train,
            batch_size=self.batch_size,
            sampler=EpochShuffle(train, self.seed),
            collate_fn=as_is,
            # A last batch of one image would be the end of a student with batch normalisation
            drop_last=len(train) > self.batch_size,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would advance the global one
            position=self._position,
        )
        loader.load_state_dict({"batches": self._done})
        self._done = 0
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Held-out queries with their answers and true classes; no loader at all if none are held out."""
        held_out = self._ready(self._validation)
        if len(held_out) == 0:
            return []
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
        """Augment what the student sees while it trains, if the copies were not asked themselves.

        Args:
            batch: ``(x, answer)``.
            dataloader_idx: Number of the loader.

        Returns:
            The batch, augmented while a trainer trains.
        """
        if self.trainer is None:
            return batch
        if self.augmentation is not None and self.views == 1 and self.trainer.training:
            x, answers = batch
            batch = self.augmentation.to(x.device)(x), answers
        # Lightning calls this hook instead of the model's, not beside it
        return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Batches of the running epoch that are done.

        The loader's own state says the same, but Lightning does not hand it back where a module asked for
        ``trainer.estimated_stepping_batches`` while it configured its optimisers, as one-cycle schedules do.
        """
        return {"batches": self._position()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader begin where the checkpoint was written.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._done = state_dict["batches"]

    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report: split, kind of answers, queries, distinct ones, views, budget."""
        return {
            "split": self.split,
            "labels": self.oracle.labels,
            "queries": 0
            if self._train is None or self._validation is None
            else len(self._train) + len(self._validation),
            "distinct": self._spent,
            "views": self.views,
            "augmented": self.augmentation is not None,
            "budget": self.oracle.ledger.budget,
        }

    def _ask_once(self, x: Tensor) -> Tensor:
        """Answers to all queries: the first process asks, the others are told, and all fail if it fails."""
        if self.trainer is None or self.trainer.world_size == 1:
            return self._ask(x)
        outcome: Any = None
        if self.trainer.is_global_zero:
            try:
                outcome = self._ask(x)
            except Exception as error:  # told to the processes that wait, and raised on all of them
                outcome = error
        outcome = self.trainer.strategy.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        answers: Tensor = outcome
        return answers

    def _ask(self, x: Tensor) -> Tensor:
        console = Console()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("Asking the oracle", total=len(x))
            return self.oracle.query(x, progress=lambda rows: bar.advance(task, rows))

    def _ready(self, batches: TensorBatches | None) -> TensorBatches:
        if batches is None:
            raise RuntimeError(
                "The oracle was not asked yet: call setup('fit') first, or hand the data module to a Trainer."
            )
        return batches

    def _position(self) -> int:
        """Batches of the running epoch that are done; 0 between epochs. A checkpoint keeps it."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        done: int = progress.current.processed  # type: ignore[attr-defined]  # Lightning declares a base class
        return 0 if progress.is_last_batch and done == progress.current.ready else done
