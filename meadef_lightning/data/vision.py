"""Published data sets through torchvision, kept in memory as bytes."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from meadef_lightning.data import class_names
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages

_UNREADABLE = (
    AssertionError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""What torchvision raises for files that are missing, damaged or of another kind, and for failed downloads."""


class TorchvisionDataModule(SplitDataModule):
    """Base of the data modules on a data set of torchvision; subclasses say how to open and convert one part.

    Args:
        root: folder for the files.
        download: whether to download missing files.
        **kwargs: see ``SplitDataModule``.
    """

    files: ClassVar[str]
    """Where torchvision expects the files, relative to ``root``; for error messages."""

    def __init__(self, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    @abstractmethod
    def open(self, train: bool, download: bool) -> Any:
        """Opens the training or the test part with torchvision.

        Args:
            train: whether the training part is meant.
            download: whether to download missing files.
        """

    @abstractmethod
    def convert(self, data: Any) -> tuple[Tensor, Tensor]:
        """Reads all images of a data set of torchvision.

        Args:
            data: what ``open`` returned.

        Returns:
            Images uint8 (N, C, H, W) and labels int64 (N,).
        """

    @override
    def prepare_data(self) -> None:
        """Downloads what is missing.

        Raises:
            FileNotFoundError: the download failed; the message says where to put the files by hand.
        """
        if self.download and self._datasets is None:
            try:
                for train in (True, False):
                    self.open(train, download=True)
            except _UNREADABLE as error:
                raise self._unreadable("downloaded to", error) from error

    @override
    def load(self) -> tuple[TensorImages, TensorImages]:
        try:
            train, test = (TensorImages(*self.convert(self.open(part, download=False))) for part in (True, False))
        except _UNREADABLE as error:
            raise self._unreadable("read from", error) from error
        return train, test

    def _unreadable(self, action: str, error: BaseException) -> FileNotFoundError:
        name = type(self).__name__.removesuffix("DataModule")
        return FileNotFoundError(
            f"{name} could not be {action} {Path(self.root).resolve()} ({type(error).__name__}: {error}). Have it "
            "downloaded (download=True and prepare_data(), which trainers call; needs a network connection and a "
            f"writable folder; remove damaged files first), or put the files at {self.files} and set root to the "
            "folder that contains them."
        )


class FashionMNISTDataModule(TorchvisionDataModule):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of clothing, 28×28, ten classes.

    Args:
        root: folder for the files.
        download: whether to download missing files.
        mean: mean of the pixels in [0, 1], as published.
        std: standard deviation of the pixels, as published.
        **kwargs: see ``SplitDataModule``.
    """

    files = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        mean: tuple[float, ...] | None = (0.2860,),
        std: tuple[float, ...] | None = (0.3530,),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, download, mean=mean, std=std, **kwargs)

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return class_names.FASHION_MNIST

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 28, 28

    @override
    def open(self, train: bool, download: bool) -> Any:
        from torchvision.datasets import FashionMNIST

        return FashionMNIST(self.root, train=train, download=download)

    @override
    def convert(self, data: Any) -> tuple[Tensor, Tensor]:
        return data.data[:, None], data.targets


class CIFAR10DataModule(TorchvisionDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images, 32×32, ten classes.

    Args:
        root: folder for the files.
        download: whether to download missing files.
        mean: mean of each channel of images in [0, 1], as published.
        std: standard deviation of each channel, as published.
        **kwargs: see ``SplitDataModule``.
    """

    files = "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        mean: tuple[float, ...] | None = (0.4914, 0.4822, 0.4465),
        std: tuple[float, ...] | None = (0.2470, 0.2435, 0.2616),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, download, mean=mean, std=std, **kwargs)

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return class_names.CIFAR10

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 3, 32, 32

    @override
    def open(self, train: bool, download: bool) -> Any:
        from torchvision.datasets import CIFAR10

        return CIFAR10(self.root, train=train, download=download)

    @override
    def convert(self, data: Any) -> tuple[Tensor, Tensor]:
        return _cifar_tensors(data)


class CIFAR100DataModule(TorchvisionDataModule):
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images, 32×32, a hundred (fine) classes.

    Args:
        root: folder for the files.
        download: whether to download missing files.
        mean: mean of each channel of images in [0, 1], as published.
        std: standard deviation of each channel, as published.
        **kwargs: see ``SplitDataModule``.
    """

    files = "cifar-100-python/{train,test,meta}"

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        mean: tuple[float, ...] | None = (0.5071, 0.4865, 0.4409),
        std: tuple[float, ...] | None = (0.2673, 0.2564, 0.2762),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, download, mean=mean, std=std, **kwargs)

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return class_names.CIFAR100

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 3, 32, 32

    @override
    def open(self, train: bool, download: bool) -> Any:
        from torchvision.datasets import CIFAR100

        return CIFAR100(self.root, train=train, download=download)

    @override
    def convert(self, data: Any) -> tuple[Tensor, Tensor]:
        return _cifar_tensors(data)


def _cifar_tensors(data: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


class GTSRBDataModule(TorchvisionDataModule):
    """German Traffic Sign Recognition Benchmark (Stallkamp et al. 2012): 26,640 + 12,630 colour images, 43 classes.

    The training images are frames of short tracks of one physical sign, and the splits separate images, not tracks:
    accuracy on the validation split is therefore higher than on the test split.

    Args:
        root: folder for the files.
        download: whether to download missing files.
        image_size: height and width to which the images, 15 to 250 pixels wide, are resized.
        mean: mean of each channel of images in [0, 1], as published.
        std: standard deviation of each channel, as published.
        **kwargs: see ``SplitDataModule``.

    Raises:
        ValueError: ``image_size`` is not positive.
    """

    files = "gtsrb/{GTSRB/Training/<class>/*.ppm,GTSRB/Final_Test/Images/*.ppm,GT-final_test.csv}"

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        image_size: int = 32,
        mean: tuple[float, ...] | None = (0.3403, 0.3121, 0.3214),
        std: tuple[float, ...] | None = (0.2724, 0.2608, 0.2669),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, download, mean=mean, std=std, **kwargs)
        if image_size < 1:
            raise ValueError(f"image_size must be positive, got {image_size}.")
        self.image_size = image_size

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return class_names.GTSRB

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @override
    def open(self, train: bool, download: bool) -> Any:
        from torchvision.datasets import GTSRB
        from torchvision.transforms import v2

        size = [self.image_size, self.image_size]
        transform = v2.Compose([v2.Resize(size), v2.PILToTensor()])  # Pillow resizes with antialiasing
        return GTSRB(self.root, split="train" if train else "test", transform=transform, download=download)

    @override
    def convert(self, data: Any) -> tuple[Tensor, Tensor]:
        with ThreadPoolExecutor() as threads:  # Pillow releases the interpreter lock while it decodes
            images, labels = zip(*threads.map(data.__getitem__, range(len(data))), strict=True)
        return torch.stack(images), torch.tensor(labels)
