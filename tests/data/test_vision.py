import csv
import hashlib
import os
import pickle
import socket
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from meadef_lightning.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    GTSRBDataModule,
    class_names,
)

SPLITS = ("victim", "validation", "attacker", "verification", "test")


def write_idx(path, array):
    """The idx format of MNIST: a type byte, the number of dimensions, big-endian sizes, raw bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def fashion_mnist(root):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    truth = {}
    for part, n in (("train", 100), ("t10k", 20)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        labels = np.arange(n) % 10
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
        truth[part == "train"] = images[:, None], labels
    return truth


def cifar(root, monkeypatch, dataset, classes):
    """Batches of rows of 3,072 bytes, planes of red, green, blue; checksums set to those of the files."""
    folder = root / dataset.base_folder
    folder.mkdir()
    key = "labels" if classes == 10 else "fine_labels"
    truth = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    for train, listing in ((True, "train_list"), (False, "test_list")):
        entries, images, labels = [], [], []
        for name, _ in getattr(dataset, listing):
            n = 2 * classes
            batch = np.random.default_rng(len(name) + train).integers(0, 256, (n, 3072), dtype=np.uint8)
            entries.append([name, write(name, {"data": batch, key: [i % classes for i in range(n)]})])
            images.append(batch.reshape(n, 3, 32, 32))
            labels += [i % classes for i in range(n)]
        monkeypatch.setattr(dataset, listing, entries)
        truth[train] = np.concatenate(images), np.array(labels)
    meta = {
        **dataset.meta,
        "md5": write(dataset.meta["filename"], {dataset.meta["key"]: list(map(str, range(classes)))}),
    }
    monkeypatch.setattr(dataset, "meta", meta)
    return truth


def gtsrb(root):
    """Training images in a folder for each class, test images in one folder with a table; uniform colours."""
    truth = {}
    base = root / "gtsrb"
    test_folder = base / "GTSRB" / "Final_Test" / "Images"
    test_folder.mkdir(parents=True)
    colours, labels = [], []
    for label in range(43):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for i in range(3):
            colour = (label * 5, i * 50, 255 - label)
            Image.new("RGB", (20 + i, 25 + label), colour).save(folder / f"00000_{i:05d}.ppm")
            colours.append(colour)
            labels.append(label)
    truth[True] = colours, labels
    with (base / "GT-final_test.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["Filename", "Width", "Height", "ClassId"])
        for i in range(6):
            Image.new("RGB", (30, 40), (i, 2 * i, 3 * i)).save(test_folder / f"{i:05d}.ppm")
            table.writerow([f"{i:05d}.ppm", 30, 40, 42 - i])
    truth[False] = [(i, 2 * i, 3 * i) for i in range(6)], [42 - i for i in range(6)]
    return truth


def check_all_images_arrive(data, truth):
    """Every image on disk is in exactly one split, with its label, normalised by the published statistics."""
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (data.mean, data.std))
    for train in (True, False):
        images, labels = truth[train]
        expected = sorted(zip((((images / 255) - mean) / std).sum((1, 2, 3)), labels, strict=True))
        found = []
        for split in SPLITS:
            if (split == "test") == (not train):
                x, y = data.tensors(split)
                assert x.shape[1:] == data.image_shape
                found += zip(x.double().sum((1, 2, 3)).tolist(), y.tolist(), strict=True)
        found.sort()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-2)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_fashion_mnist_reads_idx_files(tmp_path, no_network):
    truth = fashion_mnist(tmp_path)
    data = FashionMNISTDataModule(str(tmp_path), victim_size=50)
    data.prepare_data()  # finds the files and downloads nothing
    check_all_images_arrive(data, truth)
    assert data.class_names[6] == "Shirt"
    assert data.num_classes == 10


@pytest.mark.parametrize(
    ("module", "dataset", "classes"),
    [(CIFAR10DataModule, datasets.CIFAR10, 10), (CIFAR100DataModule, datasets.CIFAR100, 100)],
)
def test_cifar_reads_batches(tmp_path, monkeypatch, no_network, module, dataset, classes):
    monkeypatch.setattr(datasets.CIFAR10, "train_list", datasets.CIFAR10.train_list[:2])
    truth = cifar(tmp_path, monkeypatch, dataset, classes)
    data = module(str(tmp_path), victim_size=classes, attacker_size=10, verification_size=10)
    data.prepare_data()
    check_all_images_arrive(data, truth)
    assert data.num_classes == classes


def test_gtsrb_reads_folders_and_table(tmp_path, no_network):
    truth = {
        train: (np.broadcast_to(np.array(colours)[:, :, None, None], (len(colours), 3, 32, 32)), labels)
        for train, (colours, labels) in gtsrb(tmp_path).items()
    }
    data = GTSRBDataModule(str(tmp_path), victim_size=70)
    data.prepare_data()
    check_all_images_arrive(data, truth)
    assert data.num_classes == 43
    assert GTSRBDataModule(str(tmp_path), image_size=20).tensors("test")[0].shape == (6, 3, 20, 20)


def test_class_names_are_complete():
    assert len(set(class_names.CIFAR100)) == 100
    assert list(class_names.CIFAR100) == sorted(class_names.CIFAR100)
    assert len(set(class_names.GTSRB)) == 43
    assert list(class_names.FASHION_MNIST) == datasets.FashionMNIST.classes


@pytest.mark.parametrize("module", [FashionMNISTDataModule, CIFAR10DataModule, CIFAR100DataModule, GTSRBDataModule])
def test_missing_files_name_the_remedy(tmp_path, module):
    data = module(str(tmp_path / "nowhere"), download=False)
    data.prepare_data()
    with pytest.raises(
        FileNotFoundError, match=r"could not be read from .*nowhere.*download=True.*put the files at"
    ) as e:
        data.setup()
    assert data.files in str(e.value)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("module", [FashionMNISTDataModule, CIFAR10DataModule, GTSRBDataModule])
def test_failed_download_names_the_remedy(tmp_path, no_network, module):
    with pytest.raises(FileNotFoundError, match=r"(?s)could not be downloaded to .*unreachable.*network connection"):
        module(str(tmp_path)).prepare_data()


def test_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"downloaded to .*file.*writable folder"):
        FashionMNISTDataModule(str(tmp_path / "file")).prepare_data()


@pytest.mark.parametrize("damage", ["truncated", "labels of another part", "not idx"])
def test_damaged_files_are_explained(tmp_path, damage):
    fashion_mnist(tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-100])
    elif damage == "not idx":
        images.write_bytes(b"<html>404</html>")
    else:
        labels.write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"FashionMNIST could not be read .*remove damaged files"):
        FashionMNISTDataModule(str(tmp_path)).setup()


def test_cifar_with_wrong_checksum_is_never_unpickled(tmp_path, monkeypatch):
    cifar(tmp_path, monkeypatch, datasets.CIFAR10, 10)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match="corrupted"):
        CIFAR10DataModule(str(tmp_path)).setup()
    assert not (tmp_path / "exploded").exists()


def test_gtsrb_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size must be positive, got 0"):
        GTSRBDataModule(image_size=0)


@pytest.mark.skipif(
    "MEADEF_DATA_ROOT" not in os.environ, reason="set MEADEF_DATA_ROOT to a folder with FashionMNIST/raw to run"
)
def test_real_fashion_mnist_has_the_published_statistics():
    data = FashionMNISTDataModule(os.environ["MEADEF_DATA_ROOT"], download=False, validation_size=0)
    assert {split: len(data.dataset(split)) for split in SPLITS if split != "validation"} == {
        "victim": 32_000,
        "attacker": 24_000,
        "verification": 4000,
        "test": 10_000,
    }
    x = torch.cat([data.tensors(split)[0] for split in ("victim", "attacker", "verification")])
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.bincount(data.dataset("victim").targets).tolist() == pytest.approx([3200] * 10, abs=2)
