"""Magnitude pruning against sorting by hand, torch's own pruning, and Lightning's callback."""

import copy
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from silent import SILENT
from torch import nn
from torch.nn.utils import prune

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.quiet import quiet
from meadef_lightning.removal.base import growing
from meadef_lightning.removal.pruning import MagnitudePruning, magnitude_prune, weighted_layers

SHARES = (0.0, 0.1, 0.35, 0.5, 0.9, 1.0)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3), nn.Flatten(), nn.Linear(128, 5)
        )  # fmt: skip


def weights(model):
    return [layer.weight.detach() for layer in model if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]


def thief():
    x, y = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    return ThiefData(x, y, x, y, 5, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def by_hand(values, share):
    """The smallest numbers of a flat list, one after the other."""
    order = sorted(range(len(values)), key=lambda i: abs(values[i]))
    gone = set(order[: round(share * len(values))])
    return [0.0 if i in gone else value for i, value in enumerate(values)]


@pytest.mark.parametrize("share", SHARES)
def test_each_layer_loses_exactly_its_smallest_weights(share):
    model = network()
    for before, after in zip(weights(model), weights(magnitude_prune(model, share)), strict=True):
        assert after.flatten().tolist() == by_hand(before.flatten().tolist(), share)
        assert int((after == 0).sum()) == round(share * after.numel())


@pytest.mark.parametrize("share", SHARES)
def test_globally_the_smallest_of_all_weights_go(share):
    model = network()
    before = torch.cat([weight.flatten() for weight in weights(model)]).tolist()
    after = torch.cat([weight.flatten() for weight in weights(magnitude_prune(model, share, "global"))]).tolist()
    assert after == by_hand(before, share)


def test_layers_differ_globally_and_not_otherwise():
    sparsity = lambda scope: [float((w == 0).float().mean()) for w in weights(magnitude_prune(network(), 0.5, scope))]  # noqa: E731
    assert max(sparsity("layer")) - min(sparsity("layer")) < 0.05
    assert max(sparsity("global")) - min(sparsity("global")) > 0.2  # 27 weights of the first convolution are large


def test_it_is_what_torch_prunes():
    ours, theirs = magnitude_prune(network(), 0.3), network()
    for layer in weighted_layers(theirs):
        prune.remove(prune.l1_unstructured(layer, "weight", 0.3), "weight")
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_it_is_what_lightnings_callback_leaves(scope):
    """The recipe of the documentation, on a training that changes nothing else."""

    class Still(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network().eval()

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Still()
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(layer, "weight") for layer in weighted_layers(module)],
        amount=0.5,
        apply_pruning=lambda epoch: epoch == 1,
        use_global_unstructured=scope == "global",
        use_lottery_ticket_hypothesis=False,
    )
    with quiet(), torch.random.fork_rng():
        loader = torch.utils.data.DataLoader(torch.zeros(4, 1, 8, 8), batch_size=4)
        Trainer(max_epochs=3, callbacks=[pruning], **SILENT).fit(module, loader)
    expected = magnitude_prune(network(), 0.5, scope).state_dict()
    got = module.net.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_path_grows_ends_when_told_and_leaves_the_model_alone(scope):
    model, seen = network().train(), []
    before = copy.deepcopy(model.state_dict())

    def observe(strength, scrubbed):
        assert not scrubbed.training
        seen.append((strength, scrubbed))
        return strength < 0.5

    state = torch.get_rng_state()
    MagnitudePruning(scope=scope).scrub(model, thief(), observe)
    assert torch.equal(state, torch.get_rng_state())
    assert [strength for strength, _ in seen] == [0.1, 0.2, 0.3, 0.4, 0.5]
    for (_, weaker), (_, stronger) in pairwise(seen):
        for few, many in zip(weights(weaker), weights(stronger), strict=True):
            assert bool(((few != 0) | (many == 0)).all())  # what was gone stays gone
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in seen[0][1].named_parameters()] == [name for name, _ in model.named_parameters()]


def test_it_removes_a_backdoor_that_lives_in_small_weights_and_not_one_in_large_ones():
    for trigger_weight, survives in ((0.01, False), (3.0, True)):
        model = nn.Linear(11, 2, bias=False)
        with torch.no_grad():
            model.weight.zero_()
            model.weight[0, :10], model.weight[1, 10] = 1.0, trigger_weight
        trigger = torch.zeros(1, 11)
        trigger[0, 10] = 1.0
        success = [bool(magnitude_prune(model, gone / 22)(trigger).argmax() == 1) for gone in (11, 12)]
        assert success == [True, survives]  # 11 of the 22 weights are 0 from the start


def test_shared_weights_count_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert len(weighted_layers(model)) == 1
    pruned = magnitude_prune(model, 0.5, "global")
    assert int((pruned[0].weight == 0).sum()) == 8
    assert pruned[0].weight is pruned[1].weight


def test_bad_input():
    with pytest.raises(ValueError, match=r"sparsity=1\.5"):
        magnitude_prune(network(), 1.5)
    with pytest.raises(ValueError, match='scope="channel"'):
        magnitude_prune(network(), 0.5, "channel")
    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        magnitude_prune(nn.ReLU(), 0.5)
    masked = network()
    prune.l1_unstructured(masked[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"prune\.remove"):
        weighted_layers(masked)
    for bad in ([], [0.0, 0.5], [0.5, 0.5], [0.5, 0.2], [0.5, 1.0]):
        with pytest.raises(ValueError, match="each larger than the one before"):
            MagnitudePruning(bad)
    assert growing("scales", [0.5, 7]) == (0.5, 7)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_memory_format_of_weights_does_not_matter(scope):
    model = network()
    again = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for plain, other in zip(weights(magnitude_prune(model, 0.5, scope)), weights(magnitude_prune(again, 0.5, scope)), strict=True):  # fmt: skip
        assert torch.equal(plain, other)
