"""The data module all of ours derive from: one split convention, one way of loading."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from meadef_lightning.data.images import ImageDataset, TensorImages, channel_statistics, collate_batch
from meadef_lightning.data.loading import EpochShuffle, ResumableDataModule, ResumableLoader
from meadef_lightning.data.splits import SHARES, Split, split_indices

_READ_BATCH = 512
"""Images read at a time where a whole split is read: bounds memory, large enough to be fast."""


class SplitDataModule(ResumableDataModule, ABC):
    """Images in five disjoint splits: for the victim, its validation, the attacker, the verification, and the test.

    The first four are drawn from the data's training part, with every class in nearly its overall proportion; the
    test split is the data's own test part, or drawn as well where there is none. Trainers train on the victim split,
    validate on the validation split, test and predict on the test split. Batches are ``(x, y)``: float32
    (B, C, H, W), normalised, and int64 (B,).

    The order of training batches depends on the seed of the global generator (``seed_everything``) and the epoch
    only, and a checkpoint carries it: a resumed run sees the batches that the uninterrupted run would have seen, also
    in the middle of an epoch. Loading neither reads nor advances the global random state; an ``augmentation`` does,
    like dropout.

    Subclasses implement ``load``, ``class_names`` and ``image_shape``.

    Args:
        batch_size: images in a batch.
        seed: seed of the splits; the same seed and sizes always give the same splits.
        victim_size: images that train the victim. An open size (``None``) is a share of what the others leave.
        attacker_size: images for the attacker's queries. They are cut last, so their number changes no other split,
            and fewer queries are a subset of more.
        verification_size: images from which the owner makes watermark samples for verification.
        validation_size: images that validate the victim.
        num_workers: loading processes; 0 is fastest for images in memory.
        mean: mean of each channel; measured on the victim split if ``None``.
        std: standard deviation of each channel; measured on the victim split if ``None``.
        augmentation: applied to whole training batches on their device, for example ``RandomShiftFlip`` or a
            transform of ``torchvision.transforms.v2``.

    Raises:
        ValueError: an argument is out of range, or only one of ``mean`` and ``std`` is given.
    """

    train_split: Split = "victim"
    """The split that training loaders draw from; ``"attacker"`` trains a model of the thief's means on true labels."""

    test_size: int | None = None
    """Size of the test split where it has to be drawn; an open size is a fifth of the data."""

    def __init__(
        self,
        batch_size: int = 128,
        seed: int = 0,
        victim_size: int | None = None,
        attacker_size: int | None = None,
        verification_size: int | None = None,
        validation_size: int | None = None,
        num_workers: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        augmentation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 (load in this process) or more, got {num_workers}.")
        if victim_size == 0:
            raise ValueError("victim_size=0 leaves nothing to train on; give at least one image, or None for a share.")
        if (mean is None) != (std is None):
            raise ValueError(f"Give both mean and std or neither, got mean={mean}, std={std}.")
        if mean is not None and std is not None and (len(mean) != len(std) or min(std) <= 0):
            raise ValueError(f"mean and std need one value a channel and std must be positive, got {mean} and {std}.")
        self.batch_size = batch_size
        self.seed = seed
        self.sizes: dict[Split, int | None] = {
            "validation": validation_size,
            "verification": verification_size,
            "victim": victim_size,
            "attacker": attacker_size,
        }
        self.num_workers = num_workers
        self.augmentation = augmentation
        self._mean = mean
        self._std = std
        self._datasets: dict[Split, ImageDataset] | None = None
        self._shuffle_seed: int | None = None
        self._resumed_seed: int | None = None

    @abstractmethod
    def load(self) -> tuple[ImageDataset, ImageDataset | None]:
        """Opens the data; called once in each process, without downloading.

        Returns:
            The training part, and the test part or ``None`` if the data has none.
        """

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of images in [0, 1]; sets the data up if it has to be measured."""
        return self._mean if self._mean is not None else self.dataset("victim").mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of images in [0, 1]; sets the data up if it has to be measured."""
        return self._std if self._std is not None else self.dataset("victim").std

    @override
    def setup(self, stage: str | None = None) -> None:
        """Opens the data and cuts the splits, once for all stages.

        Args:
            stage: ignored, the splits are the same in every stage.

        Raises:
            ValueError: the sizes do not fit the data, a label has no class, or a class is absent from the victim split.
        """
        if self._datasets is None:
            self._datasets = self._split(*self.load())

    def _split(self, train: ImageDataset, test: ImageDataset | None) -> dict[Split, ImageDataset]:
        for part in (train, test):
            if part is not None and len(part) and int(part.targets.max()) >= self.num_classes:
                raise ValueError(
                    f"{type(self).__name__} has {self.num_classes} classes but there is a label "
                    f"{int(part.targets.max())}. The files do not belong to this data set."
                )
        sizes = {"test": self.test_size, **self.sizes} if test is None else self.sizes
        indices = split_indices(len(train), sizes, self.seed, train.targets)
        counts = torch.bincount(train.labels[indices["victim"]], minlength=self.num_classes)
        if absent := [self.class_names[i] for i in (counts == 0).nonzero().flatten().tolist()]:
            raise ValueError(
                f"Class(es) {', '.join(map(repr, absent[:10]))} have no image among the {len(indices['victim'])} of the "
                "victim split, so no model can learn them. Raise victim_size, or check that the data has these classes."
            )
        mean, std = self._mean, self._std
        if mean is None or std is None:
            mean, std = channel_statistics(map(train.pixels, torch.split(indices["victim"], _READ_BATCH)))
        if len(mean) not in (1, self.image_shape[0]):
            raise ValueError(
                f"mean and std have {len(mean)} values, but the images have {self.image_shape[0]} channels; give one for each, or one for all."
            )
        datasets = {name: train.view(rows, mean, std) for name, rows in indices.items()}
        if test is not None:
            datasets["test"] = test.view(test.indices, mean, std)
        return datasets

    def dataset(self, split: Split) -> ImageDataset:
        """Returns one split; sets the data up if need be.

        Args:
            split: which one.

        Returns:
            A data set of normalised images and their classes, which can be asked for a whole batch
            (``__getitems__``). Build loaders on it with ``collate_fn=collate_batch``.

        Raises:
            ValueError: there is no such split, or it is empty.
        """
        if split not in SHARES:
            raise ValueError(f"There is no split {split!r}; choose from {sorted(SHARES)}.")
        self.setup()
        dataset = (self._datasets or {})[split]
        if len(dataset) == 0:
            raise ValueError(f"The {split} split is empty; set {split}_size to the number of images it shall have.")
        return dataset

    def tensors(self, split: Split) -> tuple[Tensor, Tensor]:
        """Reads a whole split into memory, in a random but fixed order in which any prefix is class-balanced.

        Args:
            split: which one.

        Returns:
            Images float32 (N, C, H, W), normalised, and classes int64 (N,).

        Raises:
            ValueError: there is no such split, or it is empty.
        """
        dataset = self.dataset(split)
        if isinstance(dataset, TensorImages):
            return dataset.__getitems__(torch.arange(len(dataset)))
        images, labels = zip(*self._evaluation_loader(dataset), strict=True)
        return torch.cat(images), torch.cat(labels)

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Training split (the victim's unless told otherwise), shuffled anew in each epoch."""
        dataset = self.dataset(self.train_split)
        self._shuffle_seed = torch.initial_seed() if self._resumed_seed is None else self._resumed_seed
        sampler = EpochShuffle(dataset, self._shuffle_seed)
        return self.resumable_loader(dataset, sampler=sampler, **self._loader_arguments())

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation split; no loader at all if ``validation_size`` is 0."""
        self.setup()
        return [] if self.sizes["validation"] == 0 else self._evaluation_loader(self.dataset("validation"))

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Test split."""
        return self._evaluation_loader(self.dataset("test"))

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Test split."""
        return self._evaluation_loader(self.dataset("test"))

    def _evaluation_loader(self, dataset: ImageDataset) -> DataLoader[Any]:
        return DataLoader(dataset, **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "collate_fn": collate_batch,
            "pin_memory": torch.cuda.is_available(),
            # Without a generator of its own, a loader draws a seed from the global one, and validating more often
            # would change the training.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments training batches on their device.

        Args:
            batch: ``(x, y)``.
            dataloader_idx: number of the loader.

        Returns:
            The batch, augmented while a trainer trains.
        """
        if self.trainer is None:
            return batch
        if self.augmentation is not None and self.trainer.training:
            x, y = batch
            batch = self.augmentation.to(x.device)(x), y
        # Lightning calls the hook of the data module instead of the model's, not beside it.
        return self.trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold to continue with the same batches."""
        images = _digest(self.dataset(self.train_split).indices)
        return {**super().state_dict(), "shuffle_seed": self._shuffle_seed, "train_sha256": images}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the shuffling of a checkpoint; warns if that was trained on other images.

        Args:
            state_dict: what ``state_dict`` returned.
        """
        super().load_state_dict(state_dict)
        self._resumed_seed = state_dict["shuffle_seed"]
        if state_dict["train_sha256"] != _digest(self.dataset(self.train_split).indices):
            rank_zero_warn(
                "The checkpoint was trained on other images. Its model may have seen images that are now in "
                "the attacker's, the verification or the validation split. Use the seed and sizes of the first run."
            )

    @override
    def teardown(self, stage: str) -> None:
        """Ends a run: the next fit takes its shuffling from the global seed again.

        Args:
            stage: ignored.
        """
        super().teardown(stage)
        self._resumed_seed = None

    def split_summary(self) -> dict[str, Any]:
        """Describes the splits, so that a report can show which images were used for what.

        Returns:
            Primitive values: name of the data, seed, the SHA-256 of the training and the test part, size and SHA-256
            of each split (over the part's hash and the sorted indices), and whether all splits are disjoint.
        """
        self.setup()
        datasets = self._datasets or {}
        carved = {name: data for name, data in datasets.items() if name in self.sizes}
        test = datasets["test"]
        sources = {"train": datasets["victim"].fingerprint(), "test": test.fingerprint()}
        if sources["test"] == sources["train"]:
            carved["test"] = test
        rows = torch.cat([data.indices for data in carved.values()])
        return {
            "data": type(self).__name__,
            "seed": self.seed,
            "sources": sources,
            "splits": {
                name: {
                    "size": len(data),
                    "sha256": _digest(data.indices, sources["train" if name in carved else "test"]),
                }
                for name, data in datasets.items()
            },
            "disjoint": int(rows.bincount().max()) == 1,
        }


def _digest(indices: Tensor, source: str = "") -> str:
    values = indices.sort().values.numpy().astype("<i8")
    return hashlib.sha256(source.encode() + values.tobytes()).hexdigest()
