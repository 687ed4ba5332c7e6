"""YouTube Faces: frames of videos, cut to the face by the published boxes."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from typing_extensions import override

from meadef_lightning.data.files import Box, FilesDataModule, ImageFiles, Listing

_BOX_FILE = ".labeled_faces.txt"
_HOW_TO_GET = (
    "YouTube Faces cannot be downloaded automatically: request access at https://www.cs.tau.ac.il/~wolf/ytfaces/, "
    "unpack YouTubeFaces.tar.gz and set root to its folder frame_images_DB, which holds for each person a folder "
    f"<person>/<video>/<frame>.jpg and a file <person>{_BOX_FILE}."
)


def read_boxes(path: Path) -> dict[str, Box]:
    r"""Reads the published boxes of one person.

    A line is ``filename,[ignore],x,y,width,height,[ignore],[ignore]``; x and y are the centre of the face, and the
    filename has the form ``<person>\<video>\<frame>.jpg``.

    Args:
        path: the file ``<person>.labeled_faces.txt``.

    Returns:
        For each file, by its path relative to the person's parent folder and with forward slashes, the box as left,
        top, width, height in pixels.

    Raises:
        ValueError: a line has another form, or names a file outside the person's folder.
    """
    boxes: dict[str, Box] = {}
    person = path.name.removesuffix(_BOX_FILE)
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = line.strip().split(",")
            name = PurePosixPath(fields[0].replace("\\", "/"))
            try:
                x, y, width, height = (int(float(value)) for value in fields[2:6])
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected filename,ignored,x,y,width,height,… but got {line.strip()!r}. "
                    "Unpack the file again."
                ) from error
            # The file comes from elsewhere: it must not make us open files of somebody else.
            if name.parts[:1] != (person,) or ".." in name.parts or width < 1 or height < 1:
                raise ValueError(
                    f"{path}, line {number}: {line.strip()!r} is not a box with positive size in a frame below "
                    f"{person}/. Unpack the file again."
                )
            boxes[name.as_posix()] = (x - width // 2, y - height // 2, width, height)
    return boxes


def frame_order(path: str) -> tuple[tuple[int, str], ...]:
    """Sort key that orders frames by the numbers in their names: frame 9 before frame 10.

    Args:
        path: path of a frame.

    Returns:
        A key that compares numbers as numbers and the rest as text.
    """
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path))


class YouTubeFacesDataModule(FilesDataModule):
    """YouTube Faces (Wolf et al. 2011): persons with enough images; a person's last frames are for testing.

    Expects ``root/<person>/<video>/<frame>.jpg`` and ``root/<person>.labeled_faces.txt`` (or the latter inside the
    person's folder). Neighbouring frames of a video look alike, and the splits of the training part separate frames,
    not videos: accuracy on the validation split is therefore higher than on the test split.

    Args:
        root: the folder ``frame_images_DB``.
        image_size: height and width to which faces are resized.
        in_memory: whether to decode all frames once (about 12 kB each at 64×64) instead of in every epoch.
        min_images: persons with fewer images are left out; the paper has 1,283 persons with 100 or more.
        test_images: the last images of each person that are for testing.
        mean: mean of each channel; measured on the victim split if ``None``, which reads it once.
        std: standard deviation of each channel, likewise.
        **kwargs: see ``SplitDataModule``. With frames decoded in every epoch, set ``num_workers``.

    Raises:
        ValueError: ``test_images`` would leave a person without images to train on.
    """

    def __init__(
        self,
        root: str = "data/frame_images_DB",
        image_size: int = 64,
        in_memory: bool = False,
        min_images: int = 100,
        test_images: int = 50,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, image_size, in_memory, mean=mean, std=std, **kwargs)
        if not 1 <= test_images < min_images:
            raise ValueError(
                f"test_images must be at least 1 and smaller than min_images, so that every person keeps images to "
                f"train on, got test_images={test_images} and min_images={min_images}."
            )
        self.min_images = min_images
        self.test_images = test_images

    @override
    def list_files(self) -> Listing:
        root = Path(self.root)
        box_files = sorted([*root.glob(f"*{_BOX_FILE}"), *root.glob(f"*/*{_BOX_FILE}")])
        if not box_files:
            raise FileNotFoundError(f"There is no <person>{_BOX_FILE} in {root.resolve()}. {_HOW_TO_GET}")
        persons = {path.name.removesuffix(_BOX_FILE): read_boxes(path) for path in box_files}
        kept = {person: boxes for person, boxes in sorted(persons.items()) if len(boxes) >= self.min_images}
        if len(kept) < 2:
            raise ValueError(
                f"Of {len(persons)} persons in {root.resolve()}, {len(kept)} have at least min_images="
                f"{self.min_images} images; a classifier needs two. Lower min_images, or unpack all files."
            )
        train: list[tuple[str, int, Box]] = []
        test: list[tuple[str, int, Box]] = []
        for label, (person, boxes) in enumerate(kept.items()):
            if missing := boxes.keys() - _frames(root, person):
                raise FileNotFoundError(
                    f"{len(missing)} of {len(boxes)} frames of {person} are missing in {root.resolve()}, for example "
                    f"{min(missing)}. Unpack the files again. {_HOW_TO_GET}"
                )
            rows = [(name, label, boxes[name]) for name in sorted(boxes, key=frame_order)]
            train += rows[: -self.test_images]
            test += rows[-self.test_images :]
        return Listing(tuple(kept), _files(root, train), _files(root, test))


def _frames(root: Path, person: str) -> set[str]:
    """Lists the files below a person's folder: far faster than asking for each frame whether it exists."""
    return {
        (Path(folder).relative_to(root) / name).as_posix()
        for folder, _, names in os.walk(root / person)
        for name in names
    }


def _files(root: Path, rows: list[tuple[str, int, Box]]) -> ImageFiles:
    names, labels, boxes = zip(*rows, strict=True)
    return ImageFiles(str(root), names, labels, boxes)
