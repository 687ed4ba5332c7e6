import dataclasses

import pytest
import torch
from scipy.stats import chisquare, kstest
from thief_models import Keep, changed, patch_success, patched_model, test_accuracy, thief, weights
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal import WRK
from meadef_lightning.removal.layers import last_linear
from meadef_lightning.removal.wrk import boundary_set, redraw, wrong_labels


def two_channel_data() -> ThiefData:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor([-1.0, -3.0])[:, None, None], torch.tensor([2.0, 5.0])[:, None, None]
    x = low + (high - low) * torch.rand(7, 2, 4, 4, generator=generator)
    y = torch.arange(7) % 4
    return ThiefData(x, y, x, y, 4, low, high)


def linear_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(32, 4))


def test_images_are_pushed_by_a_sign_step_towards_one_class_a_batch_and_stay_images():
    data, model = two_channel_data(), linear_model()
    x, labels = boundary_set(
        model, data, epsilon=0.2, batches=5, batch_size=3, generator=torch.Generator().manual_seed(3)
    )
    assert x.shape == (15, 2, 4, 4)
    assert labels.shape == (15,)
    # every image towards every class, with finite differences in place of gradients, and the step in each channel's own range
    steps = 1e-2 * torch.eye(32).view(32, 2, 4, 4)
    pushed = torch.empty(7, 4, 2, 4, 4)
    with torch.no_grad():
        for row, image in enumerate(data.x):
            slope = model(image + steps) - model(image[None])
            for towards in range(4):
                step = 0.2 * torch.tensor([3.0, 8.0])[:, None, None] * slope[:, towards].sign().view(2, 4, 4)
                pushed[row, towards] = (image + step).clamp(data.low, data.high)
    distance = (x[:, None, None] - pushed).abs().flatten(3).amax(-1)
    assert bool((distance.flatten(1).amin(1) < 1e-5).all())
    found = [divmod(int(place), 4) for place in distance.flatten(1).argmin(1)]
    towards = torch.tensor([t for _, t in found]).view(5, 3)
    assert bool((towards == towards[:, :1]).all())  # one class a batch
    assert len(set(towards[:, 0].tolist())) > 1  # which is drawn for each
    rows = torch.tensor([row for row, _ in found]).view(5, 3)
    assert all(len(set(batch)) == 3 for batch in rows.tolist())
    assert bool((labels != data.y[rows.flatten()]).all())
    assert bool((x >= data.low).all())
    assert bool((x <= data.high).all())
    assert bool(((x == data.low) | (x == data.high)).any())  # the clip had something to do


def test_wrong_labels_are_uniform_over_all_other_classes():
    y = torch.arange(5).repeat(4000)
    drawn = wrong_labels(y, 5, torch.Generator().manual_seed(0))
    for label in range(5):
        counts = torch.bincount(drawn[y == label], minlength=5)
        assert counts[label] == 0
        assert chisquare([int(n) for k, n in enumerate(counts) if k != label]).pvalue > 1e-4


def test_a_redrawn_layer_is_uniform_and_the_old_weights_come_back():
    layer = nn.Linear(64, 100)
    nn.init.constant_(layer.weight, 5.0)
    nn.init.constant_(layer.bias, 5.0)
    assert torch.equal(redraw(layer, torch.Generator().manual_seed(0)), torch.full((100, 64), 5.0))
    for parameter in (layer.weight, layer.bias):
        assert kstest(parameter.detach().flatten().numpy() * 8, "uniform", args=(-1, 2)).pvalue > 1e-4


def product_with_the_old_layer(alpha: float) -> float:
    model, keep = patched_model(), Keep()
    WRK(boundary_epochs=0, epochs=2, alpha=alpha).scrub(model, thief(), keep)
    old, new = (last_linear(network, thief().x[:2]).weight.detach() for network in (model, keep.last))
    return float((old * new).sum())


def test_alpha_turns_the_new_layer_away_from_the_old():
    assert product_with_the_old_layer(0.3) < product_with_the_old_layer(0.0) - 1


def test_a_share_of_the_images_is_used_but_no_fewer_than_the_least():
    seen = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = patched_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(len(x))
            return self.inner(x)

    for share, least, count in ((0.5, 0, 200), (0.05, 100, 100), (0.05, 10**6, 400)):
        seen.clear()
        WRK(share, least, boundary_epochs=0, epochs=1, batch_size=20).scrub(Counted(), thief(), Keep())
        assert sum(seen) == count


def test_the_model_and_the_random_state_are_left_alone_and_equal_seeds_give_equal_weights():
    model = patched_model()
    before, state = weights(model), torch.get_rng_state()
    small = dataclasses.replace(thief(), x=thief().x[:96], y=thief().y[:96])
    runs = [Keep(most=1), Keep(most=1), Keep(most=1)]
    for keep, seed in zip(runs, (0, 0, 1), strict=True):
        WRK(boundary_epochs=1, epochs=3).scrub(model, small, keep, seed)
    assert not changed(before, weights(model))
    assert torch.equal(state, torch.get_rng_state())
    assert runs[0].strengths == [1]
    assert not changed(runs[0].models[0], runs[1].models[0])
    assert changed(runs[0].models[0], runs[2].models[0])


def test_it_removes_a_patch_backdoor_and_the_pushed_images_are_what_does_it():
    model = patched_model()
    start = test_accuracy(model)
    assert patch_success(model) > 0.95
    default, pushed, shift = Keep(), Keep(), Keep()
    WRK().scrub(model, thief(), default)
    assert WRK.from_scratch
    assert default.strengths == list(range(1, 11))
    assert test_accuracy(default.last) >= start - 0.08
    assert patch_success(default.last) < 0.1
    # gently, so that the last layer's shift alone does not do it
    WRK(lr=1e-2, alpha=0.01).scrub(model, thief(), pushed)
    WRK(lr=1e-2, alpha=0.01, boundary_epochs=0).scrub(model, thief(), shift)
    assert test_accuracy(pushed.last) >= start - 0.03
    assert patch_success(pushed.last) < 0.3
    assert patch_success(shift.last) > 0.45


@pytest.mark.parametrize(
    "arguments",
    [
        {"share": 0.0},
        {"share": 1.5},
        {"least": -1},
        {"epsilon": 0.0},
        {"batches": 0},
        {"boundary_epochs": -1},
        {"epochs": 0},
        {"lr": 0.0},
        {"alpha": -1.0},
        {"batch_size": 0},
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        WRK(**arguments)
