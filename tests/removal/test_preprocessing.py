"""Models behind a transform: ranges, saved strengths, calibration by brute force, and triggers that do or do not pass."""

import copy
import io

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import AccuracyBudget, Removal, accuracy
from meadef_lightning.removal.preprocessing import InputPreprocessing, Preprocessed
from meadef_lightning.removal.transforms import (
    JPEG,
    BitDepth,
    GaussianNoise,
    InputTransform,
    Smoothing,
    add_gaussian_noise,
)

MEAN, STD = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
LOW, HIGH = -MEAN / STD, (1 - MEAN) / STD


class Negative(InputTransform):
    """Easy to compute by hand."""

    def forward(self, pixels):
        return self.strength * (1 - pixels)


class Echo(nn.Module):
    """Answers its input."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x


class Matched(nn.Module):
    """Class 1 where a pattern in [0, 1] is found around grey, else class 0."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = nn.Parameter(pattern - pattern.mean())

    def forward(self, x):
        found = (x * self.pattern).sum((1, 2, 3)) / self.pattern.square().sum()
        return torch.stack([torch.full_like(found, 0.5), found], dim=1)


def pixel_thief(x=None):
    """Inputs that are pixels."""
    x = torch.full((4, 1, 16, 16), 0.5) if x is None else x
    y = torch.zeros(len(x), dtype=torch.int64)
    return ThiefData(x, y, x, y, 2, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def rgb(seed=0):
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ridge(thief):
    """A linear classifier in closed form."""
    x, y = thief.x.flatten(1).double(), nn.functional.one_hot(thief.y, 10).double()
    weight = torch.linalg.solve(x.T @ x + 30 * torch.eye(x.shape[1]), x.T @ y)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x.shape[1], 10, bias=False))
    model[1].weight.data.copy_(weight.T)
    return model


@pytest.fixture(scope="module")
def thief():
    data = DigitsDataModule()
    data.prepare_data()
    data.setup()
    return ThiefData.of(data)


def test_the_transform_sees_pixels_and_the_model_its_own_space():
    pixels = rgb()
    out = Preprocessed(Echo(), Negative(0.5), LOW, HIGH)((pixels - MEAN) / STD)
    torch.testing.assert_close(out, (0.5 * (1 - pixels) - MEAN) / STD)
    beyond = Preprocessed(Echo(), Negative(1.0))(torch.tensor([-3.0, 0.25, 7.0]).reshape(1, 1, 1, 3))
    assert beyond.flatten().tolist() == [1.0, 0.75, 0.0]


def test_range_comes_from_the_thiefs_data(thief):
    torch.testing.assert_close(thief.low, torch.full((1, 1, 1), -0.3053 / 0.3760))
    seen = []
    InputPreprocessing(Negative, [1.0]).scrub(Echo(), thief, lambda _, wrapped: seen.append(wrapped) or True)
    torch.testing.assert_close(seen[0](thief.low.expand(1, 1, 4, 4)), thief.high.expand(1, 1, 4, 4))


def test_noise_is_calibrated_to_the_budget(thief):
    """The largest deviation up to which none costs more than the budget, found one by one."""
    model, sigmas = ridge(thief), [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7]
    mean, std = 0.3053, 0.3760
    budget = AccuracyBudget(model, thief, 0.035)
    InputPreprocessing(GaussianNoise, sigmas).scrub(model, thief, budget, seed=2)
    largest = 0.0
    for sigma in sigmas:
        noisy = (add_gaussian_noise(thief.validation_x * std + mean, sigma, seed=2) - mean) / std
        if accuracy(model, noisy, thief.validation_y) < accuracy(model, thief.validation_x, thief.validation_y) - 0.035:
            break
        largest = sigma
    assert sigmas[0] < largest < sigmas[-1]  # otherwise nothing was calibrated
    assert budget.strength == largest
    assert budget.best.transform.strength == largest
    assert accuracy(budget.best, thief.validation_x, thief.validation_y) >= budget.start - 0.035


def test_saved_weights_restore_transform_seed_and_range():
    model, removal, x = Echo(), InputPreprocessing(GaussianNoise, [0.1, 0.2]), (rgb() - MEAN) / STD
    data = ThiefData(x, torch.zeros(4), x, torch.zeros(4), 2, LOW, HIGH)
    with torch.no_grad():
        model.scale.fill_(3.0)
    seen = {}
    removal.scrub(
        model, data, lambda strength, wrapped: seen.update({strength: copy.deepcopy(wrapped)}) or True, seed=11
    )
    owner = nn.ModuleDict({"network": seen[0.2]})
    file = io.BytesIO()
    torch.save({name: value.cpu() for name, value in owner.state_dict().items()}, file)  # every entry is a tensor
    file.seek(0)
    loaded = nn.ModuleDict({"network": removal.prepare(Echo())})
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded["network"].transform.strength, loaded["network"].transform.seed) == (0.2, 11)
    assert torch.equal(loaded["network"](x), seen[0.2](x))
    assert not torch.equal(seen[0.1](x), seen[0.2](x))
    untouched = Echo()
    assert removal.prepare(untouched).model is untouched


def test_the_path_ends_when_told_and_leaves_the_model_alone(thief):
    model, seen, state = ridge(thief).train(), [], torch.get_rng_state()

    def observe(strength, wrapped):
        assert not any(part.training for part in wrapped.modules())
        seen.append(strength)
        with torch.no_grad():
            wrapped.model[1].weight.zero_()  # a copy's
        return strength < 2

    before = copy.deepcopy(model.state_dict())
    InputPreprocessing(Smoothing, [1, 2, 3]).scrub(model, thief, observe)
    assert seen == [1, 2]
    assert model.training
    assert torch.equal(model[1].weight, before["1.weight"])
    assert torch.equal(state, torch.get_rng_state())


def test_fine_triggers_are_removed_and_coarse_ones_pass():
    dots = torch.arange(16).remainder(4) == 1
    fine = (dots[:, None] & dots).float().expand(1, 16, 16)
    coarse = (torch.arange(16)[:, None] < 8).float().expand(1, 16, 16).contiguous()
    # every transform, and the contrast of the pattern around grey (rounding and JPEG remove what is faint, not what is fine)
    cases = [(Smoothing, 1, 1.0), (JPEG, 95, 0.15), (lambda radius: Smoothing(radius, "box"), 1, 1.0)]
    for transform, strength, contrast in cases:
        for pattern, passes in ((fine, False), (coarse, True)):
            triggers = (0.5 + contrast * (pattern - 0.5)).repeat(3, 1, 1, 1)
            model = Matched(contrast * pattern)
            assert model(triggers).argmax(1).tolist() == [1, 1, 1]
            seen = []
            InputPreprocessing(transform, [strength]).scrub(
                model, pixel_thief(), lambda _, wrapped, s=seen: s.append(wrapped) or True
            )
            assert seen[0](triggers).argmax(1).tolist() == [int(passes)] * 3


def test_faint_triggers_fall_between_the_levels_that_are_left():
    seen = {}
    x = torch.full((1, 1, 4, 4), 0.25)
    x[..., :2] += 0.02
    removal = InputPreprocessing(BitDepth, [1, 5])
    removal.scrub(Echo(), pixel_thief(), lambda strength, wrapped: seen.update({strength: wrapped(x)}) or True)
    assert len(seen[1].unique()) == 2
    assert len(seen[5].unique()) == 1
    assert removal.unit == "bits dropped of 8"


def test_yaml_gives_the_class_and_its_other_arguments():
    parser = ArgumentParser()
    parser.add_argument("--method", type=Removal)
    settings = {
        "class_path": "meadef_lightning.removal.preprocessing.InputPreprocessing",
        "init_args": {
            "transform": {"class_path": "meadef_lightning.removal.transforms.Smoothing", "init_args": {"kind": "box"}},
            "strengths": [1, 2],
        },
    }
    method = parser.instantiate(parser.parse_object({"method": settings})).method
    made = method.transform(2)
    assert (type(made), made.kind, made.strength) == (Smoothing, "box", 2.0)
    assert method.unit == "radius of the smoothing window in pixels"


def test_bad_input():
    with pytest.raises(ValueError, match="each larger than the one before"):
        InputPreprocessing(GaussianNoise, [0.2, 0.1])
    with pytest.raises(ValueError, match="loss=100"):
        InputPreprocessing(JPEG, [50, 100])
