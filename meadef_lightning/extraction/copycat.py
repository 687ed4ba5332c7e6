"""Copycat: ask about natural images that have nothing to do with the victim's problem, and train on the classes it names.

**Source.** Correia-Silva et al., "Copycat CNN: Stealing Knowledge by Persuading Confession with Random Non-Labeled Data" (IJCNN 2018).

**Algorithm.** 1. Draw ``queries`` images from a pool of another domain. 2. Ask about each once, and keep nothing but the class that is
named: answers with probabilities are turned into their argmax. 3. Hold out a share of the images for validation. 4. Train on the rest,
balanced by the classes that the victim named (`balanced_rows`): in every epoch each class that was named at all has ``per_class`` rows. An
image of a rare class is repeated, an image of a frequent one may be left out; how often the images of one class occur differs by one at most.
Give an augmentation, so that the repeated ones differ, and a network with pretrained weights, which the paper fine-tunes.

**Budget.** ``queries``, or the size of the pool. Repeated images are asked and paid for once; they are rows of an epoch and not queries.

**Defaults.** ``per_class`` is the count of the most frequent class, so that no answer that was paid for is left out; the paper likewise
replicates. Where the victim's answers are very uneven an epoch becomes many times as long as the pool, and a lower one is the remedy.

**Pitfalls.** Images of the victim's own problem make this ordinary distillation with less of the answer, and a result that says nothing about
Copycat; the attacker split is therefore refused. Balancing before the split into training and validation puts copies of one image on
both sides. The pool's own classes mean nothing to the victim and are not used. Classes that the victim never names cannot be learnt: a
warning says which.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction.base import ExtractionDataModule, TransferSet, held_out_rows, require_classes
from meadef_lightning.extraction.pools import AttackerSplit, OtherData, Pool
from meadef_lightning.extraction.student import answer_classes
from meadef_lightning.oracle import BlackBox

_NAMED = 10  # classes named in a warning


def balanced_rows(classes: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Picks the same number of rows for every class that occurs.

    The rows of a class are shuffled and then taken in turn, again and again until there are enough of them; where there are
    more than enough, the rest is left out.

    Args:
        classes: ``(N,)`` int64 on the CPU.
        per_class: Rows wanted for each class, at least 1.
        generator: Source of randomness.

    Returns:
        Row numbers, int64 ``(per_class · number of classes that occur,)``, in the order of the classes.
    """
    order = torch.randperm(len(classes), generator=generator)
    shuffled = classes[order]
    turns = torch.arange(per_class)
    groups = [order[shuffled == number] for number in classes.bincount().nonzero()]
    return torch.cat([rows[turns % len(rows)] for rows in groups])


class CopycatDataModule(ExtractionDataModule):
    """The Copycat attack; see the module's description.

    Args:
        oracle: The victim's only door.
        data: The data splits; none of their images are asked.
        pool: Images of another domain, e.g. `OtherData`.
        queries: Images to ask, validation included, drawn at random; the whole pool by default. A smaller number is a subset of a
            larger one.
        per_class: Rows of each named class in an epoch; by default as many as the most frequent class has.
        batch_size: Queries in a training batch.
        augmentation: Maps a batch to one of the same shape, see `ExtractionDataModule`.
        validation_fraction: Share of the images held out, below 1; with 0 there is no validation.
        seed: Seed of the draw, the balancing and the training order.

    Raises:
        MisconfigurationException: If the pool is the attacker split or other images of ``data``, or the oracle answers with features.
        ValueError: If a number is out of range, or (in `setup`) the pool is too small.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        pool: Pool,
        queries: int | None = None,
        per_class: int | None = None,
        batch_size: int = 128,
        augmentation: nn.Module | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(oracle, data, batch_size, augmentation, validation_fraction, seed, pool)
        require_classes(oracle, type(self).__name__)
        if isinstance(pool, AttackerSplit) or (isinstance(pool, OtherData) and pool.other is data):
            raise MisconfigurationException(
                f"Copycat asks about images of another domain than the victim's, but pool={pool.name} holds images of the victim's "
                "own data. Give another pool (e.g. OtherData), or use DistillationDataModule, which is made for in-domain images."
            )
        for name, value in (("queries", queries), ("per_class", per_class)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.queries, self.per_class = queries, per_class

    @override
    def collect(self) -> TransferSet:
        """Asks about images of the pool, and keeps the classes that the victim names."""
        x, _ = self.pool.images(self.data)
        images = len(x) if self.queries is None else self.queries
        if images > len(x):
            raise ValueError(
                f"queries={images} is more than the {len(x)} images of the pool; lower it, or raise the pool's size."
            )
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:images]]
        classes = answer_classes(self.ask(x))
        held_out = held_out_rows(images, self.validation_fraction)
        missing = (classes[~held_out].bincount(minlength=self.num_classes) == 0).nonzero().flatten().tolist()
        if missing:
            names = ", ".join(f"{number} ({self.data.class_names[number]})" for number in missing[:_NAMED])
            rank_zero_warn(
                f"The victim named {self.num_classes - len(missing)} of its {self.num_classes} classes for the images to train on, and never "
                f"{names}{', …' if len(missing) > _NAMED else ''}. The student cannot learn these; ask about more, or more varied, images."
            )
        return TransferSet(x, classes, held_out)

    @override
    def epoch_rows(self, transfer: TransferSet) -> Tensor:
        """The rows that are not held out, balanced by the class that the victim named."""
        rows = super().epoch_rows(transfer)
        classes = transfer.answers[rows]
        per_class = int(classes.bincount().max()) if self.per_class is None else self.per_class
        return rows[balanced_rows(classes, per_class, torch.Generator().manual_seed(self.seed))]

    @override
    def query_summary(self) -> dict[str, Any]:
        """What was asked, in primitive values for a report; see `ExtractionDataModule.query_summary`."""
        rows = 0 if self._transfer is None else len(self.epoch_rows(self._transfer))
        return {**super().query_summary(), "epoch_rows": rows}
