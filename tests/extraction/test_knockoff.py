"""Knockoff Nets: what is drawn and paid, and interrupted thefts."""

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from linear_victim import Linear, network
from linear_victim import Noise as Source
from silent import SILENT

from meadef_lightning.extraction import Noise, Pool, Student
from meadef_lightning.extraction.knockoff import AdaptiveKnockoffDataModule, KnockoffDataModule
from meadef_lightning.oracle import BudgetExceededError, HardLabel, Oracle, QueryLedger, Rounded, TopK, Totals

SMALL = {"queries": 90, "rounds": 3, "draws": 16, "interim_epochs": 2, "batch_size": 20}


def student():
    return Student(network, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def fitted(attack):
    Trainer(max_epochs=1, **SILENT).fit(student(), attack)
    return attack


def same_transfer(a, b):
    return all(torch.equal(getattr(a._transfer, n), getattr(b._transfer, n)) for n in ("x", "answers", "held_out", "y"))


# --- the random strategy


@pytest.mark.parametrize("policy", [None, TopK(2), HardLabel()])
def test_random_asks_a_random_subset_once(policy):
    source, victim = Source(), Linear()
    attack = KnockoffDataModule(Oracle(victim, policy), source, queries=100)
    attack.setup("fit")
    pool, labels = source.tensors("attacker")
    transfer = attack._transfer
    rows = torch.cdist(transfer.x.flatten(1), pool.flatten(1)).argmin(1)
    assert len(rows.unique()) == 100 == victim.asked
    assert attack.oracle.ledger.totals() == Totals(100, 100)
    assert torch.equal(transfer.x, pool[rows])
    assert torch.equal(transfer.y, labels[rows])
    assert rows.sort().values.tolist() != list(range(100))  # not merely the first ones
    assert transfer.held_out.nonzero().flatten().tolist() == list(range(90, 100))
    more, other = KnockoffDataModule(attack.oracle, source, 150), KnockoffDataModule(attack.oracle, source, 150, seed=1)
    more.setup("fit")
    assert attack.oracle.ledger.distinct == 150  # a smaller attack is a part of a larger one
    other.setup("fit")
    assert 150 < attack.oracle.ledger.distinct < 300
    assert attack.query_summary()["pool"] == "AttackerSplit"


def test_random_by_default_asks_the_whole_pool():
    attack = KnockoffDataModule(Oracle(Linear()), Source(), pool=Noise(40))
    attack.setup("fit")
    assert attack.oracle.ledger.totals() == Totals(40, 40)
    assert attack._transfer.y is None


# --- the adaptive strategy


@pytest.mark.parametrize("policy", [None, TopK(2), Rounded(0), HardLabel()])
def test_adaptive_asks_each_image_once(policy):
    source, victim = Source(), Linear()
    torch.manual_seed(3)
    attack = fitted(AdaptiveKnockoffDataModule(Oracle(victim, policy), source, **SMALL))
    assert attack.oracle.ledger.totals() == Totals(90, 90)
    assert victim.asked == attack.queries_spent == 90
    transfer, (pool, labels) = attack._transfer, source.tensors("attacker")
    rows = torch.cdist(transfer.x.flatten(1), pool.flatten(1)).argmin(1)
    assert len(rows.unique()) == 90
    assert torch.equal(transfer.y, labels[rows])
    assert torch.equal(transfer.answers, attack.oracle.query(transfer.x))
    assert transfer.held_out.nonzero().flatten().tolist() == list(range(81, 90))
    assert attack.query_summary()["rewards"] == ["certainty", "diversity", "loss"]
    torch.manual_seed(4)
    assert same_transfer(attack, fitted(AdaptiveKnockoffDataModule(Oracle(Linear(), policy), Source(), **SMALL)))


def test_adaptive_can_use_up_the_pool_and_leaves_the_global_generator_alone():
    source = Source()
    attack = AdaptiveKnockoffDataModule(
        Oracle(Linear()), source, 300, validation_fraction=0.0, rewards=("certainty", "diversity"), draws=64, rounds=2
    )
    state = torch.random.get_rng_state()
    attack.setup("fit")  # without a loss to reward there is no interim student, and no Trainer is needed
    assert torch.equal(torch.random.get_rng_state(), state)
    assert attack.oracle.ledger.totals() == Totals(300, 300)
    assert sorted(attack._transfer.x.sum((1, 2, 3)).tolist()) == sorted(
        source.tensors("attacker")[0].sum((1, 2, 3)).tolist()
    )


class OneLoud(Pool):
    """Four classes 3, 5, 7 and 9 of 100 images each; only those of one of them get a certain answer from a linear victim."""

    in_domain = True  # the module then keeps the classes for a look at what was drawn

    def __init__(self, loud=7):
        self.loud = loud

    def images(self, data):
        x = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        y = torch.tensor([3, 5, 7, 9]).repeat(100)
        return x * torch.where(y == self.loud, 10, 0.01)[:, None, None, None], y


def test_class_that_pays_is_drawn_most():
    attack = AdaptiveKnockoffDataModule(
        Oracle(Linear()), Source(), 110, validation_fraction=0.1, pool=OneLoud(), rewards=("certainty",), draws=8
    )
    attack.setup("fit")
    drawn = attack._transfer.y[:99].bincount(minlength=10)
    assert drawn[7] > 60
    assert drawn.sum() == drawn[[3, 5, 7, 9]].sum() == 99


# --- interruptions


class Cut(Linear):
    """A victim that is gone after some rows."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, x):
        if self.asked + len(x) > self.after:
            raise ConnectionError("cut")
        return super().forward(x)


@pytest.mark.parametrize("after", [10, 50, 85])
def test_resumed_theft_equals_uninterrupted(tmp_path, monkeypatch, after):
    whole = fitted(AdaptiveKnockoffDataModule(Oracle(Cut(90)), Source(), **SMALL))
    victims = Cut(after), Cut(90)
    with pytest.raises(ConnectionError, match="cut"):
        fitted(AdaptiveKnockoffDataModule(Oracle(victims[0], ledger=QueryLedger(tmp_path / "l")), Source(), **SMALL))
    trained, interim = [], AdaptiveKnockoffDataModule.interim
    monkeypatch.setattr(
        AdaptiveKnockoffDataModule,
        "interim",
        lambda self, x, *args: (trained.append(len(x)), interim(self, x, *args))[1],
    )
    resumed = AdaptiveKnockoffDataModule(Oracle(victims[1], ledger=QueryLedger(tmp_path / "l", 90)), Source(), **SMALL)
    fitted(resumed)
    assert same_transfer(whole, resumed)
    assert victims[0].asked + victims[1].asked == 90 == resumed.oracle.ledger.distinct
    assert trained == {10: [27, 54], 50: [27, 54], 85: []}[after]  # of 81 in three rounds


def test_students_that_cannot_be_repeated_to_the_bit_cost_nothing(tmp_path, monkeypatch):
    def theft(after):
        return AdaptiveKnockoffDataModule(Oracle(Cut(after), ledger=QueryLedger(tmp_path / "l")), Source(), **SMALL)

    with pytest.raises(ConnectionError, match="cut"):
        fitted(theft(50))
    interim = AdaptiveKnockoffDataModule.interim
    monkeypatch.setattr(
        AdaptiveKnockoffDataModule, "interim", lambda self, x, answers, *_: interim(self, x, answers, 9, 1)
    )
    assert fitted(theft(900)).oracle.ledger.distinct == 90


def test_state_of_another_pool_is_not_continued(tmp_path):
    options = {"queries": 40, "rewards": ("certainty",), "rounds": 2}
    for loud in (7, 5):
        attack, fresh = (
            AdaptiveKnockoffDataModule(
                Oracle(Linear(), ledger=QueryLedger(path)), Source(), pool=OneLoud(loud), **options
            )
            for path in (tmp_path / "l", None)
        )
        attack.setup("fit")
        fresh.setup("fit")
        assert same_transfer(attack, fresh)


def test_budget_stops_the_theft_and_a_larger_one_continues_it(tmp_path):
    victim = Linear()
    with pytest.raises(BudgetExceededError, match="budget is 50 distinct inputs"):
        fitted(AdaptiveKnockoffDataModule(Oracle(victim, ledger=QueryLedger(tmp_path / "l", 50)), Source(), **SMALL))
    assert victim.asked <= 50
    fitted(AdaptiveKnockoffDataModule(Oracle(victim, ledger=QueryLedger(tmp_path / "l", 90)), Source(), **SMALL))
    assert victim.asked == 90
    with pytest.raises(BudgetExceededError):
        KnockoffDataModule(Oracle(victim, ledger=QueryLedger(budget=50)), Source(), 51).setup("fit")
    assert victim.asked == 90


def test_two_processes_train_on_what_one_of_them_asked(tmp_path):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    attack = AdaptiveKnockoffDataModule(Oracle(Linear(), ledger=QueryLedger(tmp_path / "l")), Source(), **SMALL)
    Trainer(max_epochs=1, strategy="ddp_fork", devices=2, **SILENT).fit(student(), attack)
    assert attack.oracle.ledger.totals() == Totals(90, 90)


# --- bad input


def test_pool_without_classes():
    attack = AdaptiveKnockoffDataModule(Oracle(Linear()), Source(), 10, pool=Noise(50))
    with pytest.raises(MisconfigurationException, match="The pool Noise has no classes"):
        attack.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"interim_epochs": 0}, "interim_epochs must be at least 1, got 0"),
        ({"rewards": ()}, r"at least one, got \(\)"),
        ({"rewards": ("loss", "loss")}, "rewards must be different ones of"),
        ({"rewards": ("entropy",)}, r"\('certainty', 'diversity', 'loss'\), at least one, got \('entropy',\)"),
        ({"queries": 301}, "needs 301 images, 30 of them for validation, and the pool has 300"),
        ({"queries": 1, "validation_fraction": 0.9}, "needs 1 images, 1 of them for validation"),
    ],
)
def test_bad_options(options, message):
    victim = Linear()
    with pytest.raises(ValueError, match=message):
        AdaptiveKnockoffDataModule(Oracle(victim), Source(), **{"queries": 50, **options}).setup("fit")
    if set(options) <= {"queries", "validation_fraction"}:
        with pytest.raises(ValueError, match=message):
            KnockoffDataModule(Oracle(victim), Source(), **options).setup("fit")
    assert victim.asked == 0
