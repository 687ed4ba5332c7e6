"""Real handwritten digits that come with scikit-learn: the embedded default, nothing to download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages


def upsample_digits(images: Tensor, size: int) -> Tensor:
    """Enlarges scikit-learn's digits bilinearly.

    Args:
        images: values 0 to 16, any numeric type, (N, 8, 8).
        size: height and width of the result.

    Returns:
        uint8 (N, 1, size, size), 0 to 255.
    """
    scaled = images[:, None].float() * (255 / 16)
    enlarged = F.interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged.round().to(torch.uint8)


class DigitsDataModule(SplitDataModule):
    """The 1,797 handwritten digits of scikit-learn (8×8 grey), enlarged; splits are stratified.

    Source: test part of the UCI data set "Optical Recognition of Handwritten Digits".

    Args:
        image_size: height and width of the images, at least 8.
        batch_size: images in a batch.
        seed: seed of the splits.
        victim_size: images that train the victim.
        attacker_size: images for the attacker's queries.
        verification_size: images for watermark samples in verification.
        validation_size: images that validate the victim.
        test_size: images for testing.
        mean: mean of the pixels in [0, 1]; the default was measured on all digits, 8×8.
        std: standard deviation of the pixels, likewise.
        **kwargs: further arguments of ``SplitDataModule``.

    Raises:
        ValueError: ``image_size`` is smaller than the digits themselves.
    """

    def __init__(
        self,
        image_size: int = 16,
        batch_size: int = 128,
        seed: int = 0,
        victim_size: int | None = 700,
        attacker_size: int | None = 500,
        verification_size: int | None = 200,
        validation_size: int | None = 97,
        test_size: int | None = 300,
        mean: tuple[float, ...] | None = (0.3053,),
        std: tuple[float, ...] | None = (0.3760,),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            victim_size=victim_size,
            attacker_size=attacker_size,
            verification_size=verification_size,
            validation_size=validation_size,
            mean=mean,
            std=std,
            **kwargs,
        )
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, the size of the digits themselves, got {image_size}.")
        self.image_size = image_size
        self.test_size = test_size

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 1, self.image_size, self.image_size

    @override
    def load(self) -> tuple[TensorImages, None]:
        from sklearn.datasets import load_digits  # only when used: scikit-learn takes a second to import

        digits = load_digits()
        images = upsample_digits(torch.from_numpy(digits.images), self.image_size)
        return TensorImages(images, torch.from_numpy(digits.target.astype(np.int64))), None
