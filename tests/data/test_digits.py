import pytest
import torch
from sklearn.datasets import load_digits

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.digits import upsample_digits

SIZES = {"victim": 700, "validation": 97, "attacker": 500, "verification": 200, "test": 300}


@pytest.fixture(scope="module")
def data():
    data = DigitsDataModule()
    data.prepare_data()
    data.setup("fit")
    return data


def test_default_splits_use_every_digit_once(data):
    assert {split: len(data.dataset(split)) for split in SIZES} == SIZES
    rows = torch.cat([data.dataset(split).indices for split in SIZES])
    assert sorted(rows.tolist()) == list(range(1797))


def test_splits_are_stratified(data):
    overall = torch.bincount(torch.from_numpy(load_digits().target)) / 1797
    for split, size in SIZES.items():
        counts = torch.bincount(data.dataset(split).targets, minlength=10)
        assert (counts - overall * size).abs().max() <= 1.5


def test_shape_names_and_statistics(data):
    assert data.image_shape == (1, 16, 16)
    assert data.class_names == tuple("0123456789")
    native = torch.from_numpy(load_digits().images) / 16
    assert data.mean == pytest.approx((native.mean().item(),), abs=5e-5)
    assert data.std == pytest.approx((native.std(correction=0).item(),), abs=5e-5)
    x, y = data.tensors("victim")
    assert x.shape == (700, 1, 16, 16)
    assert y.shape == (700,)


def test_pixels_belong_to_their_labels():
    data = DigitsDataModule(image_size=8, mean=(0.0,), std=(1.0,))
    digits = load_digits()
    for split in SIZES:
        x, y = data.tensors(split)
        rows = data.dataset(split).indices
        assert torch.equal(y, torch.from_numpy(digits.target)[rows])
        torch.testing.assert_close(x[:, 0], torch.from_numpy(digits.images).float()[rows] / 16, atol=0.51 / 255, rtol=0)


def test_upsampling_interpolates_between_pixels():
    image = torch.zeros(1, 8, 8)
    image[0, 3, 4] = 16
    large = upsample_digits(image, 16)
    # Bilinear, pixel centres aligned: weights 3/4 and 1/4 in each direction.
    expected = torch.tensor([0.25, 0.75, 0.75, 0.25])
    patch = (expected[:, None] * expected[None, :] * 255).round().to(torch.uint8)
    assert torch.equal(large[0, 0, 5:9, 7:11], patch)
    assert large.sum() == patch.sum()


def test_images_smaller_than_the_digits_are_refused():
    with pytest.raises(ValueError, match="at least 8, the size of the digits themselves, got 4"):
        DigitsDataModule(image_size=4)


def test_sizes_must_fit():
    with pytest.raises(ValueError, match="ask for 2097 samples"):
        DigitsDataModule(victim_size=1000).setup()
