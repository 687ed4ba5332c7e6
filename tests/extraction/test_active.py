"""ActiveThief: its strategies against SciPy, brute force and closed forms, what is asked, and going on after a failure."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from linear_victim import Linear, Noise, network
from scipy import stats
from silent import SILENT
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction import Noise as NoisePool
from meadef_lightning.extraction import Student
from meadef_lightning.extraction.active import ActiveThiefDataModule, deepfool_distance, entropy, greedy_k_center
from meadef_lightning.oracle import BudgetExceededError, HardLabel, Oracle, QueryLedger, TopK, Totals, row_digests

STRATEGIES = ("random", "entropy", "kcenter", "dfal", "dfal+kcenter")


class Witness(Linear):
    """A victim that remembers what it answered, and fails once it was asked too much."""

    def __init__(self, most=math.inf):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, x):
        if self.asked + len(x) > self.most:
            raise RuntimeError("power cut")
        self.seen += row_digests(x)
        return super().forward(x)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(outputs, inputs, seed=0):
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.copy_(uniform(outputs, inputs, seed=seed) - 0.5)
        model[1].bias.copy_(uniform(outputs, seed=seed + 1) - 0.5)
    return model


def steal(attack):
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    Trainer(max_epochs=1, **SILENT).fit(Student(network, optimizer=optimizer), attack)
    return attack._transfer


# --- the strategies


def test_entropy_is_scipys():
    p = uniform(50, 7).softmax(1)
    p[0] = torch.eye(7)[2]
    torch.testing.assert_close(entropy(p), torch.from_numpy(stats.entropy(p.numpy(), axis=1)))
    assert entropy(p)[0] == 0
    assert entropy(torch.full((1, 4), 0.25)).item() == pytest.approx(math.log(4))


def brute_force_greedy(candidates, centers, count):
    near, picked = [list(row) for row in centers.tolist()], []
    for _ in range(count):
        gaps = [
            -1.0 if i in picked else min((math.dist(row, other) for other in near), default=math.inf)
            for i, row in enumerate(candidates.tolist())
        ]
        picked.append(gaps.index(max(gaps)))
        near.append(candidates[picked[-1]].tolist())
    return picked


@pytest.mark.parametrize(("n", "m", "count"), [(30, 5, 10), (20, 0, 20), (12, 600, 3), (9, 1, 0)])
def test_k_center_is_the_greedy_choice(n, m, count):
    candidates, centers = uniform(n, 3, seed=n), uniform(m, 3, seed=m + 100)
    assert greedy_k_center(candidates, centers, count).tolist() == brute_force_greedy(candidates, centers, count)


def test_k_center_never_picks_twice_and_tells_close_probabilities_apart():
    copies = torch.zeros(6, 2)
    assert sorted(greedy_k_center(copies, copies, 6).tolist()) == list(range(6))
    close = torch.full((40, 4), 0.25)
    close[33, 0] += 1e-6
    assert greedy_k_center(close, torch.full((50, 4), 0.25), 1).tolist() == [33]
    with pytest.raises(ValueError, match=r"count=7 must lie in \[0, 6\]"):
        greedy_k_center(copies, copies, 7)


points = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=7)


@settings(max_examples=80, deadline=None)
@given(points, st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), max_size=2), st.integers(1, 3))
def test_k_center_is_within_twice_the_optimum(candidates, centers, count):
    count = min(count, len(candidates))

    def radius(picked):
        return max(min(math.dist(a, b) for b in [*centers, *picked]) for a in candidates)

    x, fixed = torch.tensor(candidates).double(), torch.tensor(centers).double().reshape(-1, 2)
    greedy = radius([candidates[i] for i in greedy_k_center(x, fixed, count).tolist()])
    best = min(radius(picked) for picked in itertools.combinations(candidates, count))
    assert greedy <= 2 * best + 1e-9


def test_deepfool_of_an_affine_model_is_the_distance_to_the_border():
    model, x = affine(5, 12), uniform(40, 3, 2, 2, seed=9)
    weight = model[1].weight.detach()
    logits = model(x).detach()
    top = logits.argmax(1)
    assert len(top.unique()) > 1
    expected = torch.full((40,), math.inf, dtype=torch.float64)
    for k in range(5):
        gap = (logits[torch.arange(40), top] - logits[:, k]) / (weight[top] - weight[k]).norm(dim=1)
        expected = torch.where(top == k, expected, torch.minimum(expected, gap))
    for steps in (1, 5):
        torch.testing.assert_close(deepfool_distance(model, x, steps), expected)
    # with the two likeliest classes only, the border to the second is measured, near or not
    second = logits.topk(2).indices[:, 1]
    gap = (logits.gather(1, top[:, None]) - logits.gather(1, second[:, None]))[:, 0] / (
        weight[top] - weight[second]
    ).norm(dim=1)
    torch.testing.assert_close(deepfool_distance(model, x, classes=2), gap)
    assert (gap > expected + 1e-6).any()
    assert model[1].weight.grad is None


class Circle(nn.Module):
    """Two classes: inside and outside of the circle of radius 1."""

    def forward(self, x):
        inside = 1 - x.flatten(1).square().sum(1)
        return torch.stack([inside, -inside], 1)


def test_deepfool_finds_a_curved_border_row_by_row():
    radii = torch.tensor([0.3, 0.6, 0.95, 1.05, 1.7, 3.0])
    angles = torch.arange(6.0)
    x = (radii * torch.stack([angles.cos(), angles.sin()])).T.reshape(6, 1, 1, 2)
    distances = deepfool_distance(Circle(), x, steps=10)
    inside = radii[:3]  # Newton's first step on 1 − r² is across already
    torch.testing.assert_close(distances[:3], (1 - inside**2) / (2 * inside))
    torch.testing.assert_close(distances[3:], radii[3:] - 1, rtol=0.02, atol=0)  # and from outside it takes several
    alone = torch.cat([deepfool_distance(Circle(), row, steps=10) for row in x.split(1)])
    torch.testing.assert_close(distances, alone)


def test_deepfool_where_nothing_leads_to_the_border():
    class Flat(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :3] + torch.tensor([0.0, 2.0, 1.0])

    assert deepfool_distance(Flat(), torch.ones(2, 1, 2, 2)).tolist() == [math.inf, math.inf]
    with pytest.raises(ValueError, match="needs two classes, got classes=1 of 3"):
        deepfool_distance(Flat(), torch.ones(2, 1, 2, 2), classes=1)


# --- what is asked


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_number_of_queries(strategy):
    victim, data = Witness(), Noise()
    attack = ActiveThiefDataModule(Oracle(victim), data, 123, strategy, rounds=4, epochs=1, batch_size=32)
    assert attack.parts == [25, 12, 22, 22, 21, 21]
    transfer = steal(attack)
    assert attack.oracle.ledger.totals() == Totals(123, 123)
    assert victim.asked == len(set(victim.seen)) == attack.queries_spent == len(transfer.x) == 123
    assert transfer.held_out.tolist() == [True] * 25 + [False] * 98
    x, y = data.tensors("attacker")
    index = torch.cdist(transfer.x.flatten(1), x.flatten(1)).argmin(dim=1)
    assert torch.equal(transfer.x, x[index])
    assert torch.equal(transfer.y, y[index])
    with torch.no_grad():
        torch.testing.assert_close(transfer.answers, victim(transfer.x).softmax(1))
    assert attack.query_summary()["strategy"] == strategy


class Spy(ActiveThiefDataModule):
    """Keeps what each round's pick was made of, and guards the global generator."""

    def pick(self, student, x, rest, asked, count):
        picked = super().pick(student, x, rest, asked, count)
        self.kept = [*getattr(self, "kept", []), (student, x[rest], x[asked], picked)]
        return picked

    def collect(self):
        before = torch.random.get_rng_state()
        transfer = super().collect()
        assert torch.equal(torch.random.get_rng_state(), before)
        return transfer


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("policy", [None, HardLabel(), TopK(2)])
def test_what_is_picked(strategy, policy):
    attack = Spy(Oracle(Linear(), policy), Noise(), 60, strategy, rounds=2, epochs=2, shortlist=2.0, batch_size=32)
    transfer = steal(attack)
    assert [len(asked) for _, _, asked, _ in attack.kept] == [6, 27]  # validation teaches no student
    assert torch.equal(attack.kept[1][2], transfer.x[12:39])
    for student, rest, asked, picked in attack.kept:
        with torch.no_grad():
            p, known = student(rest).softmax(1), student(asked).softmax(1)
        weight, candidates = student.network[1].weight.detach(), torch.arange(len(rest))
        logits = student.network(rest).detach().sort(dim=1, descending=True)
        normals = weight[logits.indices[:, 1:]] - weight[logits.indices[:, :1]]
        distance = ((logits.values[:, :1] - logits.values[:, 1:]) / normals.norm(dim=2)).amin(dim=1)
        if strategy == "entropy":
            assert torch.equal(entropy(p)[picked].sort().values, entropy(p).sort().values[-len(picked) :])
            continue
        nearest = distance.argsort()
        if strategy == "dfal":
            assert set(picked.tolist()) == set(nearest[: len(picked)].tolist())
            continue
        if strategy == "dfal+kcenter":
            candidates = nearest[: 2 * len(picked)]
        expected = candidates[brute_force_greedy(p[candidates], known, len(picked))]
        assert set(picked.tolist()) == set(expected.tolist())


def test_classes_of_another_pool_are_not_reported():
    class Labelled(NoisePool):
        def images(self, data):
            return super().images(data)[0], torch.zeros(self.size, dtype=torch.int64)

    assert steal(ActiveThiefDataModule(Oracle(Linear()), Noise(), 40, "random", pool=Labelled(50))).y is None


# --- going on


@pytest.mark.parametrize("strategy", ["random", "dfal+kcenter"])
def test_interrupted_theft_asks_nothing_twice_and_ends_the_same(tmp_path, strategy):
    def attack(victim, ledger=None):
        oracle = Oracle(victim, ledger=ledger, batch_size=5)
        return ActiveThiefDataModule(oracle, Noise(), 100, strategy, rounds=3, epochs=1)

    whole = steal(attack(Witness()))
    first, second, third = Witness(most=65), Witness(most=20), Witness()
    for victim in (first, second):  # both in the middle of a round's questions
        with pytest.raises(RuntimeError, match="power cut"):
            steal(attack(victim, QueryLedger(tmp_path / "l", 100)))
    again = steal(attack(third, QueryLedger(tmp_path / "l", 100)))
    assert (first.asked, second.asked, third.asked) == (64, 18, 18)  # in batches of 5, after 54 and 77
    assert torch.equal(again.x, whole.x)
    torch.testing.assert_close(again.answers, whole.answers)
    assert len(set(first.seen + second.seen + third.seen)) == 100
    other = attack(Witness(), QueryLedger(tmp_path / "l"))
    other.pool = NoisePool(150)  # the state of other images is not continued
    x = steal(other).x
    assert set(row_digests(x)) <= set(row_digests(other.pool.images(other.data)[0]))


def test_a_finished_theft_trains_no_interim_student_again(tmp_path, monkeypatch):
    def attack():
        return ActiveThiefDataModule(
            Oracle(Linear(), ledger=QueryLedger(tmp_path / "l")), Noise(), 50, "entropy", rounds=2, epochs=1
        )

    first = steal(attack())
    monkeypatch.setattr(ActiveThiefDataModule, "interim", lambda *args: pytest.fail("trained again"))
    assert torch.equal(steal(attack()).x, first.x)


def test_budget_is_not_overspent():
    attack = ActiveThiefDataModule(
        Oracle(Linear(), ledger=QueryLedger(budget=60)), Noise(), 100, "random", rounds=3, epochs=1
    )
    with pytest.raises(BudgetExceededError, match="budget is 60 distinct inputs: 54 are spent, 23 new ones were asked"):
        steal(attack)
    assert attack.oracle.ledger.distinct == 54


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 301}, "needs 301 images and the pool has 300"),
        ({"queries": 4}, "queries=4 leave 1 images for validation, 0 to begin with and 3 for 10 rounds"),
        ({"queries": 100, "initial_fraction": 0.8}, "20 images for validation, 80 to begin with and 0 for 10"),
        (
            {"queries": 100, "strategy": "margin"},
            "strategy='margin' must be one of random, entropy, kcenter, dfal, dfal",
        ),
        ({"queries": 100, "rounds": 0}, "rounds=0, epochs=10 and shortlist=5.0 must be at least 1"),
        ({"queries": 100, "shortlist": 0.5}, "shortlist=0.5 must be at least 1"),
    ],
)
def test_bad_options(options, message):
    victim = Witness()
    with pytest.raises(ValueError, match=message):
        ActiveThiefDataModule(Oracle(victim), Noise(), **options).setup("fit")
    assert victim.asked == 0


def test_features_are_refused():
    class Features(HardLabel):
        kind = "feature"

    with pytest.raises(MisconfigurationException, match="ActiveThiefDataModule needs to know the victim's class"):
        ActiveThiefDataModule(Oracle(Linear(), Features()), Noise(), 100)


def test_from_a_configuration():
    parser = ArgumentParser()
    parser.add_argument("--queries", type=Callable[[Oracle, SplitDataModule], LightningDataModule])
    path = "meadef_lightning.extraction.active.ActiveThiefDataModule"
    options = {"class_path": path, "init_args": {"queries": 90, "strategy": "dfal+kcenter"}}
    made = parser.instantiate(parser.parse_object({"queries": options})).queries(Oracle(Linear()), Noise())
    assert (made.queries, made.strategy, made.pool.name) == (90, "dfal+kcenter", "AttackerSplit")
