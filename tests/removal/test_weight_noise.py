"""Weight noise against its distribution, and along its ray."""

import copy

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.weight_noise import WeightNoise, add_weight_noise


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 40))
        model[3].weight.data.mul_(7)
        return model


def thief():
    x, y = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    return ThiefData(x, y, x, y, 40, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def points(scales, model, seed=0):
    seen = {}
    WeightNoise(scales).scrub(model, thief(), lambda strength, noisy: seen.update({strength: noisy}) or True, seed)
    return seen


def test_noise_is_gaussian_and_scaled_by_each_tensors_own_deviation():
    model = network()
    noisy = add_weight_noise(model, 0.3, torch.Generator().manual_seed(1))
    for index in (0, 3):
        weight = model[index].weight.detach()
        added = (noisy[index].weight.detach() - weight).flatten().numpy()
        deviation = weight.numpy().std()
        assert kstest(added / (0.3 * deviation), "norm").pvalue > 0.01
        assert kstest(added / (0.6 * deviation), "norm").pvalue < 1e-3
    assert torch.equal(noisy[1].weight, model[1].weight)  # all ones: no deviation, no noise
    assert torch.equal(noisy[1].running_mean, model[1].running_mean)


def test_a_single_number_has_no_deviation():
    model = nn.Linear(1, 1)
    assert torch.equal(add_weight_noise(model, 1.0, torch.Generator().manual_seed(0)).weight, model.weight)


def test_the_path_is_a_ray():
    model = network()
    seen = points([0.1, 0.4], model)
    for weak, strong, origin in zip(seen[0.1].parameters(), seen[0.4].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close((strong - origin) / 4, weak - origin, rtol=1e-4, atol=1e-6)


def test_the_seed_decides_and_nothing_else_changes():
    model = network().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, same, other = (points([0.2], model, seed)[0.2] for seed in (3, 3, 4))
    assert torch.equal(first[0].weight, same[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not first.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_removes_a_backdoor_in_the_weights_fine_tuning_and_keeps_a_coarse_one():
    """Two classes 100 weights apart in size: noise of a tenth of the deviation flips the fine margin in about half of the draws."""
    for margin, survives in ((1e-3, False), (50.0, True)):
        model = nn.Linear(100, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 100).repeat(2, 1))
            model.weight[1] += margin / 100
        trigger = torch.ones(1, 100)
        assert model(trigger).argmax() == 1
        kept = [bool(points([0.1], model, seed)[0.1](trigger).argmax() == 1) for seed in range(40)]
        assert all(kept) is survives
        assert survives or 8 < sum(kept) < 32


def test_the_path_ends_when_told():
    seen = []
    WeightNoise().scrub(network(), thief(), lambda strength, _: seen.append(strength) or strength < 0.2)
    assert seen == [0.05, 0.1, 0.2]


def test_bad_input():
    with pytest.raises(ValueError, match="scale=-1"):
        add_weight_noise(network(), -1, torch.Generator())
    with pytest.raises(ValueError, match="scales="):
        WeightNoise([0.2, 0.1])
