"""Data modules: every data set in five disjoint splits, for victim, validation, attacker, verification and test."""

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
