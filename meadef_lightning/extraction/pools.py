"""Where a thief's images come from: the same distribution as the victim's, another data set, or nothing but noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.splits import Split


class Pool(ABC):
    """A source of images in the victim's input space."""

    in_domain: ClassVar[bool] = False
    """Whether its images and classes are those of the victim's data."""

    @property
    def name(self) -> str:
        """Name for reports."""
        return type(self).__name__

    @abstractmethod
    def images(self, data: SplitDataModule) -> tuple[Tensor, Tensor | None]:
        """Returns the whole pool, in an order that is fixed.

        Args:
            data: The victim's data splits: they tell the input space, and hold the attacker split.

        Returns:
            Images float32 ``(N, C, H, W)``, normalised as the victim's, and the pool's own classes int64 ``(N,)`` or ``None``.
        """


class AttackerSplit(Pool):
    """In-domain images that trained neither victim nor verifier: the attacker split of the victim's data."""

    in_domain = True

    def images(self, data: SplitDataModule) -> tuple[Tensor, Tensor | None]:
        """Returns the attacker split, in an order of which any prefix is class-balanced."""
        return data.tensors("attacker")


class OtherData(Pool):
    """Out-of-domain images: a split of another data set, brought to the victim's channels, size and normalisation.

    Args:
        other: The other data set.
        split: Which of its splits; the test split by default, which every data set has.
        size: Most images, the first ones; all by default.

    Raises:
        ValueError: If ``size`` is below 1.
    """

    def __init__(self, other: SplitDataModule, split: Split = "test", size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size={size} must be at least 1.")
        self.other, self.split, self.size = other, split, size

    @property
    def name(self) -> str:
        """Name for reports."""
        return type(self.other).__name__.removesuffix("DataModule")

    def images(self, data: SplitDataModule) -> tuple[Tensor, Tensor | None]:
        """Returns the other data set's images in the victim's input space, and their own classes."""
        self.other.prepare_data()
        self.other.setup()
        x, y = (tensor[: self.size] for tensor in self.other.tensors(self.split))
        x = _affine(x, self.other.std, self.other.mean)
        channels, *size = data.image_shape
        if x.shape[1] != channels:
            x = (
                transforms.rgb_to_grayscale(x)
                if channels == 1
                else x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
            )
        if list(x.shape[2:]) != size:
            x = transforms.resize(x, size, antialias=True).clamp(0, 1)
        return _normalised(x, data), y


class Photographs(Pool):
    """Out-of-domain images that need no download: random square crops of the two photographs that come with scikit-learn.

    Args:
        size: Number of crops.
        seed: Seed of their places and sizes.

    Raises:
        ValueError: If ``size`` is below 1.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1.")
        self.size, self.seed = size, seed

    def images(self, data: SplitDataModule) -> tuple[Tensor, Tensor | None]:
        """Returns the crops in the victim's input space, without classes."""
        from sklearn.datasets import load_sample_images

        photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
        channels, height, width = data.image_shape
        generator = torch.Generator().manual_seed(self.seed)
        crops = []
        for i, (scale, top, left) in enumerate(torch.rand((self.size, 3), generator=generator).tolist()):
            photograph = photographs[i % len(photographs)]
            _, rows, columns = photograph.shape
            side = min(rows, columns, round(max(height, width) * (1 + 3 * scale)))
            box = (round(top * (rows - side)), round(left * (columns - side)), side, side)
            crops.append(transforms.resized_crop(photograph, *box, [height, width], antialias=True))
        x = torch.stack(crops).clamp(0, 1)
        return _normalised(x if channels == 3 else x.mean(1, keepdim=True).expand(-1, channels, -1, -1), data), None


class Noise(Pool):
    """Images of independent uniform pixels: a thief without any data.

    Args:
        size: Number of images.
        seed: Seed of the pixels.

    Raises:
        ValueError: If ``size`` is below 1.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1.")
        self.size, self.seed = size, seed

    def images(self, data: SplitDataModule) -> tuple[Tensor, Tensor | None]:
        """Returns the noise, uniform over the range of pixels, without classes."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.rand((self.size, *data.image_shape), generator=generator, dtype=torch.float32)
        return _normalised(x, data), None


def pixel_range(data: SplitDataModule) -> tuple[Tensor, Tensor]:
    """Returns what black and white are in the victim's input space: two tensors ``(C, 1, 1)``, to clip queries to."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (data.mean, data.std))
    return -mean / std, (1 - mean) / std


def _normalised(x: Tensor, data: SplitDataModule) -> Tensor:
    std = torch.tensor(data.std)
    return _affine(x, 1 / std, -torch.tensor(data.mean) / std)


def _affine(x: Tensor, scale: Tensor | tuple[float, ...], shift: Tensor | tuple[float, ...]) -> Tensor:
    scale, shift = (torch.as_tensor(values, dtype=x.dtype)[:, None, None] for values in (scale, shift))
    return x * scale + shift
