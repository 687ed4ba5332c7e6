"""Conversions into another model's input space, against torchvision and by hand."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from meadef_lightning.oracle.input_space import InputSpace, ToInputSpace

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PIXELS = torch.rand(3, 3, 12, 10, generator=torch.Generator().manual_seed(0))
X = tv.normalize(PIXELS, MEAN, STD)


def converted(x=X, mean=MEAN, std=STD, **declared):
    return ToInputSpace(InputSpace(**declared), mean, std)(x)


def test_nothing_declared_gives_pixels():
    torch.testing.assert_close(converted(), PIXELS)
    assert not InputSpace(size=(3, 3), channels="bgr").normalises
    assert InputSpace(scale=255).normalises


def test_everything_declared():
    declared = {"channels": "bgr", "size": (6, 8), "scale": 255, "mean": (104, 117, 124), "std": (2, 3, 4)}
    found = ToInputSpace(InputSpace(**declared, channels_last=True), MEAN, STD)(X)
    resized = tv.resize(PIXELS, [6, 8], antialias=True)
    expected = tv.normalize(resized.flip(1) * 255, [104, 117, 124], [2, 3, 4]).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_colours():
    torch.testing.assert_close(converted(channels="grey"), tv.rgb_to_grayscale(PIXELS), rtol=0, atol=1e-3)
    grey = PIXELS[:, :1]
    x = (grey - 0.1) / 0.5
    torch.testing.assert_close(converted(x, (0.1,), (0.5,), channels="rgb"), grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(converted(x, (0.1,), (0.5,), channels="grey"), grey)


def test_gradients_pass_and_the_state_tells_what_was_declared():
    x = X.clone().requires_grad_()
    converted(x, size=(6, 5)).sum().backward()
    assert bool((x.grad != 0).all())
    states = [
        ToInputSpace(InputSpace(size=size), MEAN, std).state_dict()
        for size, std in (((6, 5), STD), ((6, 5), STD), ((6, 6), STD), ((6, 5), (1.0, 1.0, 1.0)))
    ]
    same = [all(torch.equal(states[0][name], state[name]) for name in state) for state in states]
    assert same == [True, True, False, False]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"channels": "cmyk"}, "channels must be grey, rgb or bgr"),
        ({"size": (0, 3)}, "size must be a height and a width"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"mean": (float("nan"),)}, "mean and std finite"),
        ({"std": (1.0, 0.0)}, "std must be positive"),
        ({"mean": ()}, "need one value"),
    ],
)
def test_what_cannot_be(declared, message):
    with pytest.raises(ValueError, match=message):
        InputSpace(**declared)


def test_channels_that_do_not_fit():
    with pytest.raises(ValueError, match="2 channels cannot be made rgb"):
        converted(X[:, :2], MEAN[:2], STD[:2], channels="rgb")
    with pytest.raises(ValueError, match="mean has 2 values, but images have 3 channels"):
        ToInputSpace(InputSpace(mean=(0.0, 1.0)), MEAN, STD)(X)
