"""Knockoff Nets: the bandit against examples worked by hand, what is drawn and paid, and interrupted thefts."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_distillation import QUIET, Linear, network
from test_distillation import Noise as Source

from meadef_lightning.extraction import Noise, Pool, Student
from meadef_lightning.extraction.bandit import (
    RunningStandardizer,
    bandit_update,
    certainty_reward,
    class_policy,
    diversity_reward,
    draw_actions,
    loss_reward,
    occurrences,
)
from meadef_lightning.extraction.knockoff import AdaptiveKnockoffDataModule, KnockoffDataModule
from meadef_lightning.oracle import BudgetExceededError, HardLabel, Oracle, QueryLedger, Rounded, TopK, Totals

SMALL = {"queries": 90, "rounds": 3, "draws": 16, "interim_epochs": 2, "batch_size": 20}


def student():
    return Student(network, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def fitted(attack):
    Trainer(max_epochs=1, **QUIET).fit(student(), attack)
    return attack


def same_transfer(a, b):
    return all(torch.equal(getattr(a._transfer, n), getattr(b._transfer, n)) for n in ("x", "answers", "held_out", "y"))


# --- the bandit


def test_update_by_hand():
    # policy 1/4, 1/2, 1/4; class 1 is drawn for the third time with r = 2 over a baseline of 0.5
    preferences = torch.tensor([0.0, math.log(2), 0.0], dtype=torch.float64)
    moved, counts = bandit_update(
        preferences, torch.tensor([4, 2, 0]), torch.tensor([1]), torch.tensor([2.0]), baseline=0.5
    )
    expected = preferences + torch.tensor([-0.125, 0.25, -0.125], dtype=torch.float64)
    torch.testing.assert_close(moved, expected)
    assert counts.tolist() == [4, 3, 0]


def test_batch_is_the_sum_of_the_single_updates_at_its_policy():
    rng = np.random.default_rng(0)
    preferences, counts, available = rng.normal(size=5), np.array([0, 3, 1, 7, 2]), np.array([1, 1, 0, 1, 1], bool)
    actions, rewards = np.array([0, 3, 0, 1, 0]), rng.normal(size=5)
    policy = np.exp(preferences) * available / (np.exp(preferences) * available).sum()
    expected, drawn = preferences.copy(), counts.copy()
    for action, reward in zip(actions, rewards, strict=True):
        drawn[action] += 1
        for a in range(5):
            expected[a] += (reward - 0.3) / drawn[action] * ((a == action) - policy[a])
    moved, after = bandit_update(
        *map(torch.from_numpy, (preferences, counts, actions, rewards)), 0.3, torch.from_numpy(available)
    )
    np.testing.assert_allclose(moved, expected)
    assert after.tolist() == drawn.tolist()
    assert moved[2] == preferences[2]


def test_policy_does_not_overflow_and_masks():
    policy = class_policy(torch.tensor([1e5, -1e5, 0.0]), torch.tensor([False, True, True]))
    assert policy.tolist() == [0, 0, 1]
    assert class_policy(torch.tensor([1e5, 1e5])).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="No class has images left"):
        class_policy(torch.zeros(2), torch.zeros(2, dtype=torch.bool))


def test_occurrences():
    assert occurrences(torch.tensor([2, 0, 2, 2, 0]), 4).tolist() == [1, 1, 2, 3, 2]


def test_draws_are_distributed_as_one_after_the_other():
    generator, p = torch.Generator().manual_seed(0), np.array([0.5, 0.3, 0.2])
    preferences, left, seen, n = torch.from_numpy(np.log(p)), torch.tensor([1, 2, 1]), {}, 2000
    for _ in range(n):
        pair = tuple(draw_actions(preferences, left, 2, generator).tolist())
        seen[pair] = seen.get(pair, 0) + 1
    single = {0: p * [0, 1, 1], 1: p, 2: p * [1, 1, 0]}
    for first in range(3):
        for second in range(3):
            expected = p[first] * single[first][second] / single[first].sum()
            assert seen.get((first, second), 0) / n == pytest.approx(expected, abs=4.5 * math.sqrt(expected / n))


def test_draws_stop_at_what_is_left():
    left = torch.tensor([0, 3, 1, 40])
    actions = draw_actions(torch.tensor([9.0, 2.0, 1.0, 0.0]), left, 44, torch.Generator().manual_seed(0))
    assert actions.bincount(minlength=4).tolist() == left.tolist()
    with pytest.raises(ValueError, match="draws=45 is more than the 44 images that are left"):
        draw_actions(torch.zeros(4), left, 45, torch.Generator())


# --- rewards


def test_rewards_of_known_answers():
    answers = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(certainty_reward(answers), torch.tensor([0.5, 0, 0, 1]))
    mean = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(diversity_reward(answers, mean), torch.tensor([0.2, 0.1, 0, 0.7]))
    student = torch.tensor([[0.25, 0.5, 0.25]])
    expected = -0.7 * math.log(0.25) - 0.2 * math.log(0.5) - 0.1 * math.log(0.25)
    assert loss_reward(student.log(), answers[:1]).tolist() == pytest.approx([expected])
    assert loss_reward(student.log(), torch.tensor([1])).tolist() == pytest.approx([math.log(2)])


def test_standardizer_equals_numpy_over_all_values():
    rng, running = np.random.default_rng(0), RunningStandardizer()
    chunks = [rng.normal(3, 2, size) for size in (1, 7, 2, 50)]
    for number, chunk in enumerate(chunks):
        running.update(torch.from_numpy(chunk))
        everything = np.concatenate(chunks[: number + 1])
        assert running.mean == pytest.approx(everything.mean())
        assert running.squares == pytest.approx(everything.var() * len(everything))
        expected = (chunk - everything.mean()) / (everything.std() or 1)
        np.testing.assert_allclose(running(torch.from_numpy(chunk)), expected, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6 + 0.1])
def test_values_without_variance_become_zero(value):
    running = RunningStandardizer()
    assert running(torch.zeros(2)).tolist() == [0, 0]
    for _ in range(3):
        running.update(torch.full((7,), value))
        assert running(torch.full((3,), value)).tolist() == [0, 0, 0]


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
    Trainer(max_epochs=1, strategy="ddp_fork", devices=2, **QUIET).fit(student(), attack)
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


def test_hard_answers_have_a_constant_certainty():
    one_hot = F.one_hot(torch.tensor([0, 3, 1]), 4).double()
    running = RunningStandardizer()
    running.update(certainty_reward(one_hot))
    assert running(certainty_reward(one_hot)).tolist() == [0, 0, 0]
