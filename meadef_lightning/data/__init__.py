"""Data modules: every data set in five disjoint splits, for victim, validation, attacker, verification and test.

``DigitsDataModule`` needs no download, ``ImageFolderDataModule`` takes your own pictures, and the others fetch what they are called after. A data
set of your own is a `meadef_lightning.data.base.SplitDataModule` with ``load``, and perhaps ``image_shape`` and ``class_names``;
`meadef_lightning.data.splits` draws the splits, `meadef_lightning.data.images` and `meadef_lightning.data.files` hold images in memory or
on disk, and `meadef_lightning.data.augmentation` draws for every image anew, on the device. ``data.tensors("attacker")`` is a whole
split, ``data.split_summary()`` its digest for a report. What a thief has for removals is `meadef_lightning.data.thief`.
"""

from meadef_lightning.data.augmentation import Chain, RandomNoiseSquare, RandomShiftFlip, shift_flip
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.digits import DigitsDataModule
from meadef_lightning.data.faces import YouTubeFacesDataModule
from meadef_lightning.data.folder import ImageFolderDataModule
from meadef_lightning.data.images import ImageDataset, TensorImages, collate_batch, normalise
from meadef_lightning.data.splits import Split, split_indices
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.data.vision import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    GTSRBDataModule,
)

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "Chain",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "GTSRBDataModule",
    "ImageDataset",
    "ImageFolderDataModule",
    "RandomNoiseSquare",
    "RandomShiftFlip",
    "Split",
    "SplitDataModule",
    "TensorImages",
    "ThiefData",
    "YouTubeFacesDataModule",
    "collate_batch",
    "normalise",
    "shift_flip",
    "split_indices",
]
