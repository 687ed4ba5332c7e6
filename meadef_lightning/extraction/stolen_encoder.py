"""StolenEncoder's transfer set: every image of the pool is asked once, and its feature serves all of its augmented views.

**Source.** Liu et al., "StolenEncoder: Stealing Pre-trained Encoders in Self-supervised Learning" (CCS 2022), §4; the loss and the views are
the student's (`meadef_lightning.extraction.encoder_student`).

**Algorithm.** 1. Ask about the images of the pool, each once. 2. Divide every answer by its L2 norm. 3. Train an `EncoderStudent` with an
augmentation on ``(x, feature)``; it draws ``k`` views of each image in every step, on its own device, under the feature of the image.

**Budget.** ``N`` queries for ``N`` images, whatever ``k`` and the number of epochs ``E`` are (:func:`planned_queries`). Asking about the views would
cost ``N · (1 + k·E)``: this is the paper's point. Answers are kept in the oracle's ledger as they were given, so that nothing is asked twice, also
after an interruption, or by a plain imitation (`meadef_lightning.extraction.DistillationDataModule`, same pool) from the same ledger.

**Defaults.** A tenth of the images is held out for validation, which the paper does not do.

**Pitfalls.** The data module must not augment: the student needs the image that was asked beside its views.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction.base import TransferSet
from meadef_lightning.extraction.distillation import DistillationDataModule
from meadef_lightning.extraction.pools import Pool
from meadef_lightning.oracle import BlackBox


def planned_queries(images: int, views: int = 0, epochs: int = 1, ask_views: bool = False) -> int:
    """What a theft of an encoder costs.

    Args:
        images: Images of the pool that are asked, at least 1.
        views: Views of each image and epoch, ``k``.
        epochs: Epochs of the student.
        ask_views: Whether views are asked, too, which StolenEncoder saves.

    Returns:
        Queries: ``images``, or ``images · (1 + views · epochs)``.

    Raises:
        ValueError: If a number is out of range.
    """
    if images < 1 or views < 0 or epochs < 1:
        raise ValueError(f"{images=} and {epochs=} must be at least 1, and {views=} at least 0.")
    return images * (1 + views * epochs) if ask_views else images


class StolenEncoderDataModule(DistillationDataModule):
    """Images of the attacker's pool and the directions of the victim's features, as batches ``(x, feature)``.

    Args:
        oracle: The victim's only door; its policy is `meadef_lightning.oracle.policies.Features`.
        data: The data splits.
        queries: Images to ask, validation included; by default the whole pool.
        batch_size: Images in a training batch.
        validation_fraction: Share of the images held out, below 1; with 0 there is no validation.
        seed: Seed of the training order.
        pool: Where the images come from; the data's attacker split by default.

    Raises:
        ValueError: If a number is out of range.
        MisconfigurationException: In ``setup``, if the oracle answers with classes.
    """

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        queries: int | None = None,
        batch_size: int = 128,
        validation_fraction: float = 0.1,
        seed: int = 0,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(
            oracle, data, queries, batch_size, validation_fraction=validation_fraction, seed=seed, pool=pool
        )

    @override
    def collect(self) -> TransferSet:
        """Asks about every image of the pool, or the first ones, and normalises the answers."""
        if self.oracle.labels != "feature":
            raise MisconfigurationException(
                f"StolenEncoder needs an encoder's features, but this oracle gives {self.oracle.labels} answers. Give the oracle the policy "
                "Features(), or steal a classifier with DistillationDataModule."
            )
        transfer = super().collect()
        return replace(transfer, answers=F.normalize(transfer.answers, dim=1))
