"""A user's own pictures: a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from meadef_lightning.data.files import FilesDataModule, ImageFiles, Listing

_FORM = "Expected root/train/<class>/<picture> and, if there is a test set, root/test/<class>/<picture>"


class ImageFolderDataModule(FilesDataModule):
    """Pictures in ``root/train/<class>/`` and ``root/test/<class>/``; without ``root/test`` a test split is drawn.

    Of each picture the largest square in the middle is taken and resized. All kinds of image files that torchvision's
    ``ImageFolder`` knows are read, as colour images.

    Args:
        root: folder that contains ``train``.
        image_size: height and width to which pictures are resized.
        in_memory: whether to decode all pictures once, at one byte a value, instead of in every epoch: right for
            small pictures (CIFAR-10 takes 180 MB).
        test_size: size of the test split where there is no ``root/test``; a fifth of the pictures if ``None``.
        mean: mean of each channel; measured on the victim split if ``None``, which reads it once.
        std: standard deviation of each channel, likewise.
        **kwargs: see ``SplitDataModule``. With pictures decoded in every epoch, set ``num_workers``.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 32,
        in_memory: bool = False,
        test_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, image_size, in_memory, mean=mean, std=std, **kwargs)
        self.test_size = test_size

    @override
    def list_files(self) -> Listing:
        root = Path(self.root)
        names, train = _list_folder(root / "train")
        if not (root / "test").is_dir():
            return Listing(names, train, None)
        test_names, test = _list_folder(root / "test")
        if unknown := sorted(set(test_names) - set(names)):
            raise ValueError(
                f"{root / 'test'} has class(es) {unknown[:10]} that {root / 'train'} has not. "
                "Class folders are matched by name: rename or remove them."
            )
        # The test part may lack a class, so its own numbering can differ.
        number = {name: label for label, name in enumerate(names)}
        labels = [number[test_names[label]] for label in test.labels]
        return Listing(names, train, ImageFiles(test.root, test.paths, labels))


def _list_folder(folder: Path) -> tuple[tuple[str, ...], ImageFiles]:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        raise FileNotFoundError(
            f"No pictures in {folder.resolve()} ({error}). {_FORM}; set root accordingly."
        ) from error
    paths = [Path(path).relative_to(folder).as_posix() for path, _ in found.samples]
    return tuple(found.classes), ImageFiles(str(folder), paths, list(found.targets))
