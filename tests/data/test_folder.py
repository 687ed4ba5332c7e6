import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from meadef_lightning.data import ImageFolderDataModule
from meadef_lightning.data.files import read_image

SPLITS = ("victim", "validation", "attacker", "verification", "test")
COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "owl": (30, 30, 200)}


def picture(path, colour, size=(12, 12), seed=0):
    """A colour with a little noise, so that no two files are alike."""
    noise = np.random.default_rng(seed).integers(-20, 21, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    seed = 0
    for part, n in (("train", 20), ("test", 4)):
        for name, colour in COLOURS.items():
            for i in range(n):
                seed += 1
                picture(tmp_path / part / name / f"{i}.png", colour, seed=seed)
    return tmp_path


def brightest(data, split):
    """Class by colour: the brightest channel, independent of the labels."""
    x, _ = data.tensors(split)
    raw = x * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)
    return raw.mean((2, 3)).argmax(1)


def test_reads_a_central_square_as_torchvision_does(tmp_path):
    picture(tmp_path / "wide.png", (90, 120, 60), size=(40, 30))
    whole = functional.pil_to_tensor(Image.open(tmp_path / "wide.png"))
    expected = functional.resize(functional.center_crop(whole, [30, 30]), [16, 16], antialias=True)
    assert (read_image(tmp_path / "wide.png", 16).int() - expected.int()).abs().max() <= 1


def test_box_reaching_over_the_border_is_black_there(tmp_path):
    Image.new("RGB", (10, 10), (255, 255, 255)).save(tmp_path / "white.png")
    image = read_image(tmp_path / "white.png", 8, box=(-4, 6, 8, 8))
    expected = torch.zeros(3, 8, 8, dtype=torch.uint8)
    expected[:, :4, 4:] = 255
    assert torch.equal(image, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_every_kind_of_picture_becomes_colour(tmp_path, mode):
    Image.new("RGB", (9, 9), (255, 0, 0)).convert(mode).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 8).shape == (3, 8, 8)


def test_splits_hold_every_picture_once_with_its_label(root):
    data = ImageFolderDataModule(str(root), image_size=12)
    assert data.class_names == ("cat", "dog", "owl")
    assert data.image_shape == (3, 12, 12)
    assert sum(len(data.dataset(split)) for split in SPLITS) == 72
    for split in SPLITS:
        assert torch.equal(brightest(data, split), data.tensors(split)[1])
    rows = torch.cat([data.dataset(split).indices for split in SPLITS[:-1]])
    assert sorted(rows.tolist()) == list(range(60))


def test_in_memory_and_lazy_are_the_same(root):
    lazy = ImageFolderDataModule(str(root), image_size=8, num_workers=2)
    memory = ImageFolderDataModule(str(root), image_size=8, in_memory=True)
    assert lazy.mean == memory.mean
    assert lazy.std == memory.std
    for split in SPLITS:
        for a, b in zip(lazy.tensors(split), memory.tensors(split), strict=True):
            assert torch.equal(a, b)


def test_statistics_are_measured_on_the_victim_split(root):
    data = ImageFolderDataModule(str(root), image_size=12)
    x, _ = data.tensors("victim")
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    given = ImageFolderDataModule(str(root), image_size=12, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert given.tensors("victim")[0].abs().max() <= 1


def test_without_test_folder_a_test_split_is_drawn(root):
    (root / "test").rename(root / "elsewhere")
    data = ImageFolderDataModule(str(root), test_size=15)
    assert len(data.dataset("test")) == 15
    summary = data.split_summary()
    assert summary["disjoint"] is True
    assert sum(split["size"] for split in summary["splits"].values()) == 60


def test_test_part_may_lack_a_class(root):
    for path in (root / "test" / "cat").iterdir():
        path.unlink()
    (root / "test" / "cat").rmdir()
    data = ImageFolderDataModule(str(root))
    assert torch.equal(brightest(data, "test"), data.tensors("test")[1])
    assert set(data.tensors("test")[1].tolist()) == {1, 2}


def test_fingerprint_sees_another_file(root):
    before = ImageFolderDataModule(str(root)).split_summary()["sources"]
    picture(root / "test" / "owl" / "new.png", (0, 0, 200))
    after = ImageFolderDataModule(str(root)).split_summary()["sources"]
    assert before["train"] == after["train"]
    assert before["test"] != after["test"]


def test_missing_folder_explains_the_expected_form(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No pictures in .*train.*Expected root/train/<class>/<picture>"):
        ImageFolderDataModule(str(tmp_path)).setup()


def test_empty_class_folder_is_named(root):
    (root / "train" / "zebra").mkdir()
    with pytest.raises(FileNotFoundError, match="zebra"):
        ImageFolderDataModule(str(root)).setup()


def test_class_only_in_the_test_part_is_named(root):
    picture(root / "test" / "zebra" / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"has class\(es\) \['zebra'\]"):
        ImageFolderDataModule(str(root)).setup()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n truncated"])
def test_broken_picture_is_named(root, content):
    (root / "train" / "cat" / "7.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"7\.png cannot be read as an image.*Replace or remove"):
        ImageFolderDataModule(str(root), in_memory=True).setup()


def test_size_must_be_positive(root):
    with pytest.raises(ValueError, match="image_size must be positive, got -3"):
        ImageFolderDataModule(str(root), image_size=-3)
