"""What all removals share: the thief's data, his budget, the path that is trained, and the layers he singles out."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from thief_models import Keep, digits, patched_model, thief
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import AccuracyBudget, accuracy, classes_of, logits_of, train_path
from meadef_lightning.removal.finetuning import Tuner
from meadef_lightning.removal.layers import last_linear, reset


def as_set(x):
    return {row.numpy().tobytes() for row in x}


def test_the_thief_has_attacker_images_only_each_on_one_side():
    data, whole = digits(), as_set(digits().tensors("attacker")[0])
    mine = ThiefData.of(data, share=0.5, validation=0.2, seed=3)
    work, aside = as_set(mine.x), as_set(mine.validation_x)
    assert (len(work), len(aside)) == (200, 50)
    assert not work & aside
    assert work | aside < whole
    for split in ("victim", "validation", "verification", "test"):
        assert not (work | aside) & as_set(data.tensors(split)[0])
    # black and white are where the data module puts pixels of 0 and 255
    torch.testing.assert_close(mine.low.item(), whole_min(data), atol=1e-5, rtol=0)
    assert mine.high.item() >= data.tensors("attacker")[0].max() - 1e-5
    other = ThiefData.of(data, share=0.5, validation=0.2, seed=4)
    assert as_set(other.x) != work


def whole_min(data):
    return data.tensors("attacker")[0].min().item()


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.1}, {"validation": 0.0}, {"validation": 1.0}])
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(ValueError, match="must lie in"):
        ThiefData.of(digits(), **wrong)


def test_a_split_without_a_side_is_refused():
    with pytest.raises(ValueError, match="Enlarge the attacker split"):
        ThiefData.of(digits(), share=0.004, validation=0.2)


def broken(model, share, seed=0):
    """The model with a share of its last layer's rows emptied: worse, by how much is measured."""
    model = copy.deepcopy(model)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[: round(share * 10)] = -1e3
    return model


def test_the_budget_keeps_the_last_model_within_it():
    model, data = patched_model(), thief()
    budget = AccuracyBudget(model, data, 0.15)
    drops = [budget.start - accuracy(broken(model, s), data.validation_x, data.validation_y) for s in (0.0, 0.1, 0.5)]
    assert drops[0] == pytest.approx(0, abs=1e-6)
    assert 0.01 < drops[1] < 0.15 < drops[2]
    assert budget(1.0, model)
    kept = broken(model, 0.1)
    assert budget(2.0, kept)
    assert not budget(3.0, broken(model, 0.5))
    assert budget.strength == 2.0
    assert budget.best is not kept
    torch.testing.assert_close(logits_of(budget.best, data.x[:9]), logits_of(kept, data.x[:9]))


class Right(nn.Module):
    """Answers class 1 for the images named, and class 0 for all others."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        return torch.eye(2)[torch.isin(x.flatten(), torch.tensor([float(row) for row in self.rows])).long()]


def numbered(count):
    """Images whose one pixel is their number, all of class 1."""
    x, y = torch.arange(float(count)).view(-1, 1, 1, 1), torch.ones(count, dtype=torch.int64)
    return ThiefData(x, y, x, y, 2, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def test_a_walk_ends_only_where_the_loss_is_beyond_doubt():
    """Of 100 images, 12 lost are 12 points with a standard error of √(.12 · .88 / 100) = 3.2; of 1000, 1.0."""
    for count, goes_on in ((100, {5: True, 6: True, 11: True, 13: False}), (1000, {50: True, 60: True, 75: False})):
        for lost, expected in goes_on.items():
            share = lost / count
            assert (share - 2 * (share * (1 - share) / count) ** 0.5 <= 0.05) == expected
            budget = AccuracyBudget(Right(*range(count)), numbered(count), 0.05)
            assert budget(1.0, Right(*range(lost, count))) == expected
            assert budget.strength == float(share <= 0.05)  # what he takes home is within it as measured


def test_an_unlucky_point_is_passed_over_and_not_taken_home():
    budget = AccuracyBudget(Right(*range(90)), numbered(100), 0.05)
    walk = [budget(1.0, Right(*range(88))), budget(2.0, Right(*range(82))), budget(3.0, Right(*range(87)))]
    assert walk == [True] * 3
    assert budget.strength == 3.0
    # as many wrong answers, but the doubt is about the images that changed: 8 lost alone, or 18 lost and 10 won
    assert not AccuracyBudget(Right(*range(90)), numbered(100), 0.0)(1.0, Right(*range(82)))
    assert AccuracyBudget(Right(*range(90)), numbered(100), 0.0)(1.0, Right(*range(18, 100)))


def test_a_path_from_scratch_is_walked_to_its_end():
    budget = AccuracyBudget(patched_model(), thief(), 0.0, to_the_end=True)
    assert budget(1.0, broken(patched_model(), 0.9))
    assert budget(2.0, broken(patched_model(), 0.5))
    assert budget.strength == 2.0
    assert (classes_of(budget.best, thief().x) >= 5).all()


def test_a_budget_beyond_all_accuracy_is_refused():
    with pytest.raises(ValueError, match=r"points=1\.5"):
        AccuracyBudget(patched_model(), thief(), 1.5)


class Flags(nn.Module):
    """A model of which one part is meant to be in training mode and the other not."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.drop(self.norm(x.flatten(1))))


def path(seed=0, most=10**6, noise=False, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Flags(), torch.randn(40, 1, 2, 2)
    model.norm.eval()
    keep = Keep(most)

    def observe(strength, seen):
        if noise:
            torch.rand(3)
        return keep(strength, seen)

    module = Tuner(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    train_path(module, model, (x, torch.arange(40) % 3), observe, epochs=3, batch_size=16, seed=seed, **options)
    return keep, model


def test_a_path_depends_on_its_seed_alone():
    first, model = path()
    torch.manual_seed(99)
    again, _ = path(noise=True)
    other, _ = path(seed=1)
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(first.models, again.models, strict=True)]
    assert same == [True] * 3
    assert not torch.equal(first.models[0]["out.weight"], other.models[0]["out.weight"])
    assert first.strengths == [1, 2, 3]
    # observing puts the model into eval mode, and gives every layer its own flag back
    assert (model.norm.training, model.drop.training, model.out.training) == (False, True, True)
    assert torch.equal(model.norm.running_mean, torch.zeros(4))


def test_a_path_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    path()
    assert torch.equal(torch.rand(4), expected)


def test_the_observer_stops_a_path():
    assert path(most=2)[0].strengths == [1, 2]


def test_a_batch_larger_than_the_data_is_one_step_of_all_of_it():
    seen = []

    class Counting(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch):
            seen.append(len(batch[0]))
            return self.layer(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Counting()
    for size in (64, 4):
        train_path(module, module.layer, (torch.ones(10, 1),), lambda *_: True, epochs=1, batch_size=size, seed=0)
    assert seen == [10, 4, 4]


class Backwards(nn.Module):
    """Registers its layers in another order than they run, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(5, 3), nn.Linear(4, 5), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)))


def test_the_last_linear_layer_is_the_one_that_runs_last():
    model = Backwards().train()
    assert last_linear(model, torch.zeros(2, 1, 2, 2)) is model.head
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    model.forward = lambda x: model.head(input=model.body(input=x.flatten(1)))
    assert last_linear(model, torch.zeros(2, 1, 2, 2)) is model.head
    with pytest.raises(ValueError, match=r"Flatten runs no nn\.Linear"):
        last_linear(nn.Flatten(), torch.zeros(2, 1, 2, 2))


def test_reset_leaves_no_weight_and_no_statistic():
    model = copy.deepcopy(patched_model())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    reset(model, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert not any(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert all(torch.equal(layer.running_var, torch.ones_like(layer.running_var)) for layer in norms)
    twin = copy.deepcopy(patched_model())
    reset(twin, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_part_that_cannot_be_reset_is_refused():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"Token \(1\) has parameters but no reset_parameters"):
        reset(nn.Sequential(nn.Linear(2, 2), Token()), seed=0)
