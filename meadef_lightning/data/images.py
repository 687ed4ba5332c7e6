"""Labelled images that are read a whole batch at a time: kept as bytes, normalised when asked for."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from typing_extensions import Self, override


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turns bytes into the model's input space: ``(pixels / 255 - mean) / std`` for each channel.

    Args:
        pixels: uint8 (B, C, H, W).
        mean: mean of each channel of images in [0, 1].
        std: standard deviation of each channel, positive.

    Returns:
        float32 (B, C, H, W).
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
    return pixels.float().div_(255).sub_(shift).div_(scale)


def channel_statistics(batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measures mean and (population) standard deviation of each channel, exactly, in one pass.

    Args:
        batches: uint8 tensors (B, C, H, W) with the same C.

    Returns:
        Mean and standard deviation of each channel of the images scaled to [0, 1].

    Raises:
        ValueError: there are no images, or a channel is constant and so cannot be scaled.
    """
    total = square = torch.zeros((), dtype=torch.int64)
    count = 0
    for batch in batches:
        wide = batch.long()
        total = total + wide.sum((0, 2, 3))
        square = square + wide.square().sum((0, 2, 3))
        count += batch.numel() // batch.shape[1]
    if count == 0:
        raise ValueError("There are no images to measure mean and standard deviation on; give mean and std.")
    mean = total.double() / count
    std = (square.double() / count - mean.square()).clamp_min(0).sqrt()
    if (std == 0).any():
        raise ValueError(
            f"Channel(s) {(std == 0).nonzero().flatten().tolist()} are constant over all images, so there is no "
            "standard deviation to divide by. Check the images, or give mean and std."
        )
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def collate_batch(batch: Any) -> Any:
    """Passes on a batch that the data set has put together itself; collates a list of samples as torch does.

    Args:
        batch: what the data set returned: a ready ``(x, y)`` tuple from ``__getitems__``, or a list of samples.

    Returns:
        The batch.
    """
    return default_collate(batch) if isinstance(batch, list) else batch


class ImageDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Labelled images: a pool of bytes, a view of some of its rows, and the statistics that normalise them.

    A batch is asked for as a whole through ``__getitems__`` and comes as ``(x, y)``: float32 (B, C, H, W) and int64
    (B,). Loaders must be built with ``collate_fn=collate_batch``.

    Args:
        labels: class of each image in the pool, int64 (N,).
        mean: mean of each channel of images in [0, 1].
        std: standard deviation of each channel. Without statistics, images are in [0, 1].
        indices: rows of the pool that belong to the view, int64; ``None`` for all.
    """

    def __init__(
        self,
        labels: Tensor,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        indices: Tensor | None = None,
    ) -> None:
        self.labels = labels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.indices = torch.arange(len(labels)) if indices is None else indices

    @abstractmethod
    def pixels(self, rows: Tensor) -> Tensor:
        """Reads images of the pool.

        Args:
            rows: positions in the pool, int64 (B,).

        Returns:
            uint8 (B, C, H, W).
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a hexadecimal SHA-256 that identifies the whole pool, whatever the view."""

    @property
    def targets(self) -> Tensor:
        """Classes of the view's images, int64 (len(self),), without reading the images."""
        return self.labels[self.indices]

    def view(self, indices: Tensor, mean: Sequence[float], std: Sequence[float]) -> Self:
        """Returns other rows of the same pool; nothing is copied.

        Args:
            indices: positions in the pool, int64.
            mean: mean of each channel.
            std: standard deviation of each channel.
        """
        other = copy.copy(self)
        other.indices, other.mean, other.std = indices, tuple(mean), tuple(std)
        return other

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Returns a whole batch.

        Args:
            positions: positions in the view.

        Returns:
            Images float32 (B, C, H, W), normalised, and classes int64 (B,).
        """
        rows = self.indices[torch.as_tensor(positions, dtype=torch.int64)]
        return normalise(self.pixels(rows), self.mean, self.std), self.labels[rows]

    @override
    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Returns one image, float32 (C, H, W), and its class, int64 ()."""
        x, y = self.__getitems__([position])
        return x[0], y[0]


class TensorImages(ImageDataset):
    """Labelled images in memory, one byte a value.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        mean: mean of each channel of images in [0, 1].
        std: standard deviation of each channel. Without statistics, images are in [0, 1].

    Raises:
        ValueError: wrong shape or type, or not one label for each image.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}.")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(images)},), one for each image, got {labels.dtype} {tuple(labels.shape)}."
            )
        super().__init__(labels, mean, std)
        self.images = images

    @override
    def pixels(self, rows: Tensor) -> Tensor:
        return self.images[rows]

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()
