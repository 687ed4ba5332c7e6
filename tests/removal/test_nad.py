import math

import pytest
import torch
import torch.nn.functional as F
from thief_models import Keep, changed, patch_success, patched_model, test_accuracy, thief, weights
from torch import Tensor, nn

from meadef_lightning.removal import NAD
from meadef_lightning.removal.nad import (
    _Student,
    attention_distance,
    attention_map,
    outputs_of,
    stage_convolutions,
)
from meadef_lightning.victims.networks import DigitsCNN, NineLayerCNN


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_attention_map_closed_form(p):
    features = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    for image, row in zip(features.tolist(), attention_map(features, p).tolist(), strict=True):
        plain = [sum(abs(image[c][i][j]) ** p for c in range(3)) for i in range(2) for j in range(4)]
        length = math.sqrt(sum(value**2 for value in plain))
        assert row == pytest.approx([value / length for value in plain], rel=1e-5)


def test_attention_knows_no_scale_and_bears_zeros():
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention_map(7 * features), attention_map(features))
    assert attention_map(torch.zeros(1, 2, 3, 3)).tolist() == [[0.0] * 9]


def test_attention_distance_is_that_of_cosines():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 3, 4, 4, generator=generator), torch.randn(5, 6, 4, 4, generator=generator)
    cosine = F.cosine_similarity(student.square().sum(1).flatten(1), teacher.square().sum(1).flatten(1))
    torch.testing.assert_close(attention_distance(student, teacher), (2 - 2 * cosine).mean())


class Backwards(nn.Module):
    """Its convolutions are registered in another order than they run in, and one runs never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(2, 2, 3, padding=1)
        self.idle = nn.Conv2d(2, 2, 3)
        self.small = nn.Conv2d(2, 2, 3, stride=2, padding=1)
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.small(self.last(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (DigitsCNN(10, 1, width=4), ("features.0", "features.4", "features.8")),
        (NineLayerCNN(10, 1), ("features.2", "features.7", "features.12")),
        (Backwards(), ("last", "small")),
    ],
)
def test_the_last_convolution_of_every_resolution_is_found(model, names):
    model.train()
    before = weights(model)
    assert stage_convolutions(model, torch.zeros(2, 1, 16, 16)) == names
    assert model.training
    assert not changed(before, weights(model))  # running statistics too
    assert not any(part._forward_hooks for part in model.modules())


def test_a_step_minimises_cross_entropy_and_weighted_distances():
    student, teacher = (DigitsCNN(10, 1, width=4) for _ in range(2))
    student.eval(), teacher.eval()
    x, y = thief().x[:8], thief().y[:8]
    betas = {"features.0": 3.0, "features.4": 0.5}
    loss = _Student(student, teacher, betas, NAD(p=3.0)).training_step((x, y))
    expected = F.cross_entropy(student(x), y)
    for end, beta in ((1, 3.0), (5, 0.5)):
        expected = expected + beta * attention_distance(student.features[:end](x), teacher.features[:end](x), 3.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


class Negative(nn.Module):
    """Turns images around while it is trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if self.training else x


def test_both_networks_see_the_same_augmented_images():
    student, teacher = (DigitsCNN(10, 1, width=4) for _ in range(2))
    student.eval(), teacher.eval()
    x, y = thief().x[:8], thief().y[:8]
    step = _Student(student, teacher, {"features.0": 3.0}, NAD(augmentation=Negative().eval()))
    expected = F.cross_entropy(student(-x), y)
    expected = expected + 3.0 * attention_distance(student.features[:1](-x), teacher.features[:1](-x))
    torch.testing.assert_close(step.training_step((x, y)), expected)


def test_the_teacher_is_trained_on_augmented_images_too(monkeypatch):
    seen = []
    monkeypatch.setattr(Negative, "forward", lambda _, x: seen.append(len(x)) or x)
    NAD(epochs=2, teacher_epochs=3, augmentation=Negative()).scrub(patched_model(), thief(), Keep())
    assert len(seen) == 5 * (len(thief().x) // 32)


def test_it_removes_a_patch_backdoor():
    model = patched_model()
    assert patch_success(model) > 0.95
    before, state, keep = weights(model), torch.get_rng_state(), Keep()
    NAD().scrub(model, thief(), keep)
    assert NAD.from_scratch
    assert keep.strengths == list(range(1, 21))
    assert test_accuracy(keep.last) >= test_accuracy(model) - 0.06
    assert patch_success(keep.last) < 0.1
    assert not changed(before, weights(model))
    assert torch.equal(state, torch.get_rng_state())


def test_equal_seeds_give_equal_weights_and_the_observer_ends_the_walk():
    runs = [Keep(most=1), Keep(most=1), Keep(most=1)]
    for keep, seed in zip(runs, (0, 0, 1), strict=True):
        NAD(epochs=3, teacher_epochs=1, layers=["features.4"]).scrub(patched_model(), thief(), keep, seed)
    assert runs[0].strengths == [1]
    assert not changed(runs[0].models[0], runs[1].models[0])
    assert changed(runs[0].models[0], runs[2].models[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["features.99"]}, "features.99"),
        ({"layers": ["classifier.1"]}, r"answered .*feature maps"),
        ({"beta": [1.0, 2.0]}, "beta has 2 numbers, and there are 3 layers"),
    ],
)
def test_layers_that_do_not_fit_the_model_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NAD(**arguments).scrub(patched_model(), thief(), Keep())


def test_a_model_without_convolutions_needs_named_layers():
    with pytest.raises(ValueError, match=r"runs no nn.Conv2d"):
        stage_convolutions(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2))


def test_hooks_go_when_a_forward_fails():
    model = DigitsCNN(10, 1, width=4)
    with pytest.raises(ValueError, match="batch of images"), outputs_of(model, ["features.0"]):
        model(torch.zeros(3))
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize(
    "arguments",
    [{"epochs": 0}, {"teacher_epochs": 0}, {"beta": -1.0}, {"beta": []}, {"p": 0.0}, {"batch_size": 0}],
)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).removeprefix("teacher_")):
        NAD(**arguments)
