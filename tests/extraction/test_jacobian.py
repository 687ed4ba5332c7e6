"""Jacobian-based augmentation: its steps against differences and by hand, what is asked, and going on after a failure."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from linear_victim import Linear, Noise, network
from silent import SILENT
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.extraction import Noise as NoisePool
from meadef_lightning.extraction import Student
from meadef_lightning.extraction.base import require_classes
from meadef_lightning.extraction.jacobian import (
    JacobianDataModule,
    TargetedJacobianDataModule,
    jacobian_augmentation,
    random_targets,
    targeted_random_steps,
)
from meadef_lightning.extraction.pools import pixel_range
from meadef_lightning.oracle import BudgetExceededError, HardLabel, Oracle, QueryLedger, TopK, Totals, row_digests


class Smooth(nn.Module):
    """A smooth function of double precision: (B, 2, 3, 3) to (B, 4)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.randn(2, 18, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def forward(self, x):
        return (x.flatten(1) @ self.a).sin() + (x.flatten(1) @ self.b).square() / 5


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


def doubles(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steal(attack, net=network):
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    Trainer(max_epochs=1, **SILENT).fit(Student(net, optimizer=optimizer), attack)
    return attack._transfer


# --- the steps


def test_step_follows_the_sign_of_finite_differences():
    x, classes, model = doubles(6, 2, 3, 3), torch.tensor([0, 1, 2, 3, 0, 1]), Smooth()
    step, low, high = (
        torch.tensor([0.1, 0.3], dtype=torch.float64)[:, None, None],
        doubles(1) * 0 - 0.9,
        doubles(1) * 0 + 1.1,
    )
    nudges = 1e-6 * torch.eye(18, dtype=torch.float64).view(18, 1, 2, 3, 3)
    ahead, behind = (model((x + sign * nudges).flatten(0, 1)).view(18, 6, 4) for sign in (1, -1))
    slope = (ahead - behind)[:, torch.arange(6), classes].T.reshape(x.shape) / 2e-6
    assert slope.abs().min() > 1e-3  # or its sign would be a matter of rounding
    expected = (x + step * slope.sign()).clamp(-0.9, 1.1)
    moved = jacobian_augmentation(model, x, classes, step, low, high)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-15)
    assert (moved == 1.1).any()
    assert (moved == -0.9).any()


def test_step_works_where_a_softmax_is_flat_and_leaves_parameters_alone():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), doubles(5, 1, 4, 4).float()
    with torch.no_grad():
        model[1].weight.mul_(1e4)
        classes = model(x).argmax(1)
    unbounded = torch.tensor(math.inf)
    moved = jacobian_augmentation(model, x, classes, 0.1, -unbounded, unbounded)
    torch.testing.assert_close(moved, x + 0.1 * model[1].weight.sign()[classes].view_as(x))
    assert model[1].weight.grad is None
    assert not moved.requires_grad


def test_targeted_steps_by_hand():
    x, targets, weight = doubles(8, 1, 2, 3), torch.arange(8) % 4, doubles(4, 6, seed=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False, dtype=torch.float64))
    model[1].weight.data = weight
    low, high = torch.tensor([-1.0, 1.3], dtype=torch.float64)
    moved = targeted_random_steps(model, x, targets, 0.05, 7, 0.22, low, high)
    expected = x.flatten(1).clone()
    for _ in range(7):
        p = (expected @ weight.T).softmax(1)
        descent = (F.one_hot(targets, 4) - p) @ weight
        expected = expected + 0.05 * descent.sign()
        expected = torch.minimum(torch.maximum(expected, x.flatten(1) - 0.22), x.flatten(1) + 0.22).clamp(-1.0, 1.3)
    torch.testing.assert_close(moved.flatten(1), expected, rtol=0, atol=1e-14)
    inside = (x > -0.78) & (x < 1.08)
    assert ((moved - x).abs()[inside] <= 0.22 + 1e-14).all()
    assert torch.isclose((moved - x).abs(), torch.tensor(0.22, dtype=torch.float64)).any()
    before, after = (
        F.cross_entropy(model(points), targets, reduction="none") for points in (x.clamp(low, high), moved)
    )
    assert (after < before).all()


def test_random_targets_are_other_classes_without_repetition():
    classes = torch.arange(5).repeat(2000)
    drawn = random_targets(classes, 5, 2, torch.Generator().manual_seed(0))
    assert (drawn != classes[:, None]).all()
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = torch.stack([drawn[classes == c].flatten().bincount(minlength=5) for c in range(5)])
    off = counts[~torch.eye(5, dtype=torch.bool)]  # 1000 expected, of a standard deviation of about 22
    assert ((off - 1000).abs() < 120).all()
    every = random_targets(classes, 5, 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([every, classes[:, None]], 1).sort(dim=1).values, torch.arange(5).expand(10000, 5))


# --- what is asked


@pytest.mark.parametrize(
    ("cls", "options", "rows"),
    [
        (JacobianDataModule, {"rounds": 3}, 2 + 18 * 8),
        (JacobianDataModule, {"rounds": 3, "validation_fraction": 0.0}, 20 * 8),
        (JacobianDataModule, {"rounds": 4, "sigma": 1, "kappa": 7}, 2 + 36 + 7 + 7 + 7),
        (JacobianDataModule, {"rounds": 2, "sigma": 0, "kappa": 18}, 2 + 18 + 18 + 18),
        (TargetedJacobianDataModule, {"rounds": 2, "targets": 2}, 2 + 18 * 9),
        (TargetedJacobianDataModule, {"rounds": 3, "targets": 3, "sigma": 1, "kappa": 5}, 2 + 72 + 15 + 15),
    ],
)
def test_number_of_queries(cls, options, rows):
    victim, data = Witness(), Noise()
    attack = cls(Oracle(victim), data, seeds=20, epochs=1, **options)
    transfer = steal(attack)
    assert attack.planned_queries == len(transfer.x) == rows
    distinct = len(set(row_digests(transfer.x)))
    assert distinct > 0.95 * rows
    assert attack.oracle.ledger.totals() == Totals(distinct, rows)
    assert victim.asked == len(set(victim.seen)) == attack.queries_spent == distinct
    with torch.no_grad():
        torch.testing.assert_close(transfer.answers, victim(transfer.x).softmax(1))
    low, high = pixel_range(data)
    assert ((transfer.x >= low - 1e-6) & (transfer.x <= high + 1e-6)).all()
    seeds, y = (tensor[:20] for tensor in data.tensors("attacker"))
    assert torch.equal(transfer.x[:20], seeds)
    held_out = rows_of(transfer.held_out)
    assert held_out == ([18, 19] if options.get("validation_fraction") is None else [])
    assert torch.equal(transfer.y[held_out], y[held_out])
    # whatever was made stays near a seed that is not held out
    reach = attack.rounds * (getattr(attack, "epsilon", attack.step)) / torch.tensor(data.std) + 1e-5
    gaps = torch.cdist(transfer.x[20:].flatten(1), seeds[: 20 - len(held_out)].flatten(1), p=math.inf)
    assert (gaps.amin(dim=1) <= reach).all()


def rows_of(mask):
    return mask.nonzero().flatten().tolist()


class Spy(JacobianDataModule):
    """Keeps each round's student, sources, classes and new points, and the state of the global generator."""

    def augment(self, student, x, classes, generator):
        new = super().augment(student, x, classes, generator)
        self.kept = [*getattr(self, "kept", []), (student.network[1].weight.detach(), x, classes, new)]
        return new

    def collect(self):
        before = torch.random.get_rng_state()
        transfer = super().collect()
        assert torch.equal(torch.random.get_rng_state(), before)
        return transfer


@pytest.mark.parametrize("policy", [None, HardLabel(), TopK(2)])
def test_new_points_follow_the_victims_classes(policy):
    victim, data = Linear(), Noise()
    attack = Spy(Oracle(victim, policy), data, seeds=30, rounds=2, step=0.07, epochs=1, batch_size=16)
    transfer = steal(attack)
    low, high = pixel_range(data)
    previous = torch.zeros(0)
    for weight, x, classes, new in attack.kept:
        with torch.no_grad():
            assert torch.equal(classes, victim(x).argmax(1))
        expected = x + 0.07 / data.std[0] * weight[classes].sign().view_as(x)
        torch.testing.assert_close(new, torch.minimum(torch.maximum(expected, low), high))
        assert not torch.equal(weight, previous)
        previous = weight
    _, y = data.tensors("attacker")
    assert (attack.kept[0][2] != y[:27]).any()
    assert torch.equal(transfer.x[30:57], attack.kept[0][3])
    assert transfer.answers.shape == ((111,) if policy is not None and policy.kind == "hard" else (111, 4))


def test_classes_of_another_pool_are_not_reported():
    attack = JacobianDataModule(Oracle(Linear()), Noise(), seeds=20, rounds=1, epochs=1, pool=NoisePool(20))
    assert steal(attack).y is None
    assert attack.query_summary() | {"labels": "soft"} == {
        "labels": "soft", "queries": 38, "distinct": 38, "augmented": False, "budget": None, "pool": "Noise", "seeds": 20, "rounds": 1,
    }  # fmt: skip


# --- going on


@pytest.mark.parametrize("cls", [JacobianDataModule, TargetedJacobianDataModule])
@pytest.mark.parametrize("failure", ["asking", "training"])
def test_interrupted_theft_asks_nothing_twice_and_ends_the_same(tmp_path, monkeypatch, cls, failure):
    def attack(victim, ledger=None):
        return cls(Oracle(victim, ledger=ledger, batch_size=8), Noise(), seeds=20, rounds=3, epochs=1, sigma=2, kappa=9)

    whole = steal(attack(Witness()))
    first = Witness(most=len(whole.x) - 8 if failure == "asking" else math.inf)
    with monkeypatch.context() as patch:
        interim = cls.interim
        if failure == "training":
            last = attack(first).round_seed(2)

            def failing(self, x, answers, epochs, seed):
                if seed == last:
                    raise RuntimeError("power cut")
                return interim(self, x, answers, epochs, seed)

            patch.setattr(cls, "interim", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            steal(attack(first, QueryLedger(tmp_path / "l")))
    assert 50 < first.asked < len(whole.x)
    second = Witness()
    trained = []
    with monkeypatch.context() as patch:
        patch.setattr(cls, "interim", lambda *args: trained.append(args) or interim(*args))
        again = steal(attack(second, QueryLedger(tmp_path / "l")))
    assert len(trained) == (0 if failure == "asking" else 1)  # what the last round asks was known already
    for name in ("x", "answers", "held_out", "y"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), rtol=0, atol=1e-6)
    assert torch.equal(again.x, whole.x)
    assert set(first.seen).isdisjoint(second.seen)
    assert set(first.seen) | set(second.seen) == set(row_digests(whole.x))


def test_state_of_other_images_is_not_continued(tmp_path):
    def attack(seed, most=math.inf):
        return JacobianDataModule(
            Oracle(Witness(most), ledger=QueryLedger(tmp_path / "l")), Noise(), seeds=20, rounds=2, epochs=1,
            pool=NoisePool(20, seed),
        )  # fmt: skip

    steal(attack(0))
    other = steal(attack(1))
    data = Noise()
    data.setup()
    assert torch.equal(other.x[:20], NoisePool(20, 1).images(data)[0])


def test_budget_is_not_overspent_and_a_larger_one_goes_on(tmp_path):
    def attack(budget):
        ledger = QueryLedger(tmp_path / "l", budget)
        return JacobianDataModule(Oracle(Linear(), ledger=ledger), Noise(), seeds=20, rounds=2, epochs=1)

    with pytest.raises(BudgetExceededError, match="The query budget is 60 distinct inputs: 38 are spent, 36 new ones"):
        steal(attack(60))
    large = attack(74)
    steal(large)
    assert large.oracle.ledger.distinct == 74


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds=0, rounds=6 and epochs=10 must be at least 1"),
        ({"step": 0.0}, "step=0.0 above 0"),
        ({"sigma": 2}, "both sigma and kappa, got sigma=2 and kappa=None"),
        ({"sigma": 6, "kappa": 3}, r"sigma=6 must lie in \[0, 6\)"),
        ({"sigma": 1, "kappa": 37, "seeds": 20}, r"kappa=37 must lie in \[1, 36\], the points after 1 rounds"),
        ({"seeds": 301}, "needs 301 seeds, 30 of them for validation, and the pool has 300"),
        ({"seeds": 1, "validation_fraction": 0.9}, "needs 1 seeds, 1 of them for validation"),
    ],
)
def test_bad_options(options, message):
    victim = Witness()
    with pytest.raises(ValueError, match=message):
        JacobianDataModule(Oracle(victim), Noise(), **options).setup("fit")
    assert victim.asked == 0


def test_bad_targets():
    with pytest.raises(ValueError, match="no 4 other classes than a point's own among 4"):
        TargetedJacobianDataModule(Oracle(Linear()), Noise(), targets=4).setup("fit")
    with pytest.raises(ValueError, match=r"targets=0 and steps=8 must be at least 1, and epsilon=0.1 above 0"):
        TargetedJacobianDataModule(Oracle(Linear()), Noise(), targets=0)


def test_features_are_refused():
    class Features(HardLabel):
        kind = "feature"

    with pytest.raises(MisconfigurationException, match="JacobianDataModule needs to know the victim's class"):
        JacobianDataModule(Oracle(Linear(), Features()), Noise())
    require_classes(Oracle(Linear()), "any")


def test_from_a_configuration():
    parser = ArgumentParser()
    parser.add_argument("--queries", type=Callable[[Oracle, SplitDataModule], LightningDataModule])
    pool = {"class_path": "meadef_lightning.extraction.Noise", "init_args": {"size": 50}}
    path = "meadef_lightning.extraction.jacobian.TargetedJacobianDataModule"
    options = {"class_path": path, "init_args": {"targets": 1, "seeds": 33, "sigma": 1, "kappa": 4, "pool": pool}}
    made = parser.instantiate(parser.parse_object({"queries": options})).queries(Oracle(Linear()), Noise())
    assert isinstance(made, TargetedJacobianDataModule)
    assert (made.seeds, made.kappa, made.children, made.rounds, made.pool.size) == (33, 4, 1, 3, 50)
