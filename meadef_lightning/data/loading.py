"""Shuffling that a resumed run repeats exactly: the order depends on seed and epoch only.

PyTorch's own shuffling draws from the global random state, which a Lightning checkpoint does not hold, so that a
resumed run would see other batches than an uninterrupted one. Here the order of an epoch is a function of
``(seed, epoch)``, Lightning tells the sampler the epoch, and a loader continues in the middle of an epoch through
Lightning's ``state_dict`` protocol for data loaders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, RandomSampler
from typing_extensions import override


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Shuffles ``range(n)`` as a function of seed and epoch.

    The two are hashed and not added: otherwise seed 1 would start with what seed 0 sees in its second epoch.

    Args:
        n: number of samples.
        seed: any integer.
        epoch: any integer.

    Returns:
        A permutation, int64 (n,).
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randperm(n, generator=generator)


class EpochShuffle(RandomSampler):
    """Shuffles by seed and epoch; the global random state is neither read nor advanced.

    A ``RandomSampler``, so that Lightning recognises shuffling and, with several processes, replaces it by
    PyTorch's ``DistributedSampler``, whose order is a function of seed and epoch as well.

    Args:
        data_source: anything with a length.
        seed: seed of all epochs.
    """

    def __init__(self, data_source: Sized, seed: int) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; Lightning calls this before every epoch.

        Args:
            epoch: number of the epoch.
        """
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.num_samples, self.seed, self.epoch)
        self.epoch += 1  # a plain loop, in which nobody calls set_epoch, sees a new order each time
        return iter(order.tolist())


def batches_done(trainer: Trainer | None) -> int:
    """Returns how many batches of a trainer's running epoch are done: 0 between epochs and without a trainer."""
    if trainer is None:
        return 0
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done: int = progress.current.processed  # type: ignore[attr-defined]  # Lightning declares a base class
    return 0 if progress.is_last_batch and done == progress.current.ready else done


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that a checkpoint written in the middle of an epoch continues at the next batch.

    Args:
        *args: see ``torch.utils.data.DataLoader``.
        position: tells how many batches of the current epoch are done.
        skip: batches that the first pass leaves out.
        **kwargs: see ``torch.utils.data.DataLoader``.
    """

    def __init__(self, *args: Any, position: Callable[[], int] | None = None, skip: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Lightning rebuilds loaders for several processes and finds the arguments by these names.
        self.position = position
        self.skip = skip

    def state_dict(self) -> dict[str, int]:
        """Returns the number of batches of this epoch that are done, for a checkpoint."""
        return {"batches": 0 if self.position is None else self.position()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next pass begin where the checkpoint was written.

        Args:
            state: what ``state_dict`` returned.
        """
        self.skip = state["batches"]

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is drawn before the first batch is asked for: Lightning creates the iterator
        # of a resumed run before it announces the epoch, and loading processes would take the order of epoch 0.
        skip, self.skip = self.skip, 0
        yield from islice(super().__iter__(), skip, None)


class ResumableDataModule(LightningDataModule):
    """Base of data modules whose training loaders continue in the middle of an epoch, whatever the module does.

    The loader's own state says the same as the data module's, but Lightning does not hand it back where a module asked for
    ``trainer.estimated_stepping_batches`` while it configured its optimisers, as one-cycle schedules do.
    """

    _done = 0

    def resumable_loader(self, dataset: Any, **arguments: Any) -> ResumableLoader:
        """Makes a training loader that begins where a checkpoint was written, if one was loaded since the last.

        Args:
            dataset: what to load.
            **arguments: see ``torch.utils.data.DataLoader``.
        """
        skip, self._done = self._done, 0
        return ResumableLoader(dataset, position=self._position, skip=skip, **arguments)

    def _position(self) -> int:
        """Batches of the running epoch that are done; 0 between epochs."""
        return batches_done(self.trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns how many batches of the running epoch are done."""
        return {"batches": self._position()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training loader begin where the checkpoint was written.

        Args:
            state_dict: what ``state_dict`` returned.
        """
        self._done = state_dict.get("batches", 0)  # checkpoints of older data modules do not say

    @override
    def teardown(self, stage: str) -> None:
        """Forgets a position that nobody asked for: tests load checkpoints, too.

        Args:
            stage: ignored.
        """
        self._done = 0
