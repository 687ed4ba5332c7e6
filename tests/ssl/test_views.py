"""Random views: against torchvision's functional transforms where both do the same, and by what must hold for every image."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor, nn

from meadef_lightning.victims.views import RandomView, TwoViews, blur_images, colour_matrices, resample

STILL = {
    "scale": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "shift": 0.0,
    "rotation": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "blur": 0.0,
    "noise": 0.0,
}


def images(count: int = 4, channels: int = 3, height: int = 16, width: int = 12) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def boxes(**given: Tensor) -> dict[str, Tensor]:
    whole = {
        "size": torch.ones(4, 2),
        "centre": torch.zeros(4, 2),
        "angle": torch.zeros(4),
        "mirror": torch.zeros(4, dtype=torch.bool),
    }
    return {**whole, **given}


def test_a_box_is_cropped_and_resized_as_torchvision_does():
    x = images()
    # rows 4..12 of 16, columns 3..9 of 12: bilinear resizing looks no further than the box, except for its border
    got = resample(x, **boxes(size=torch.full((4, 2), 0.5)))
    expected = tv.resized_crop(x, 4, 3, 8, 6, [16, 12], antialias=False)
    torch.testing.assert_close(got[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-5, rtol=1e-5)


def test_each_image_has_its_own_box_mirror_and_angle():
    x = images(height=12)
    quarter = resample(
        x, **boxes(angle=torch.tensor([0, math.pi / 2, 0, 0]), mirror=torch.tensor([False] * 3 + [True]))
    )
    torch.testing.assert_close(quarter[0], x[0], atol=1e-5, rtol=1e-5)
    turned = [torch.rot90(x[1], k, (1, 2)) for k in (1, 3)]
    assert min(float((quarter[1] - other).abs().max()) for other in turned) < 1e-4
    torch.testing.assert_close(quarter[3], x[3].flip(-1), atol=1e-5, rtol=1e-5)


def test_rotation_keeps_the_shape_of_what_it_turns_in_images_that_are_not_square():
    """A centred disc stays itself at every angle only if rows and columns are turned in pixels, not in shares of the sides."""
    rows, columns = torch.meshgrid(torch.arange(24) - 11.5, torch.arange(12) - 5.5, indexing="ij")
    disc = (4.0 - (rows**2 + columns**2).sqrt()).clamp(0, 1).expand(4, 1, 24, 12)
    got = resample(disc, **boxes(angle=torch.tensor([0.3, 0.8, 1.2, math.pi / 2])))
    assert float((got - disc).abs().max()) < 0.25


def test_a_centre_moves_the_box():
    x = images()
    got = resample(x, **boxes(centre=torch.tensor([[0.25, 0.0]]).expand(4, 2)))  # two rows down, of 16
    torch.testing.assert_close(got[:, :, :-2], x[:, :, 2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, :, -1], x[:, :, -1], atol=1e-5, rtol=1e-5)  # the border goes on


def test_colour_matrices():
    still = colour_matrices(torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(still, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    grey = colour_matrices(torch.tensor([0.7]), torch.zeros(1))[0]
    x = images().clamp(0, 1)
    expected = tv.rgb_to_grayscale(x, num_output_channels=3)
    torch.testing.assert_close(torch.einsum("ij,bjhw->bihw", grey, x), expected, atol=5e-3, rtol=0)
    turned = colour_matrices(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(turned[0] @ turned[1], torch.eye(3), atol=1e-5, rtol=0)  # there and back
    torch.testing.assert_close(turned.sum(dim=2), torch.ones(2, 3), atol=5e-3, rtol=0)  # grey stays grey
    assert float((turned[0] - torch.eye(3)).abs().max()) > 0.5


def test_blur_is_a_gaussian_away_from_the_border_and_nothing_at_zero():
    x = images(height=20, width=20)
    got = blur_images(x, torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert torch.equal(got[0], x[0])
    for image, sigma in ((1, 0.5), (2, 1.0)):
        expected = tv.gaussian_blur(x[image], [9, 9], [sigma, sigma])
        torch.testing.assert_close(got[image][:, 5:-5, 5:-5], expected[:, 5:-5, 5:-5], atol=2e-3, rtol=0)
    torch.testing.assert_close(blur_images(torch.ones_like(x), torch.full((4,), 2.0)), torch.ones_like(x))


def test_without_any_change_a_view_is_the_image():
    x = images()
    torch.testing.assert_close(RandomView(**STILL)(x), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"scale": (0.3, 0.8)},
        {"shift": 0.2, "scale": (0.9, 1.0)},
        {"rotation": 20.0},
        {"flip": True},
        {"brightness": 0.5, "jitter": 1.0},
        {"contrast": 0.5, "jitter": 1.0},
        {"saturation": 0.5, "jitter": 1.0},
        {"hue": 0.3, "jitter": 1.0},
        {"grayscale": 0.5},
        {"blur": 1.0},
        {"noise": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_change_differs_from_image_to_image(change):
    x = images(1).expand(64, 3, 16, 12)
    torch.manual_seed(1)
    views = RandomView(**{**STILL, **change})(x)
    assert views.shape == x.shape
    assert views.isfinite().all()
    distinct = torch.unique(views.flatten(1).mul(1e3).round(), dim=0)
    assert len(distinct) >= 2  # a coin for mirror and greyscale, a number for all others
    if not {"flip", "grayscale"} & set(change):
        assert len(distinct) > 16


def test_brightness_and_contrast_leave_the_shape_of_the_image():
    x = images(8)
    torch.manual_seed(0)
    views = RandomView(**{**STILL, "brightness": 0.5, "contrast": 0.5, "jitter": 1.0})(x)
    for image, view in zip(x, views, strict=True):
        correlation = torch.corrcoef(torch.stack([image.flatten(), view.flatten()]))[0, 1]
        assert correlation == pytest.approx(1.0, abs=1e-4)
        assert 0.5 <= view.std() / image.std() <= 1.5
        assert (view.mean() - image.mean()).abs() <= 0.5


def test_two_views_differ_repeat_under_the_seed_and_carry_no_gradient():
    x = images(channels=1).requires_grad_()
    views = TwoViews()
    torch.manual_seed(3)
    first, second = views(x)
    assert not torch.equal(first, second)
    assert not first.requires_grad
    torch.manual_seed(3)
    again = views(x)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, views(x)[0])


def test_eval_switches_views_off():
    x = images(channels=1)
    views = TwoViews().eval()
    before = torch.get_rng_state()
    assert all(torch.equal(view, x) for view in views(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_stays():
    assert RandomView()(images(channels=1).bfloat16()).dtype == torch.bfloat16


def test_another_view_of_the_users():
    class Counted(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    first, second = TwoViews(Counted())(torch.zeros(2, 1, 8, 8))
    assert (float(first.mean()), float(second.mean())) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale=\(0.0, 1.0\) must be"),
        ({"scale": (0.8, 0.4)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"hue": 1.5}, r"hue=1.5 must lie in \[0, 1\]"),
        ({"blur": -1.0}, "blur=-1.0 must be a finite number of at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomView(**arguments)


def test_bad_images_are_named():
    with pytest.raises(ValueError, match="need images of 3 channels, got 1"):
        RandomView(hue=0.1)(images(channels=1))
    with pytest.raises(ValueError, match="floating-point images"):
        RandomView()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
