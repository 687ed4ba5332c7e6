"""Copycat: balancing by the victim's answers, what is asked and kept, and pools that are refused."""

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from linear_victim import Jitter, Linear, Noise, network, rows
from silent import SILENT
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction import AttackerSplit, OtherData, Pool, Student
from meadef_lightning.extraction.copycat import CopycatDataModule, balanced_rows
from meadef_lightning.oracle import BudgetExceededError, HardLabel, Oracle, QueryLedger, TopK, Totals, row_digests


class Elsewhere(Pool):
    """Images whose first pixel numbers them; they come with classes of their own, which must not matter."""

    def __init__(self, size=100):
        self.size = size

    def images(self, data):
        x = torch.zeros(self.size, 1, 4, 4)
        x[:, 0, 0, 0] = torch.arange(self.size)
        return x, torch.full((self.size,), 3)


class Uneven(nn.Module):
    """Names class 0 for the images 0 to 9, class 2 for 10 to 39, class 1 for all others, and class 3 never."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        return self.scale * nn.functional.one_hot(named(x), 4)


def named(x):
    number = x[:, 0, 0, 0].round().long()
    return torch.where(number < 10, 0, torch.where(number < 40, 2, 1))


def ready(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack = CopycatDataModule(*args, **kwargs)
        attack.setup("fit")
    return attack


# --- balancing


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 3))
def test_every_class_that_occurs_gets_as_many_rows(classes, per_class, seed):
    classes = torch.tensor(classes)
    picked = balanced_rows(classes, per_class, torch.Generator().manual_seed(seed))
    for number in range(6):
        members = (classes == number).nonzero().flatten()
        times = picked.bincount(minlength=len(classes))[members]
        if len(members):
            assert times.sum() == per_class
            assert times.max() - times.min() <= 1
    assert len(picked) == per_class * len(set(classes.tolist()))


def test_which_rows_are_repeated_or_left_out_is_drawn():
    classes = torch.tensor([0] * 10 + [1] * 3)
    draws = [balanced_rows(classes, 4, torch.Generator().manual_seed(seed)) for seed in range(200)]
    counts = torch.cat(draws).bincount(minlength=13)
    assert ((counts[:10] - 80).abs() < 35).all()  # binomial, 200 draws of 0.4: five standard deviations
    assert ((counts[10:] - 267).abs() < 35).all()
    assert torch.equal(draws[7], balanced_rows(classes, 4, torch.Generator().manual_seed(7)))


# --- what is asked and kept


@pytest.mark.parametrize("policy", [None, TopK(2), HardLabel()])
def test_answers_become_classes_and_each_image_is_paid_once(policy):
    victim = Uneven()
    attack = ready(Oracle(victim, policy), Noise(), Elsewhere(), validation_fraction=0.1, batch_size=8)
    assert attack.oracle.ledger.totals() == Totals(100, 100)
    assert victim.asked == attack.queries_spent == 100
    transfer = attack._transfer
    assert transfer.y is None
    assert torch.equal(transfer.answers, named(transfer.x))
    assert sorted(transfer.x[:, 0, 0, 0].tolist()) == list(range(100))
    x, answers = rows(attack.val_dataloader())
    assert len(x) == 10
    held_out = set(row_digests(x))
    most = int(transfer.answers[~transfer.held_out].bincount().max())
    expected = ["soft" if policy is None else policy.kind, 100, 100, 3 * most]
    summary = attack.query_summary()
    assert [summary[name] for name in ("labels", "queries", "distinct", "epoch_rows")] == expected
    x, answers = rows(attack.train_dataloader())
    assert len(x) == 3 * most // 8 * 8  # the last incomplete batch is dropped
    assert held_out.isdisjoint(row_digests(x))
    assert torch.equal(answers, named(x))


@pytest.mark.parametrize("per_class", [5, 40])
def test_epoch_is_balanced(per_class):
    attack = ready(Oracle(Uneven()), Noise(), Elsewhere(), per_class=per_class, validation_fraction=0.0, batch_size=500)
    x, answers = rows(attack.train_dataloader())
    assert answers.bincount(minlength=4).tolist() == [per_class, per_class, per_class, 0]
    times = x[:, 0, 0, 0].long().bincount(minlength=100)
    assert times[:10].unique().tolist() == ([0, 1] if per_class == 5 else [4])
    assert times[10:40].unique().tolist() == ([0, 1] if per_class == 5 else [1, 2])
    assert times[40:].unique().tolist() == [0, 1]


def test_classes_never_named_are_reported():
    with pytest.warns(
        UserWarning, match=r"named 3 of its 4 classes for the images to train on, and never 3 \(d\)\. The"
    ):
        CopycatDataModule(Oracle(Uneven()), Noise(), Elsewhere()).setup("fit")
    with pytest.warns(UserWarning, match=r"never 0 \(a\), 3 \(d\)"):
        CopycatDataModule(Oracle(Shifted()), Noise(), Elsewhere()).setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CopycatDataModule(Oracle(Linear()), Noise(), OtherData(Noise())).setup("fit")


class Shifted(Uneven):
    """Names class 1 where Uneven names 0."""

    def forward(self, x):
        return self.scale * nn.functional.one_hot(named(x).clamp_min(1), 4)


def test_smaller_budgets_are_drawn_subsets_and_cost_nothing_again(tmp_path):
    def numbers(queries, budget, seed=0):
        victim = Uneven()
        oracle = Oracle(victim, ledger=QueryLedger(tmp_path / "l", budget))
        attack = ready(oracle, Noise(), Elsewhere(), queries=queries, seed=seed)
        return victim.asked, set(attack._transfer.x[:, 0, 0, 0].tolist())

    asked, small = numbers(30, 30)
    assert asked == len(small) == 30
    assert small != set(range(30))  # a pool may be sorted
    with pytest.raises(BudgetExceededError, match="budget is 69 distinct inputs: 30 are spent, 40 new ones were asked"):
        numbers(70, 69)
    asked, large = numbers(70, 70)
    assert asked == 40
    assert small < large
    assert numbers(70, 70) == (0, large)
    assert numbers(100, None, seed=1)[0] == 30


def test_theft_works_and_leaves_the_global_generator_alone():
    data, victim = Noise(), Linear()
    pool = OtherData(Noise(), "test")
    attack = CopycatDataModule(Oracle(victim), data, pool, augmentation=Jitter(), batch_size=16)
    state = torch.random.get_rng_state()
    attack.setup("fit")
    rows(attack.train_dataloader())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(0)
    student = Student(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05))
    trainer = Trainer(max_epochs=15, **SILENT)
    trainer.fit(student, attack)
    x, _ = data.tensors("attacker")
    with torch.no_grad():
        assert (student(x).argmax(1) == victim(x).argmax(1)).float().mean() > 0.75
    assert "val_fidelity" in trainer.callback_metrics
    assert "val_accuracy" not in trainer.callback_metrics


# --- bad input


def test_images_of_the_victims_problem_are_refused():
    data = Noise()
    for pool in (AttackerSplit(), OtherData(data, "attacker")):
        with pytest.raises(
            MisconfigurationException, match=r"another domain than the victim's.*use DistillationDataModule"
        ):
            CopycatDataModule(Oracle(Uneven()), data, pool)
    with pytest.raises(TypeError, match="pool"):
        CopycatDataModule(Oracle(Uneven()), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"per_class": 0}, "per_class=0 must be at least 1"),
        ({"queries": 101}, "queries=101 is more than the 100 images of the pool"),
        ({"queries": 1, "validation_fraction": 0.9}, "All 1 queries are held out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ready(Oracle(Uneven()), Noise(), Elsewhere(), **options)


def test_features_are_refused():
    class Features(HardLabel):
        kind = "feature"

    with pytest.raises(MisconfigurationException, match="CopycatDataModule needs to know the victim's class"):
        CopycatDataModule(Oracle(Uneven(), Features()), Noise(), Elsewhere())


def test_from_a_configuration():
    parser = ArgumentParser()
    parser.add_argument("--queries", type=Callable[[Oracle, SplitDataModule], LightningDataModule])
    pool = {"class_path": "meadef_lightning.extraction.Noise", "init_args": {"size": 50}}
    path = "meadef_lightning.extraction.copycat.CopycatDataModule"
    options = {"class_path": path, "init_args": {"pool": pool, "per_class": 9}}
    made = parser.instantiate(parser.parse_object({"queries": options})).queries(Oracle(Linear()), Noise())
    assert (made.pool.size, made.per_class) == (50, 9)
