"""Fine-pruning: its ranking against a computation by hand, channels that stay removed, and a patch backdoor that it removes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import accuracy, classes_of
from meadef_lightning.removal.fine_pruning import Channels, FinePruning, channel_activity, remove_channels
from meadef_lightning.victims.networks import DigitsCNN


def network(*tail, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), *tail, nn.Flatten(), nn.Linear(6 * 16, 3)
        )
        for module in model:
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                for values in (module.weight.data, module.bias.data, module.running_mean):
                    values.normal_()
        return model


def images(count=10, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def patched(x):
    """A white patch of 3×3 pixels in a corner."""
    x = x.clone()
    x[..., -4:-1, -4:-1] = x.max()
    return x


def thief(count=10):
    x, y = images(count), torch.arange(count) % 3
    return ThiefData(x, y, x, y, 3, torch.full((1, 1, 1), -2.0), torch.full((1, 1, 1), 2.0))


class Block(nn.Module):
    """A residual block that uses one ReLU twice, as many do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Linear(3, 2)

    def forward(self, x):
        x = self.relu(self.first(x))
        out = self.norm(self.second(x))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 5, 3), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("inplace", [True, False])
def test_activity_by_hand(inplace):
    model = network(nn.BatchNorm2d(6), nn.ReLU(inplace)).train()
    (layer,) = channel_activity(model, images(), batch_size=3)
    assert model.training
    assert layer.modules == ("2", "3")
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        out = reference[3](reference[2](reference[1](reference[0](images()))))
    expected = [sum(max(value, 0.0) for value in out[:, c].flatten().tolist()) / (10 * 16) for c in range(6)]
    torch.testing.assert_close(layer.activity, torch.tensor(expected))
    order = sorted(range(6), key=lambda c: expected[c])
    assert [layer.dormant(share).tolist() for share in (0.0, 0.5, 0.99)] == [[], order[:3], order[:5]]


def test_activity_behind_functions_and_residual_sums():
    model = Functional()
    (layer,) = channel_activity(model, images())
    with torch.no_grad():
        torch.testing.assert_close(layer.activity, model.conv(images()).relu().mean((0, 2, 3)))
    block = Block().eval()
    (layer,) = channel_activity(block, images())
    assert layer.modules == ("second", "norm")
    with torch.no_grad():
        x = block.first(images()).relu()
        expected = (block.norm(block.second(x)) + x).relu().mean((0, 2, 3))
    torch.testing.assert_close(layer.activity, expected)


def test_named_layers_in_the_order_of_the_names():
    first, second = channel_activity(network(nn.ReLU()), images(), ["2", "0"])
    assert (first.modules, second.modules) == (("2",), ("0",))
    assert (len(first.activity), len(second.activity)) == (6, 4)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.BatchNorm2d(6, affine=False), nn.Identity()]
)
@pytest.mark.parametrize("training", [True, False])
def test_removed_channels_are_zero_behind_normalisation(norm, training):
    model = network(norm, nn.GELU()).train(training)
    (layer,) = channel_activity(model, images())
    gone = torch.tensor([1, 4])
    kept = [0, 2, 3, 5]
    before = model[:5](images())
    remove_channels(model, layer.modules, gone)
    after = model[:5](images())
    assert not after[:, gone].any()
    if not isinstance(norm, nn.GroupNorm):  # whose other channels share statistics with the removed ones
        torch.testing.assert_close(after[:, kept], before[:, kept])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_removed_channels_stay_zero_while_the_others_are_tuned(optimizer):
    model = network(nn.BatchNorm2d(6), nn.ReLU()).eval().requires_grad_(False)
    before, state, data = copy.deepcopy(model.state_dict()), torch.get_rng_state(), thief()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    removal = FinePruning(
        [0.5], ["2"], epochs=3, batch_size=4, optimizer=lambda p: optimizer(p, lr=0.05, weight_decay=0.1, **options)
    )
    seen = []
    for _ in range(2):
        removal.scrub(model, data, lambda strength, tuned: seen.append((strength, tuned)) or True, seed=5)
    (strength, tuned), (_, again) = seen
    assert strength == 0.5
    assert not any(part.training for part in tuned.modules())
    gone = channel_activity(model, data.x)[0].dormant(0.5)
    kept = torch.tensor([channel for channel in range(6) if channel not in gone.tolist()])
    assert len(gone) == 3
    for values in (tuned[2].weight, tuned[2].bias, tuned[3].weight, tuned[3].bias, tuned[3].running_mean):
        assert not values[gone].any()
    with torch.no_grad():
        assert not tuned[:5](images(seed=9))[:, gone].any()
    for index, name in ((0, "0.weight"), (5, "6.weight")):
        assert not torch.equal(tuned.state_dict()[name], before[name]), index
    assert bool((tuned[2].weight[kept] != before["2.weight"][kept]).all())
    assert not torch.equal(tuned[3].running_var, before["3.running_var"])  # it was in training mode
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tuned.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0].weight.requires_grad
    assert torch.equal(state, torch.get_rng_state())


def test_without_tuning_only_the_channels_change():
    model, seen = network(nn.ReLU()), []
    FinePruning([0.3, 0.6, 0.9], epochs=0).scrub(model, thief(), lambda s, pruned: seen.append((s, pruned)) or s < 0.6)
    assert [strength for strength, _ in seen] == [0.3, 0.6]
    for (_, pruned), count in zip(seen, (2, 4), strict=True):
        gone = channel_activity(model, thief().x)[0].dormant(count / 6)
        expected = copy.deepcopy(model)
        remove_channels(expected, ["2"], gone)
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in pruned.state_dict().items())
        assert int((pruned[2].bias == 0).sum()) == count


def test_it_removes_a_patch_backdoor_which_tuning_alone_does_not():
    data = DigitsDataModule()
    x, y = data.tensors("victim")
    test_x, test_y = data.tensors("test")
    poisoned = torch.arange(len(x)) % 10 == 0
    x, y = torch.where(poisoned[:, None, None, None], patched(x), x), torch.where(poisoned, 0, y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        victim = DigitsCNN(10, 1, width=8, hidden=32)
        optimizer = torch.optim.Adam(victim.parameters(), lr=3e-3)
        for rows in (rows for _ in range(8) for rows in torch.randperm(len(x)).split(32)):
            optimizer.zero_grad()
            F.cross_entropy(victim(x[rows]), y[rows]).backward()
            optimizer.step()

    def measure(model):
        success = (classes_of(model, patched(test_x[test_y != 0])) == 0).float().mean()
        return accuracy(model, test_x, test_y), float(success)

    right, success = measure(victim)
    assert right > 0.93
    assert success > 0.9
    seen = {}
    FinePruning([0.01, 0.6], epochs=3).scrub(
        victim, ThiefData.of(data), lambda share, tuned: seen.update({share: measure(tuned)}) or True
    )
    assert seen[0.01][1] > 0.75  # less than half a channel: none is removed, it is only tuned
    assert seen[0.6][1] < 0.4
    assert seen[0.6][0] > 0.92


def test_bad_input():
    with pytest.raises(ValueError, match=r"\['6'\] are no convolutions that run. Those are \['0', '2'\]"):
        channel_activity(network(nn.ReLU(), nn.Identity()), images(), ["6"])
    with pytest.raises(ValueError, match="ran no convolution"):
        channel_activity(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), images())
    for bad in ([], [0.5, 1.0], [0.5, 0.4]):
        with pytest.raises(ValueError, match="each larger than the one before"):
            FinePruning(bad)
    with pytest.raises(ValueError, match="epochs=-1"):
        FinePruning(epochs=-1)
    assert Channels(("a",), torch.tensor([2.0, 1.0])).dormant(0.9).tolist() == [1]
