"""Splits that are too large for memory, read where they lie a batch at a time: ImageNet's test images would take 30 GB."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import ImageDataset
from meadef_lightning.data.splits import Split

IN_MEMORY = 4 << 30
"""Bytes of images, as float32, up to which a split is read into memory: composites read every source many times."""


class StoredImages:
    """The images of a split, with what a tensor ``(N, C, H, W)`` has for whoever only takes rows out of it.

    Args:
        dataset: The split.
        image_shape: Channels, height and width.
    """

    dtype = torch.float32

    def __init__(self, dataset: ImageDataset, image_shape: tuple[int, int, int]) -> None:
        self.dataset = dataset
        self.shape = torch.Size((len(dataset), *image_shape))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Reads rows: float32 ``(n, C, H, W)``, normalised."""
        positions = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows
        return self.dataset.__getitems__(positions)[0]


Images = Tensor | StoredImages


def batches(x: Images, size: int) -> Iterator[Tensor]:
    """Yields consecutive rows of ``x``, at most ``size`` at a time."""
    for start in range(0, len(x), size):
        yield x[start : start + size]


def read_split(data: Any, split: Split) -> tuple[Images, Tensor]:
    """Reads a split into memory, or leaves it where it is if it has more than ``IN_MEMORY`` bytes.

    Args:
        data: A data module with ``tensors(split)``. Splits of those with a ``tensors`` of their own are always read.
        split: Which one.

    Returns:
        Images, float32 ``(N, C, H, W)``, and classes, int64 ``(N,)``.
    """
    if isinstance(data, SplitDataModule) and type(data).tensors is SplitDataModule.tensors:
        dataset = data.dataset(split)
        if 4 * len(dataset) * math.prod(data.image_shape) > IN_MEMORY:
            return StoredImages(dataset, data.image_shape), dataset.targets
    x, y = data.tensors(split)
    return x, y
