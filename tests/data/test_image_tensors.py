import hashlib

import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import functional

from meadef_lightning.data.images import TensorImages, channel_statistics, collate_batch, normalise

MEAN, STD = (0.3, 0.5, 0.7), (0.2, 0.25, 0.4)


@pytest.fixture
def images():
    return torch.randint(0, 256, (12, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.arange(12) % 4


def test_normalise_agrees_with_torchvision(images):
    expected = functional.normalize(functional.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    torch.testing.assert_close(normalise(images, MEAN, STD), expected)


def test_statistics_agree_with_torch_and_normalise_to_zero_and_one(images):
    mean, std = channel_statistics(images.split(5))
    values = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean), values.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(std), values.std((0, 2, 3), correction=0).float())
    x = normalise(images, mean, std)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3))


def test_statistics_refuse_what_cannot_be_scaled(images):
    with pytest.raises(ValueError, match="no images"):
        channel_statistics([])
    images[:, 1] = 7
    with pytest.raises(ValueError, match=r"Channel\(s\) \[1\] are constant"):
        channel_statistics([images])


def test_a_batch_equals_its_samples(images, labels):
    data = TensorImages(images, labels, MEAN, STD)
    x, y = data.__getitems__([3, 0, 11])
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    for position, (one, label) in zip([3, 0, 11], zip(x, y, strict=True), strict=True):
        torch.testing.assert_close(data[position][0], one, rtol=0, atol=0)
        assert data[position][1] == label == labels[position]


def test_loader_gives_what_a_loader_of_single_samples_gives(images, labels):
    data = TensorImages(images, labels, MEAN, STD)
    whole = DataLoader(data, batch_size=5, collate_fn=collate_batch)
    plain = DataLoader([data[i] for i in range(12)], batch_size=5, collate_fn=collate_batch)
    for (x, y), (x2, y2) in zip(whole, plain, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_views_and_subsets_pick_rows_without_copying(images, labels):
    view = TensorImages(images, labels).view(torch.tensor([7, 2, 9]), MEAN, STD)
    assert view.images is images
    assert view.targets.tolist() == [3, 2, 1]
    batches = list(DataLoader(Subset(view, [2, 0]), batch_size=2, collate_fn=collate_batch))
    assert torch.equal(batches[0][0], normalise(images[[9, 7]], MEAN, STD))
    with pytest.raises(IndexError):
        view[3]


def test_without_statistics_images_are_in_the_unit_interval(images, labels):
    x, _ = TensorImages(images, labels).__getitems__(range(12))
    torch.testing.assert_close(x, images.float() / 255)


def test_fingerprint_covers_shape_pixels_and_labels(images, labels):
    def fingerprint(x, y):
        return TensorImages(x, y).fingerprint()

    raw = repr((12, 3, 5, 4)).encode() + bytes(images.flatten().tolist()) + labels.numpy().tobytes()
    assert fingerprint(images, labels) == hashlib.sha256(raw).hexdigest()
    assert fingerprint(images.transpose(2, 3), labels) != fingerprint(images, labels)
    assert fingerprint(images, labels.flip(0)) != fingerprint(images, labels)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), r"images must be uint8 \(N, C, H, W\), got torch.float32"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"got torch.uint8 \(2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), r"labels must be int64 \(2,\)"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), r"labels must be int64 \(2,\).*got torch.float32"),
    ],
)
def test_wrong_tensors_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        TensorImages(x, y)
