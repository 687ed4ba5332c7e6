"""Input transforms against SciPy, Pillow, torchvision and counting by hand."""

import io

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy import ndimage
from scipy.stats import kstest

from meadef_lightning.removal.transforms import (
    JPEG,
    WEBP,
    BitDepth,
    GaussianNoise,
    Smoothing,
    add_gaussian_noise,
    jpeg,
    reduce_bits,
    smooth,
    webp,
)


def pixels(count=3, channels=3, size=16, seed=0):
    """Smooth random images with some grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    fine = torch.rand(count, channels, size, size, generator=generator)
    return (0.8 * torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") + 0.2 * fine).clamp(0, 1)


def octets(image):
    return (image * 255).round().to(torch.uint8)


def through_pillow(image, form, quality):
    """One image's file, as anybody would write it."""
    array = octets(image).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0]).save(file, form, quality=quality)
    return file.getvalue()


TRANSFORMS = [
    GaussianNoise(0.3), JPEG(70), WEBP(70), Smoothing(1), Smoothing(2, "box"), Smoothing(1, "gaussian"), BitDepth(6),
]  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_range_and_independence_of_the_batch(transform, channels, dtype):
    images, state = pixels(5, channels).to(dtype), torch.get_rng_state()
    before = images.clone()
    out = transform(images)
    assert torch.equal(images, before)
    assert (out.shape, out.dtype) == (images.shape, dtype)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert not torch.equal(out, images)
    order = [4, 2, 0]
    torch.testing.assert_close(transform(images[order]), out[order], rtol=0, atol=1e-6)
    assert torch.equal(state, torch.get_rng_state())


def test_strength_zero_leaves_images():
    images = octets(pixels()) / 255.0
    for transform in (GaussianNoise(0), Smoothing(0), Smoothing(0, "box"), Smoothing(0, "gaussian"), BitDepth(0)):
        torch.testing.assert_close(transform(images), images)
    for transform in (JPEG(0), WEBP(0)):  # colours are subsampled even at quality 100
        grey = images.mean(1, keepdim=True)
        torch.testing.assert_close(transform(grey), grey, rtol=0, atol=0.03)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("codec", "form"), [(jpeg, "JPEG"), (webp, "WEBP")])
def test_codecs_are_the_round_trip_by_hand(codec, form, channels):
    images = pixels(channels=channels)
    for image, out in zip(images, codec(images, 40), strict=True):
        by_hand = Image.open(io.BytesIO(through_pillow(image, form, 40))).convert("L" if channels == 1 else "RGB")
        by_hand = np.asarray(by_hand).reshape(16, 16, channels)
        assert np.array_equal(octets(out).permute(1, 2, 0).numpy(), by_hand)
        assert (octets(out) != octets(image)).any()


@pytest.mark.skipif(not hasattr(torchvision.io, "decode_jpeg"), reason="torchvision without codecs")
@pytest.mark.filterwarnings("ignore:The image decoding and encoding")
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_torchvisions(channels):
    images = pixels(channels=channels)
    for image, out in zip(images, jpeg(images, 40), strict=True):
        theirs = torchvision.io.decode_jpeg(torchvision.io.encode_jpeg(octets(image), quality=40))
        assert int((theirs.int() - octets(out).int()).abs().max()) <= 3  # two builds of the library


def test_lower_quality_costs_more():
    images = pixels(size=32)
    for codec in (jpeg, webp):
        errors = [float((codec(images, quality) - images).square().mean()) for quality in (95, 50, 5)]
        assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_smoothing_is_scipys(radius):
    images, size = pixels(2, 3), 2 * radius + 1
    filters = {
        "box": lambda image: ndimage.uniform_filter(image, size, mode="nearest"),
        "median": lambda image: ndimage.median_filter(image, size, mode="nearest"),
        "gaussian": lambda image: ndimage.gaussian_filter(image, 0.3 * radius + 0.5, mode="mirror", radius=radius),
    }
    for kind, reference in filters.items():
        expected = np.stack([[reference(channel) for channel in image] for image in images.double().numpy()])
        np.testing.assert_allclose(smooth(images, radius, kind).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_fewer_bits_are_the_nearest_levels(bits):
    images = pixels(1, 1)
    levels = np.arange(2**bits) / (2**bits - 1)
    nearest = levels[np.abs(images.numpy()[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(reduce_bits(images, bits).numpy(), nearest, atol=1e-6)
    torch.testing.assert_close(BitDepth(8 - bits)(images), reduce_bits(images, bits))


def test_noise_is_gaussian_and_clipped():
    images = 0.5 + (torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5) / 20
    noise = (add_gaussian_noise(images, 0.05) - images).flatten()
    assert kstest(noise.numpy()[::7] / 0.05, "norm").pvalue > 0.01
    assert kstest(noise.numpy()[::7] / 0.07, "norm").pvalue < 1e-3
    clipped = add_gaussian_noise(images, 3.0)
    assert (float(clipped.min()), float(clipped.max())) == (0.0, 1.0)


def test_noise_follows_from_image_and_seed_alone():
    images = pixels(60, 1)
    noise = add_gaussian_noise(images, 0.01) - images
    torch.testing.assert_close(add_gaussian_noise(images[7:8], 0.01)[0] - images[7], noise[7])
    assert torch.equal(add_gaussian_noise(images, 0.01), add_gaussian_noise(images, 0.01))
    assert not torch.equal(add_gaussian_noise(images, 0.01), add_gaussian_noise(images, 0.01, seed=1))
    same = torch.corrcoef(noise.flatten(1))[~torch.eye(60, dtype=torch.bool)] > 0.9
    assert float(same.float().mean()) < 0.05  # 1 in 128 pairs share a pattern; a universal one would give 1


def test_bad_input():
    for bad in (
        lambda: GaussianNoise(-0.1), lambda: JPEG(100), lambda: JPEG(1.5), lambda: WEBP(-1), lambda: Smoothing(-1),
        lambda: Smoothing(1, "mean"), lambda: BitDepth(8), lambda: BitDepth(0.5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            bad()
    with pytest.raises(ValueError, match="radius=16"):
        smooth(pixels(), 16)
    with pytest.raises(ValueError, match='kind="mean"'):
        smooth(pixels(), 1, "mean")
    for codec in (jpeg, webp):
        with pytest.raises(ValueError, match="1 or 3 channels"):
            codec(pixels(channels=2), 50)
