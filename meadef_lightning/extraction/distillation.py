"""Knowledge-distillation extraction: ask the oracle about the attacker's own images once, and train on the answers.

**Source.** Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), used as an attack; the loss is
`meadef_lightning.extraction.student.distillation_loss`.

**Algorithm.** 1. Take the images of a pool, the attacker's split unless told otherwise; with ``views = V`` above 1 each of them comes with
``V − 1`` augmented copies. 2. Ask the victim about each once. 3. Hold out a share of the images, with all their views, for validation.
4. Train the student on the rest: by ``T² · KL`` at temperature ``T`` where answers are probabilities, by cross-entropy where they are
classes.

**Budget.** One query per image and view: ``queries``, or all of the pool times ``views``. Published attacks often ask again about every
augmented view in every epoch, and report the number of *images* as queries. Here nothing is asked that is not counted.

**Defaults.** One view, no augmentation, a tenth held out, temperature 1. The paper's student sees logits; a thief has probabilities, from
which the softened ones follow all the same: ``p^(1/T)``, normalised. With an augmentation and one view the student sees the image
augmented anew in every epoch under the answer to the image itself, which costs no query and supposes that the victim would say the same.

**Pitfalls.** A high temperature is not always better for the thief: near-zero probabilities, which a rounding API destroys, then carry
most of the signal. Leaving out the factor ``T²`` makes the learning rate depend on the temperature. Validation images whose
augmented copies are trained on validate nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction.base import ExtractionDataModule, TransferSet
from meadef_lightning.extraction.pools import Pool
from meadef_lightning.oracle import BlackBox


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


class DistillationDataModule(ExtractionDataModule):
    """Queries from the attacker's pool and the victim's answers to them, as batches ``(x, answer)``.

    An augmentation is used in one of two honest ways:

    * ``views=1``: the answer belongs to the clean query; the student sees the query augmented anew in every epoch. Costs no
      further queries, and assumes that the victim would answer the same.
    * ``views=V``: every image is asked as itself and as ``V − 1`` augmented copies, each of which is a query and is paid for.
      The student sees exactly what was asked.

    A share of the images, with all their views, is held out for validation. Images and answers are kept in memory.

    Args:
        oracle: The victim's only door.
        data: The data splits.
        queries: Rows to ask, validation included; by default one per view of every image of the pool. If ``views``
            does not divide it, the rest is not asked. A smaller number of queries is a subset of a larger one.
        batch_size: Queries in a training batch.
        augmentation: Maps a batch to one of the same shape, see `ExtractionDataModule`.
        views: Queries per image, see above.
        validation_fraction: Share of the images held out, below 1; with 0 there is no validation.
        seed: Seed of the training order and of the augmented copies.
        pool: Where the images come from; the data's attacker split by default.

    Raises:
        ValueError: If a number is out of range, ``views`` is above 1 without an augmentation, or (in `setup`) the pool is too
            small.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        queries: int | None = None,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        views: int = 1,
        validation_fraction: float = 0.1,
        seed: int = 0,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(oracle, data, batch_size, augmentation, validation_fraction, seed, pool)
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}.")
        if views > 1 and augmentation is None:
            raise ValueError(
                f"views={views} asks for augmented copies of each image; give an augmentation, or views=1."
            )
        if queries is not None and queries < views:
            raise ValueError(f"queries={queries} is less than the {views} of one image; raise it, or lower views.")
        self.queries = queries
        self.views = views

    @override
    def collect(self) -> TransferSet:
        """Asks about every image of the pool, or the first ones, and their views."""
        x, y = self.pool.images(self.data)
        images = len(x) if self.queries is None else self.queries // self.views
        held_out = round(self.validation_fraction * images)
        if images > len(x) or images - held_out < 1:
            raise ValueError(
                f"The attack needs {images} images, {held_out} of them for validation, and the pool has {len(x)}. "
                "Raise the pool's size (attacker_size of the data), or lower queries."
            )
        x = x[:images]
        if self.views > 1 and self.augmentation is not None:
            x = augmented_views(x, self.augmentation, self.views, self.seed, self.batch_size)
        return TransferSet(
            x,
            self.ask(x),
            held_out=torch.arange(images).repeat(self.views) >= images - held_out,
            y=None if y is None else y[:images].repeat(self.views),
        )

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments what the student sees while it trains, unless the copies were asked themselves."""
        if self.views > 1 and self.trainer is not None:
            return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)
        return super().on_after_batch_transfer(batch, dataloader_idx)

    @override
    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report; see `ExtractionDataModule.query_summary`."""
        return {**super().query_summary(), "views": self.views}
