"""What somebody who stole a model has of his own: images, labels, and a part set aside to see what his work costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meadef_lightning.data.base import SplitDataModule


@dataclass(frozen=True, eq=False, repr=False)
class ThiefData:
    """A white-box thief's data: the attacker split, which shares no image with victim, verification and test splits.

    Args:
        x: Images to work with, float32, shape ``(N, C, H, W)``, in the model's input space.
        y: Their true classes, int64, shape ``(N,)``.
        validation_x: Images set aside, on which the thief sees what an attack costs him, shape ``(M, C, H, W)``.
        validation_y: Their true classes, int64, shape ``(M,)``.
        num_classes: Number of classes.
        low: What black is in the input space, shape ``(C, 1, 1)``.
        high: What white is, same shape.
    """

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    num_classes: int
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, data: SplitDataModule, share: float = 1.0, validation: float = 0.2, seed: int = 0) -> ThiefData:
        """Divides the attacker split at random.

        Args:
            data: Data module, set up.
            share: Share of the attacker split that the thief has, in ``(0, 1]``.
            validation: Share of his images that he sets aside, in ``(0, 1)``.
            seed: Seed of the division.

        Raises:
            ValueError: If a share is out of range, or leaves no image on a side.
        """
        if not 0 < share <= 1 or not 0 < validation < 1:
            raise ValueError(f"share={share} must lie in (0, 1] and validation={validation} in (0, 1).")
        x, y = data.tensors("attacker")
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: round(share * len(x))]
        held = round(validation * len(rows))
        if held == 0 or held == len(rows):
            raise ValueError(
                f"share={share} of {len(x)} attacker images and validation={validation} leave {len(rows) - held} to work with and "
                f"{held} to validate on. Enlarge the attacker split (attacker_size)."
            )
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (data.mean, data.std))
        work, aside = rows[held:], rows[:held]
        return cls(x[work], y[work], x[aside], y[aside], data.num_classes, -mean / std, (1 - mean) / std)
