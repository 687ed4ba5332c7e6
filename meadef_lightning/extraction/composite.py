"""Composite-data extraction: fresh blends of pairs of unlabelled images in every epoch, each asked while the student trains.

**Source.** Mosafi, David, Netanyahu, "DNN Intellectual Property Extraction Using Composite Data" (Entropy 24(3):349, 2022); before that
"Stealing Knowledge from Protected Deep Neural Networks Using Composite Unlabeled Data" (arXiv:1912.03959).

**Algorithm.** In every epoch, for each of ``blends`` composites:

1. Draw two different images x_i, x_j of the pool, and a ratio ρ between 0 and 1.
2. Ask the victim about x = ρ·x_i + (1 − ρ)·x_j.
3. Train the student on x and the answer; never use the composite again.

The lines between images cross the victim's decision boundaries: where answers are classes alone, many points on a line tell what
probabilities would have told at one. A pool of N images gives about N² lines.

**Budget.** ``max_epochs · blends`` distinct inputs, plus ``round(validation_fraction · pool)`` natural images that validate the student
and are held out from the composites. With ``ratio="grid"`` a composite may come up again, which the ledger answers, so the
number is an upper bound. Composites are functions of ``(seed, epoch, index)`` and asked batch by batch: with a ledger that has a path,
an interrupted training goes on with the same batches and asks nothing twice. Several processes need such a ledger, on
a disk of their machine: each asks its share, and pays from the same budget. A budget that does not last stops the training with
`BudgetExceededError`.

**Answers.** All kinds; the paper has classes only (`meadef_lightning.oracle.HardLabel`), for which it is made.

**Defaults.** The paper asks about a million composites of ImageNet images per epoch, and does not say how ρ is drawn: here it is
uniform, or, with ``ratio="grid"``, one of 0.1, 0.2, … 0.9, which never asks about what is nearly an image of the pool. Pairs are drawn
without looking at classes, so that any pool will do. As many composites per epoch as the pool has images; no augmentation, since no
composite is seen twice.

**Pitfalls.** Mixup, which blends the *labels* of the two images: here the victim is asked about the blend. A fixed set of blends,
asked once: that is distillation with another pool, and most of the effect is gone. Counting images instead of composites as
queries understates the cost by the number of epochs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.loading import ResumableLoader
from meadef_lightning.extraction.base import ExtractionDataModule, TransferSet, as_is, held_out_rows
from meadef_lightning.extraction.pools import Pool
from meadef_lightning.oracle import BlackBox

Ratio = Literal["uniform", "grid"]

_GRID = 9


def composite_batch(x_i: Tensor, x_j: Tensor, ratio: Tensor) -> Tensor:
    """Blends pairs of images: ``ratio · x_i + (1 − ratio) · x_j``.

    A blend's bits do not depend on the batch it is made in, so that a ledger knows it again.

    Args:
        x_i: ``(B, C, H, W)``.
        x_j: ``(B, C, H, W)``.
        ratio: ``(B,)``, in ``[0, 1]``.

    Returns:
        ``(B, C, H, W)``, between the two images.
    """
    weight = ratio.to(x_i)[:, None, None, None]
    return weight * x_i + (1 - weight) * x_j


def draw_composites(images: int, blends: int, seed: int, epoch: int, ratio: Ratio) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the pairs and ratios of an epoch; row ``k`` is a function of ``(images, seed, epoch, k)`` and ``ratio``.

    Args:
        images: Number of images, at least 2.
        blends: Number of composites.
        seed: Any integer.
        epoch: Any integer.
        ratio: ``"uniform"`` over [0, 1), or ``"grid"``: one of 0.1, 0.2, … 0.9.

    Returns:
        Indices i and j ≠ i, int64 ``(blends,)`` each, and ratios, float32 ``(blends,)``.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    u = torch.rand(blends, 3, generator=generator, dtype=torch.float64)
    i = (u[:, 0] * images).long()
    j = (i + 1 + (u[:, 1] * (images - 1)).long()) % images
    rho = u[:, 2] if ratio == "uniform" else (1 + (u[:, 2] * _GRID).floor()) / (_GRID + 1)
    return i, j, rho.float()


class Composites(Dataset[Tensor]):
    """The composites of the running epoch, fetched a whole batch at a time; its loaders need ``collate_fn=as_is``.

    Args:
        images: ``(N, C, H, W)`` on the CPU.
        blends: Composites in an epoch.
        seed: Seed of all epochs.
        ratio: See `draw_composites`.
        epoch: Tells the number of the running epoch.
    """

    def __init__(self, images: Tensor, blends: int, seed: int, ratio: Ratio, epoch: Callable[[], int]) -> None:
        self.images, self.blends, self.seed, self.ratio, self.epoch = images, blends, seed, ratio, epoch
        self._drawn: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return self.blends

    @override
    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """The composites with these numbers, ``(B, C, H, W)``."""
        epoch = self.epoch()
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, draw_composites(len(self.images), self.blends, self.seed, epoch, self.ratio)
        rows = torch.as_tensor(indices)
        i, j, ratio = (drawn[rows] for drawn in self._drawn[1])
        return composite_batch(self.images[i], self.images[j], ratio)


class CompositeDataModule(ExtractionDataModule):
    """Fresh composites of the thief's images in every epoch, each answered as its training batch comes up.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        blends: Composites in an epoch; by default as many as there are images to blend, in whole batches.
        batch_size: Composites in a training batch.
        augmentation: Of what the student sees, see `ExtractionDataModule`; none by default, as in the paper.
        validation_fraction: Share of the *pool* held out, in ``[0, 1)``; with 0 there is no validation.
        seed: Seed of the composites.
        pool: Where the images come from; the data's attacker split by default.
        ratio: How the share of the first image is drawn, ``"uniform"`` or ``"grid"``.

    Raises:
        ValueError: If an argument is out of range or (in `setup`) the pool is too small.
        MisconfigurationException: If (in `setup`) there are several processes and the ledger has no path.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        blends: int | None = None,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        pool: Pool | None = None,
        ratio: Ratio = "uniform",
    ) -> None:
        super().__init__(oracle, data, batch_size, augmentation, validation_fraction, seed, pool)
        if blends is not None and blends < 1:
            raise ValueError(f"blends must be at least 1, got {blends}.")
        if blends is not None and blends > batch_size > 1 and blends % batch_size == 1:
            raise ValueError(
                f"blends={blends} leaves one composite for the last batch of {batch_size}, which batch normalisation cannot take; change "
                "one of them by 1."
            )
        if ratio not in ("uniform", "grid"):
            raise ValueError(f'ratio must be "uniform" or "grid", got {ratio!r}.')
        self.blends = blends
        self.ratio: Ratio = ratio
        self._images = torch.empty(0)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads the pool and asks about its held-out images, once, if the stage needs it.

        Args:
            stage: ``"test"`` and ``"predict"`` need no answers.

        Raises:
            ValueError: If fewer than two images of the pool are left to blend.
            MisconfigurationException: If there are several processes and the ledger has no path.
            BudgetExceededError: If the ledger's budget does not cover the held-out images.
            LedgerError: If the ledger belongs to another victim or policy, or cannot be used.
        """
        self.data.setup(stage)
        if stage in ("test", "predict") or self._transfer is not None:
            return
        if self.trainer is not None and self.trainer.world_size > 1 and self.oracle.ledger.path is None:
            raise MisconfigurationException(
                f"The {self.trainer.world_size} processes each ask about composites of their own, and a ledger in memory would count "
                "and limit each alone. Give QueryLedger a path, or train with one process. (Machines cannot share its file: use one.)"
            )
        x, y = self.pool.images(self.data)
        held_out = held_out_rows(len(x), self.validation_fraction)
        if len(x) - int(held_out.sum()) < 2:
            raise ValueError(
                f"The pool has {len(x)} images, {int(held_out.sum())} of them for validation, and a composite needs two others. Raise the "
                "pool's size (attacker_size of the data), or lower validation_fraction."
            )
        self._images = x[~held_out]
        self._held_out = x[held_out], None if y is None else y[held_out]
        self._transfer = self._collect_once()
        trainer, budget = self.trainer, self.oracle.ledger.budget
        if (
            budget is not None
            and trainer is not None
            and len(x[held_out]) + (trainer.max_epochs or 0) * self.epoch_size > budget
        ):
            rank_zero_warn(
                f"{trainer.max_epochs} epochs of {self.epoch_size} composites, and {int(held_out.sum())} held-out images, are more than "
                f"the budget of {budget} distinct inputs: the training will stop with BudgetExceededError. Lower max_epochs or blends, "
                "or raise the budget."
            )

    @override
    def collect(self) -> TransferSet:
        """Asks about the held-out images; composites are asked while the student trains."""
        x, y = self._held_out
        answers = self.ask(x) if len(x) else torch.empty(0)
        return TransferSet(x, answers, torch.ones(len(x), dtype=torch.bool), y)

    @property
    def epoch_size(self) -> int:
        """Composites in an epoch; 0 before `setup` if ``blends`` was left open."""
        if self.blends is not None:
            return self.blends
        images = len(self._images)
        return images - images % self.batch_size or images

    @property
    @override
    def queries_spent(self) -> int:
        """Distinct inputs that the ledger has paid for so far."""
        return self.oracle.ledger.distinct

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Composites of the running epoch (of epoch 0 without a Trainer), ``(B, C, H, W)``, not asked yet."""
        self._ready()
        return self.resumable_loader(
            Composites(self._images, self.epoch_size, self.seed, self.ratio, self._epoch),
            batch_size=self.batch_size,  # in order: composites are drawn at random already
            collate_fn=as_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would advance the global one
        )

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Asks about the composites that are trained on next.

        Here and not in the data set, since a resumed epoch fetches the batches that it skips; and on the CPU, where the
        ledger wants them.

        Args:
            batch: Composites ``(B, C, H, W)`` while a trainer trains, else ``(x, answer)`` or more.
            dataloader_idx: Number of the loader.

        Returns:
            ``(x, answer)`` while a trainer trains.
        """
        if self.trainer is None:
            return batch
        if self.trainer.training:
            batch = batch, self.oracle.query(batch)
        # Lightning calls this hook instead of the model's, not beside it
        return self.trainer.lightning_module.on_before_batch_transfer(batch, dataloader_idx)

    @override
    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report; see `ExtractionDataModule.query_summary`."""
        distinct, calls = self.oracle.ledger.totals()
        told = {
            "queries": calls,
            "distinct": distinct,
            "blends": self.epoch_size,
            "ratio": self.ratio,
        }
        return {**super().query_summary(), **told}

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch
