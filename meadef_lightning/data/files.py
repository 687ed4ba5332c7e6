"""Images that lie in files, one each: decoded when asked for, or once into memory."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import ImageDataset, TensorImages

Box = tuple[int, int, int, int]
"""Left, top, width, height of a part of an image, in pixels; may reach over the border."""


def read_image(path: str | Path, size: int, box: Box | None = None) -> Tensor:
    """Decodes an image file and resizes a part of it, with antialiasing.

    Args:
        path: a file of any kind that Pillow reads.
        size: height and width of the result.
        box: the part to take, black where it reaches over the border; ``None`` for the largest square in the middle.

    Returns:
        Colour image, uint8 (3, size, size).

    Raises:
        ValueError: the file cannot be read as an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}). Replace or remove the file.") from error
    if box is None:
        side = min(image.size)
        box = (image.width - side) // 2, (image.height - side) // 2, side, side
    left, top, width, height = box
    part = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


@dataclass(frozen=True)
class ImageFiles:
    """A list of image files.

    Args:
        root: folder that the paths are relative to.
        paths: path of each file, with forward slashes.
        labels: class of each file.
        boxes: the part to take of each image; ``None`` for the largest square in the middle.
    """

    root: str
    paths: Sequence[str]
    labels: Sequence[int]
    boxes: Sequence[Box] | None = None


class FileImages(ImageDataset):
    """Labelled images in files, decoded whenever they are asked for.

    Args:
        files: the files.
        size: height and width of the images.
    """

    def __init__(self, files: ImageFiles, size: int) -> None:
        super().__init__(torch.tensor(files.labels, dtype=torch.int64))
        self.files = files
        self.size = size

    def _read(self, row: int) -> Tensor:
        box = None if self.files.boxes is None else self.files.boxes[row]
        return read_image(Path(self.files.root, self.files.paths[row]), self.size, box)

    @override
    def pixels(self, rows: Tensor) -> Tensor:
        if len(rows) == 0:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return torch.stack([self._read(row) for row in rows.tolist()])

    @override
    def fingerprint(self) -> str:
        """Returns a SHA-256 over path, size, label and box of every file; contents are not read."""
        digest = hashlib.sha256(str(self.size).encode())
        for row, (path, label) in enumerate(zip(self.files.paths, self.files.labels, strict=True)):
            box = None if self.files.boxes is None else self.files.boxes[row]
            digest.update(repr((path, Path(self.files.root, path).stat().st_size, label, box)).encode())
        return digest.hexdigest()

    def in_memory(self) -> TensorImages:
        """Decodes every file once."""
        with ThreadPoolExecutor() as threads:  # Pillow releases the interpreter lock while it decodes
            images = list(threads.map(self._read, range(len(self.labels))))
        return TensorImages(torch.stack(images), self.labels)


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Args:
        class_names: name of each class, in the order of the labels.
        train: files of the training part.
        test: files of the test part, ``None`` if there is none.
    """

    class_names: tuple[str, ...]
    train: ImageFiles
    test: ImageFiles | None


class FilesDataModule(SplitDataModule):
    """Base of the data modules on image files; subclasses say which files there are.

    Args:
        root: folder of the files.
        image_size: height and width of the images.
        in_memory: whether to decode all files once, at one byte a value, instead of in every epoch.
        **kwargs: see ``SplitDataModule``.

    Raises:
        ValueError: ``image_size`` is not positive.
    """

    def __init__(self, root: str, image_size: int, in_memory: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise ValueError(f"image_size must be positive, got {image_size}.")
        self.root = root
        self.image_size = image_size
        self.in_memory = in_memory

    @abstractmethod
    def list_files(self) -> Listing:
        """Finds the files; called once in each process.

        Raises:
            FileNotFoundError: the folder is missing or has another form.
        """

    @cached_property
    def _listing(self) -> Listing:
        return self.list_files()

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return self._listing.class_names

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @override
    def load(self) -> tuple[ImageDataset, ImageDataset | None]:
        listing = self._listing
        return self._open(listing.train), None if listing.test is None else self._open(listing.test)

    def _open(self, files: ImageFiles) -> ImageDataset:
        images = FileImages(files, self.image_size)
        return images.in_memory() if self.in_memory else images
