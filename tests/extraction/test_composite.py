"""Composite-data extraction: the blends in closed form, what is asked and when, interruptions and processes."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from linear_victim import Jitter, Linear, Spy, network, rows
from linear_victim import Noise as Source
from silent import SILENT

from meadef_lightning.extraction import Noise, Pool, Student
from meadef_lightning.extraction.composite import CompositeDataModule, Composites, composite_batch, draw_composites
from meadef_lightning.oracle import BudgetExceededError, Features, HardLabel, Oracle, QueryLedger, TopK, Totals


def fit(attack, epochs=2, student=None, **options):
    student = Spy(network) if student is None else student
    Trainer(max_epochs=epochs, **SILENT, **options).fit(student, attack)
    return student


def by_hand(pool, blends, seed, epoch, ratio="uniform"):
    i, j, rho = (part.tolist() for part in draw_composites(len(pool), blends, seed, epoch, ratio))
    return torch.stack([r * pool[a] + (1 - r) * pool[b] for a, b, r in zip(i, j, rho, strict=True)])


# --- blends


def test_blends_in_closed_form():
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 4.0, 0.25])
    blend = composite_batch(a.view(3, 1, 1, 1), b.view(3, 1, 1, 1), torch.tensor([0.25, 0.0, 1.0], dtype=torch.float64))
    assert blend.flatten().tolist() == [2.5, 4.0, 0.5]
    assert blend.dtype == torch.float32


def test_bits_of_a_blend_do_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    a, b, ratio = (torch.randn(33, 3, 5, 5, generator=generator) for _ in range(3))
    ratio = ratio[:, 0, 0, 0].sigmoid()
    whole = composite_batch(a, b, ratio)
    parts = [composite_batch(a[k : k + 2], b[k : k + 2], ratio[k : k + 2]) for k in range(0, 33, 2)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("ratio", ["uniform", "grid"])
def test_draws_are_pairs_of_different_images(ratio):
    i, j, rho = draw_composites(7, 5000, seed=0, epoch=3, ratio=ratio)
    pairs = (i * 7 + j).bincount(minlength=49).view(7, 7)
    assert pairs.diagonal().sum() == 0
    off = pairs[~torch.eye(7, dtype=torch.bool)]
    assert ((off - 5000 / 42).abs() < 5 * (5000 / 42) ** 0.5).all()
    if ratio == "grid":
        steps, counts = rho.unique(return_counts=True)
        torch.testing.assert_close(steps, torch.arange(1, 10) / 10)
        assert ((counts - 5000 / 9).abs() < 5 * (5000 / 9) ** 0.5).all()
    else:
        assert (rho.histc(10, 0, 1) - 500).abs().max() < 5 * 500**0.5
        assert 0 <= rho.min() < rho.max() < 1


def test_draws_are_a_function_of_seed_epoch_and_index():
    def draw(blends, seed, epoch):
        return torch.stack([part.double() for part in draw_composites(50, blends, seed, epoch, "uniform")], 1)

    state = torch.random.get_rng_state()
    assert torch.equal(draw(100, 0, 1)[:37], draw(37, 0, 1))
    drawn = torch.cat([draw(100, seed, epoch) for seed in (0, 1, -5) for epoch in (0, 1, 2)])
    assert len(drawn.unique(dim=0)) == 900
    assert torch.equal(torch.random.get_rng_state(), state)


def test_composites_are_those_of_the_running_epoch():
    pool, now = torch.randn(9, 1, 2, 2, generator=torch.Generator().manual_seed(0)), [0]
    data = Composites(pool, 20, seed=4, ratio="uniform", epoch=lambda: now[0])
    assert len(data) == 20
    for epoch in (0, 3, 0):
        now[0] = epoch
        torch.testing.assert_close(data.__getitems__([5, 2, 19]), by_hand(pool, 20, 4, epoch)[[5, 2, 19]])
        assert torch.equal(data[5], data.__getitems__([5])[0])


# --- what is asked


@pytest.mark.parametrize("policy", [None, TopK(2), HardLabel()])
def test_every_epoch_asks_fresh_blends_once(policy):
    victim, source = Linear(), Source()
    attack = CompositeDataModule(Oracle(victim, policy), source, blends=100, batch_size=32, seed=6)
    student = fit(attack)
    assert [len(x) for x, _ in student.trained] == [32, 32, 32, 4] * 2
    x, answers = (torch.cat(column) for column in zip(*student.trained, strict=True))
    assert len(x.unique(dim=0)) == 200
    pool, labels = source.tensors("attacker")
    torch.testing.assert_close(x, torch.cat([by_hand(pool[:270], 100, 6, epoch) for epoch in (0, 1)]))
    assert torch.equal(answers, attack.oracle.query(x))
    assert victim.asked == attack.queries_spent == 230  # with 30 natural images
    held_out = rows(attack.val_dataloader())
    assert torch.equal(held_out[0], pool[270:])
    assert torch.equal(held_out[1], attack.oracle.query(pool[270:]))
    assert torch.equal(held_out[2], labels[270:])
    assert victim.asked == 230
    summary = attack.query_summary()
    assert (summary["distinct"], summary["blends"], summary["ratio"], summary["pool"]) == (
        230, 100, "uniform", "AttackerSplit",
    )  # fmt: skip


class Few(Pool):
    """Four images."""

    def images(self, data):
        return torch.arange(64.0).sin().view(4, 1, 4, 4), None


def test_grid_repeats_are_paid_for_once():
    victim = Linear()
    attack = CompositeDataModule(
        Oracle(victim), Source(), 60, batch_size=20, validation_fraction=0.0, pool=Few(), ratio="grid"
    )
    student = fit(attack)
    distinct = len({x.numpy().tobytes() for batch, _ in student.trained for x in batch})
    assert victim.asked == attack.oracle.ledger.distinct == distinct < 120
    assert attack.oracle.ledger.calls == 120
    assert attack.val_dataloader() == []


def test_blends_are_by_default_as_many_as_images_in_whole_batches():
    attack = CompositeDataModule(Oracle(Linear()), Source(), batch_size=64)
    assert (attack.epoch_size, attack.queries_spent) == (0, 0)
    fit(attack, epochs=1)
    assert attack.epoch_size == 256
    assert attack.oracle.ledger.totals() == Totals(286, 286)


def test_testing_and_loading_ask_nothing():
    victim = Linear()
    attack = CompositeDataModule(Oracle(victim), Source(), 50, validation_fraction=0.0, batch_size=25)
    attack.setup("test")
    with pytest.raises(RuntimeError, match="not asked yet"):
        attack.train_dataloader()
    attack.setup("fit")
    state = torch.random.get_rng_state()
    loaded = list(attack.train_dataloader())
    assert [tuple(x.shape) for x in loaded] == [(25, 1, 4, 4)] * 2
    assert torch.equal(attack.on_before_batch_transfer(loaded[0], 0), loaded[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert victim.asked == 0


def test_student_is_asked_about_the_blend_and_sees_it_augmented():
    victim = Linear()
    attack = CompositeDataModule(Oracle(victim), Source(), 64, 32, Jitter(), pool=Noise(40), seed=1)
    student = fit(attack, epochs=1)
    x, answers = (torch.cat(column) for column in zip(*student.trained, strict=True))
    blends = by_hand(Noise(40).images(attack.data)[0][:36], 64, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(answers, victim(blends).softmax(1))
    assert 0.05 < (x - blends).std() < 0.15
    assert [len(part) for part in rows(attack.val_dataloader())] == [4, 4]


# --- interruptions and budgets


class Leaving(Callback):
    """Writes a checkpoint after step 5, of 4 in an epoch, and leaves after step 6."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == 6:
            raise ConnectionError("cut")


def test_resumed_training_equals_uninterrupted_and_asks_nothing_twice(tmp_path):
    torch.manual_seed(0)
    initial, ckpt = network(4, 1), tmp_path / "half.ckpt"

    def make(victim, ledger=None):
        attack = CompositeDataModule(Oracle(victim, HardLabel(), ledger), Source(), blends=120, batch_size=30)
        return attack, Spy(copy.deepcopy(initial))

    attack, whole = make(Linear())
    fit(attack, 3, whole)
    victims = Linear(), Linear()
    attack, student = make(victims[0], QueryLedger(tmp_path / "l"))
    with pytest.raises(ConnectionError, match="cut"):
        fit(attack, 3, student, callbacks=[Leaving(ckpt)])
    assert victims[0].asked == 30 + 6 * 30
    content = torch.load(ckpt, weights_only=False)
    assert content["CompositeDataModule"] == {"batches": 1}
    attack, resumed = make(victims[1], QueryLedger(tmp_path / "l", 390))
    Trainer(max_epochs=3, **SILENT).fit(resumed, attack, ckpt_path=ckpt)
    for (x, y), (a, b) in zip(whole.trained[5:], resumed.trained, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    assert torch.equal(whole.network[1].weight, resumed.network[1].weight)
    assert sum(victim.asked for victim in victims) == attack.queries_spent == 30 + 3 * 120
    # held-out images were read once more, and so was the batch after the checkpoint
    assert attack.oracle.ledger.calls == 390 + 30 + 30


def test_budget_that_does_not_last_is_announced_and_stops_the_training():
    victim = Linear()
    attack = CompositeDataModule(Oracle(victim, ledger=QueryLedger(budget=110)), Source(), 60, 20)
    with (
        pytest.warns(
            UserWarning, match="2 epochs of 60 composites, and 30 held-out images, are more than the budget of 110"
        ),
        pytest.raises(BudgetExceededError, match="110 are spent, 20 new"),
    ):
        fit(attack)
    assert victim.asked == 110


# --- processes


@pytest.mark.parametrize("blends", [96, 101])
def test_two_processes_ask_each_composite_once(tmp_path, blends):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ledger = QueryLedger(tmp_path / "l", 30 + 2 * blends)
    attack = CompositeDataModule(Oracle(Linear(), ledger=ledger), Source(), blends, batch_size=16)
    Trainer(max_epochs=2, strategy="ddp_fork", devices=2, **SILENT).fit(Student(network), attack)
    # an odd one is trained on by both processes, and answered to one of them from the ledger
    assert ledger.totals() == Totals(30 + 2 * blends, 30 + 2 * (blends + blends % 2))


def test_processes_need_a_file_to_share():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    attack = CompositeDataModule(Oracle(Linear()), Source(), 32)
    trainer = Trainer(max_epochs=1, strategy="ddp_fork", devices=2, **SILENT)
    with pytest.raises(Exception, match="The 2 processes each ask about composites of their own"):
        trainer.fit(Student(network), attack)
    attack.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(MisconfigurationException, match="Give QueryLedger a path, or train with one process"):
        attack.setup("fit")


# --- bad input


class Single(Pool):
    """One image."""

    def images(self, data):
        return torch.zeros(1, 1, 4, 4), None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blends": 0}, "blends must be at least 1, got 0"),
        ({"blends": 65, "batch_size": 32}, "blends=65 leaves one composite for the last batch of 32"),
        ({"ratio": "beta"}, 'ratio must be "uniform" or "grid", got \'beta\''),
        ({"pool": Single()}, "pool has 1 images, 0 of them for validation, and a composite needs two others"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CompositeDataModule(Oracle(Linear()), Source(), **options).setup("fit")


def test_an_encoders_number_of_features_is_not_known_before_an_answer():
    attack = CompositeDataModule(Oracle(Linear(), Features()), Source(), validation_fraction=0.0)
    attack.setup("fit")
    assert attack.feature_dim is None
    attack = CompositeDataModule(Oracle(Linear(), Features()), Source())
    attack.setup("fit")
    assert attack.feature_dim == 4
