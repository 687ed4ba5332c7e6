"""Pools of images: other data sets in the victim's input space, checked in pixels, and noise."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.extraction import AttackerSplit, DistillationDataModule, Noise, OtherData, Photographs, Pool
from meadef_lightning.extraction.pools import pixel_range
from meadef_lightning.oracle import Oracle, Totals

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "digits" / "supervised.yaml"


class Pixels(SplitDataModule):
    """Random bytes of any shape, 30 of them for testing and 40 for the attacker, normalised by any numbers."""

    class_names = ("a", "b")

    def __init__(self, shape, mean, std, seed=0):
        super().__init__(mean=mean, std=std, victim_size=20, attacker_size=40, verification_size=20, validation_size=20)
        self.shape, self.pixel_seed = shape, seed

    @property
    def image_shape(self):
        return self.shape

    def load(self):
        generator = torch.Generator().manual_seed(self.pixel_seed)
        images = torch.randint(256, (130, *self.shape), generator=generator, dtype=torch.uint8)
        labels = torch.arange(130) % 2
        return TensorImages(images[:100], labels[:100]), TensorImages(images[100:], labels[100:])


GREY = {"mean": (0.3,), "std": (0.2,)}
COLOUR = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.4)}


def pixels(x, mean, std):
    """What a normalised image is in [0, 1]."""
    return torch.stack([x[:, c] * s + m for c, (m, s) in enumerate(zip(mean, std, strict=True))], 1)


def test_attacker_split_is_the_datas():
    data = Pixels((1, 4, 4), **GREY)
    for ours, expected in zip(AttackerSplit().images(data), data.tensors("attacker"), strict=True):
        assert torch.equal(ours, expected)
    assert AttackerSplit().name == "AttackerSplit"


def test_other_normalisation():
    victim, other = Pixels((3, 4, 4), (0.2, 0.2, 0.6), (0.5, 0.3, 0.1)), Pixels((3, 4, 4), **COLOUR, seed=1)
    x, y = OtherData(other).images(victim)
    images, labels = other.tensors("test")
    assert torch.equal(y, labels)
    assert x.dtype == torch.float32
    torch.testing.assert_close(pixels(x, victim.mean, victim.std), pixels(images, **COLOUR), atol=1e-5, rtol=0)
    assert not torch.allclose(x, images)


def test_same_space_changes_nothing():
    data = Pixels((1, 4, 4), **GREY)
    torch.testing.assert_close(OtherData(Pixels((1, 4, 4), **GREY)).images(data)[0], data.tensors("test")[0])


def test_colour_becomes_grey_by_luminance():
    victim, other = Pixels((1, 4, 4), **GREY), Pixels((3, 4, 4), **COLOUR, seed=1)
    x, _ = OtherData(other).images(victim)
    red, green, blue = pixels(other.tensors("test")[0], **COLOUR).unbind(1)
    assert x.shape == (30, 1, 4, 4)
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(pixels(x, **GREY)[:, 0], expected, atol=2e-4, rtol=0)


def test_grey_becomes_colour_with_equal_channels():
    victim, other = Pixels((3, 4, 4), **COLOUR), Pixels((1, 4, 4), **GREY, seed=1)
    x, _ = OtherData(other).images(victim)
    shown, expected = pixels(x, **COLOUR), pixels(other.tensors("test")[0], **GREY)
    for channel in shown.unbind(1):
        torch.testing.assert_close(channel, expected[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (3, 3), (6, 5)])
def test_resizing_is_bilinear_with_antialiasing_in_pixels(size):
    victim, other = Pixels((1, *size), **GREY), Pixels((3, 6, 6), **COLOUR, seed=1)
    x, _ = OtherData(other).images(victim)
    weights = torch.tensor([0.2989, 0.587, 0.114])[None, :, None, None]
    grey = (pixels(other.tensors("test")[0], **COLOUR) * weights).sum(1, keepdim=True)
    expected = F.interpolate(grey, size=size, mode="bilinear", align_corners=False, antialias=True)
    assert x.shape == (30, 1, *size)
    torch.testing.assert_close(pixels(x, **GREY), expected, atol=1e-5, rtol=0)
    black, white = pixel_range(victim)
    assert ((x >= black - 1e-5) & (x <= white + 1e-5)).all()


def test_size_and_split_of_other_data():
    victim, other = Pixels((1, 4, 4), **GREY), Pixels((1, 4, 4), **GREY, seed=1)
    pool = OtherData(other, split="attacker", size=25)
    x, y = pool.images(victim)
    images, labels = other.tensors("attacker")
    torch.testing.assert_close(x, images[:25])
    assert torch.equal(y, labels[:25])
    assert len(OtherData(other, size=1000).images(victim)[0]) == 30
    assert (pool.name, OtherData(DigitsDataModule()).name) == ("Pixels", "Digits")


def test_pixel_range_by_hand():
    black, white = pixel_range(Pixels((3, 4, 4), **COLOUR))
    assert black.shape == white.shape == (3, 1, 1)
    torch.testing.assert_close(black.flatten(), torch.tensor([-5.0, -2.0, -0.75]))
    torch.testing.assert_close(white.flatten(), torch.tensor([5.0, 3.0, 1.75]))


def test_noise_is_uniform_over_the_range_of_pixels():
    victim, state = Pixels((3, 8, 8), **COLOUR), torch.random.get_rng_state()
    x, y = Noise(500, seed=3).images(victim)
    assert y is None
    assert x.shape == (500, 3, 8, 8)
    shown = pixels(x, **COLOUR)
    assert -1e-6 < shown.min() < 0.001
    assert 0.999 < shown.max() < 1 + 1e-6
    counts = shown.clamp(0, 1).histc(10, 0, 1)
    assert (counts - 9600).abs().max() < 5 * 9600**0.5
    black, white = pixel_range(victim)
    assert ((x >= black - 1e-5) & (x <= white + 1e-5)).all()
    assert torch.equal(x, Noise(500, seed=3).images(victim)[0])
    assert not torch.equal(x, Noise(500, seed=4).images(victim)[0])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("make", [lambda: Noise(0), lambda: OtherData(DigitsDataModule(), size=0)])
def test_size_below_one(make):
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        make()


def test_split_that_does_not_exist_or_is_empty():
    victim = Pixels((1, 4, 4), **GREY)
    with pytest.raises(ValueError, match="There is no split 'all'"):
        OtherData(victim, split="all").images(victim)
    with pytest.raises(ValueError, match="attacker split is empty"):
        OtherData(DigitsDataModule(attacker_size=0), split="attacker").images(victim)


def test_pool_larger_than_needed_and_too_small():
    victim, pool = Pixels((1, 4, 4), **GREY), OtherData(Pixels((3, 5, 5), **COLOUR), size=20)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    attack = DistillationDataModule(Oracle(network), victim, queries=15, pool=pool)
    attack.setup("fit")
    assert attack.oracle.ledger.totals() == Totals(15, 15)
    assert attack.query_summary()["pool"] == "Pixels"
    with pytest.raises(ValueError, match="needs 21 images, 2 of them for validation, and the pool has 20"):
        DistillationDataModule(Oracle(network), victim, queries=21, pool=pool).setup("fit")


SNIPPET = """
extraction:
- name: other
  queries:
    class_path: meadef_lightning.extraction.DistillationDataModule
    init_args:
      pool:
        class_path: meadef_lightning.extraction.pools.OtherData
        init_args:
          other: {class_path: meadef_lightning.data.DigitsDataModule, init_args: {image_size: 8}}
          split: attacker
          size: 30
  student: &student
    class_path: meadef_lightning.extraction.Student
    init_args: {network: {class_path: meadef_lightning.victims.networks.MLP}}
- name: knockoff
  queries:
    class_path: meadef_lightning.extraction.knockoff.AdaptiveKnockoffDataModule
    init_args: {queries: 20, rewards: [certainty], rounds: 2}
  student: *student
- name: composite
  queries:
    class_path: meadef_lightning.extraction.composite.CompositeDataModule
    init_args:
      blends: 64
      ratio: grid
      pool: {class_path: meadef_lightning.extraction.pools.Noise, init_args: {size: 40}}
  student: *student
"""


def test_pools_and_attacks_can_be_said_in_an_experiment(tmp_path):
    (tmp_path / "attacks.yaml").write_text(SNIPPET)
    spec = load_experiment([EXPERIMENT, tmp_path / "attacks.yaml"]).build()
    network, paid = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)), []
    for attack in spec.extraction:
        queries = attack.queries(Oracle(network), spec.data)
        queries.setup("fit")
        paid.append(queries.oracle.ledger.distinct)
    assert paid == [30, 20, 4]  # composites are asked later
    assert isinstance(queries.pool, Noise)
    assert queries.ratio == "grid"


def test_photographs_are_crops_of_real_photographs():
    data = load_experiment([EXPERIMENT]).build().data
    x, y = Photographs(40).images(data)
    low, high = pixel_range(data)
    assert (x.shape, y) == ((40, *data.image_shape), None)
    assert (low <= x + 1e-5).all()
    assert (x - 1e-5 <= high).all()
    assert torch.equal(x, Photographs(40).images(data)[0])
    assert not torch.equal(x, Photographs(40, seed=1).images(data)[0])
    # neighbouring pixels of a photograph are alike, those of noise are not
    noise = Noise(40).images(data)[0]
    steps = [float(images.diff(dim=-1).abs().mean() / images.std()) for images in (x, noise)]
    assert steps[0] < 0.6 * steps[1]
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        Photographs(0)


class Foreign(Pool):
    """Images of another domain, whose classes mean nothing to the victim."""

    def images(self, data):
        return data.tensors("attacker")


@pytest.mark.parametrize("kind", ["distillation.Distillation", "knockoff.Knockoff", "composite.Composite"])
@pytest.mark.parametrize("pool", [Foreign(), AttackerSplit()])
def test_classes_of_another_domain_count_as_no_truth(kind, pool):
    module, name = kind.split(".")
    attack = getattr(importlib.import_module(f"meadef_lightning.extraction.{module}"), f"{name}DataModule")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    queries = attack(Oracle(network), Pixels((1, 4, 4), (0.5,), (0.5,)), pool=pool)
    queries.setup("fit")
    assert len(next(iter(queries.val_dataloader()))) == (2 if isinstance(pool, Foreign) else 3)
