"""Data-free thefts: the estimate of gradients, what is asked and paid for, how a run ends and goes on."""

import copy
import logging
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.experiment.stage_directory import Stage
from meadef_lightning.experiment.training import fit
from meadef_lightning.experiment.weights import MODEL, load_weights
from meadef_lightning.extraction import Student
from meadef_lightning.extraction.datafree import (
    DataFreeDataModule,
)
from meadef_lightning.extraction.dfme import DFMEStudent
from meadef_lightning.extraction.maze import MAZEStudent
from meadef_lightning.extraction.pools import pixel_range
from meadef_lightning.oracle import HardLabel, Oracle, QueryLedger, Rounded, Soft, TopK, Totals

SMALL = {"latent": 8, "width": 4}


class Noise(SplitDataModule):
    """Grey noise of 8x8 in four classes, of which the thief sees nothing."""

    class_names = ("a", "b", "c", "d")
    image_shape = (1, 8, 8)

    def __init__(self):
        super().__init__(batch_size=50, victim_size=100, attacker_size=20, verification_size=20, validation_size=20)

    def load(self):
        images = torch.randint(256, (400, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return TensorImages(images[:200], torch.arange(200) % 4), TensorImages(images[200:], torch.arange(200) % 4)


class Linear(nn.Module):
    """A victim that counts the rows it is asked, and the pixels' extremes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 4, bias=False)
        with torch.no_grad():
            self.layer.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        self.asked, self.low, self.high = 0, 0.0, 0.0

    def forward(self, x):
        self.asked += len(x)
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        return self.layer(x.flatten(1))


class Small(nn.Module):
    """A student with everything that has a state: batch statistics and dropout."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * in_channels, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(16, num_classes),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def linear(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def steal(student, oracle, epochs=1, callbacks=(), ckpt_path=None, **options):
    attack = DataFreeDataModule(oracle, Noise(), **{"batch_size": 16, "iterations_per_epoch": 5, **options})
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **SILENT)
    trainer.fit(student, attack, ckpt_path=ckpt_path, weights_only=True)
    return trainer


ATTACKS = [
    (lambda network=Small, **o: DFMEStudent(network, **{**SMALL, "student_steps": 3, **o}), 16 * (2 + 3)),
    (
        lambda network=Small, **o: MAZEStudent(
            network,
            **{**SMALL, "directions": 4, "generator_steps": 2, "student_steps": 3, "replay_steps": 2, "replay_size": 40, **o},
        ),
        16 * (2 * 5 + 3),
    ),
]  # fmt: skip
each_attack = pytest.mark.parametrize(("make", "cost"), ATTACKS, ids=["dfme", "maze"])


# --- what is asked


def test_the_estimate_leaves_parts_in_eval_mode_as_they_are():
    class Watching(Callback):
        modes: ClassVar = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.modes.append([part.training for part in pl_module.network.layers])
            pl_module.network.layers[2].eval()

    steal(DFMEStudent(Small, **SMALL), Oracle(Linear()), callbacks=[Watching()])
    assert Watching.modes[1:] == [[True, True, False, True, True, True]] * 4


@each_attack
@pytest.mark.parametrize("policy", [Soft(), TopK(2), Rounded(2)], ids=["soft", "top", "rounded"])
def test_queries_are_those_of_the_formula(make, cost, policy):
    victim, student = Linear(), make()
    oracle = Oracle(victim, policy)
    if isinstance(policy, Soft):
        trainer = steal(student, oracle, epochs=2)
    else:
        with pytest.warns(UserWarning, match="truncated or rounded"):
            trainer = steal(student, oracle, epochs=2)
    assert student.queries_per_iteration(16) == cost
    assert oracle.ledger.totals() == Totals(10 * cost, 10 * cost)
    assert victim.asked == trainer.callback_metrics["queries"] == 10 * cost
    assert trainer.callback_metrics["iterations"] == student.iterations == 10
    low, high = (float(edge) for edge in pixel_range(trainer.datamodule.data))
    assert low <= victim.low < -0.3
    assert 0.3 < victim.high <= high
    summary = trainer.datamodule.query_summary()
    assert summary["queries"] == summary["distinct"] == trainer.datamodule.queries_spent == 10 * cost
    assert {"train_loss", "generator_loss"} <= trainer.progress_bar_metrics.keys()
    assert all(p.isfinite().all() for p in student.parameters())
    assert "test_accuracy" in trainer.test(student, trainer.datamodule, verbose=False)[0]


@each_attack
@pytest.mark.parametrize("whole", [3, 5])  # within an epoch, and at its end
def test_budget_ends_training_after_whole_iterations(make, cost, whole, caplog):
    victim, student = Linear(), make()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer = steal(student, Oracle(victim, ledger=QueryLedger(budget=(whole + 1) * cost - 1)), epochs=100)
    assert victim.asked == whole * cost
    assert (
        f"ends the theft after {whole} iterations: {cost - 1} are left, and the next iteration costs {cost}"
        in caplog.text
    )
    assert trainer.should_stop
    assert student.planned_iterations() == whole
    assert trainer.callback_metrics["iterations"] == whole


@each_attack
def test_killed_run_begins_again_without_paying_again(make, cost, tmp_path):
    class KilledError(Exception):
        pass

    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                victim.layer.register_forward_pre_hook(self.kill)

        def kill(self, *_):  # in the middle of an iteration: its second query
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                raise KilledError

    def ledger():
        return QueryLedger(tmp_path / "queries.sqlite", budget=5 * cost)

    torch.manual_seed(0)
    initial, victim = make(), Linear()
    initial.build_network(4, 1)
    seed_everything(0, verbose=False)
    with pytest.raises(KilledError):
        steal(copy.deepcopy(initial), Oracle(victim, ledger=ledger()), epochs=9, callbacks=[Kill()])
    paid = ledger().distinct
    assert 3 * cost < paid < 4 * cost
    victim, again, other = Linear(), copy.deepcopy(initial), Linear()
    seed_everything(0, verbose=False)
    steal(again, Oracle(victim, ledger=ledger()), epochs=9)
    assert victim.asked == 5 * cost - paid
    assert ledger().distinct == 5 * cost
    assert again.iterations == 5
    seed_everything(0, verbose=False)
    steal(initial, Oracle(other, ledger=QueryLedger(budget=5 * cost)), epochs=9)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), initial.parameters(), strict=True))


# --- checkpoints


@each_attack
def test_resumed_run_equals_uninterrupted_one_and_pays_nothing(make, cost, tmp_path):
    class Saving(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if module.iterations == 7:  # in the middle of the second epoch
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def run(ckpt_path=None, seed=0):
        seed_everything(seed, verbose=False)
        victim, student = Linear(), make()
        oracle = Oracle(victim, ledger=QueryLedger(tmp_path / "l", budget=15 * cost))
        callbacks = [] if ckpt_path else [Saving()]
        trainer = steal(student, oracle, epochs=3, callbacks=callbacks, ckpt_path=ckpt_path)
        return student, victim.asked, trainer

    whole, asked, _ = run()
    resumed, more, trainer = run(tmp_path / "half.ckpt", seed=1)  # other initial weights, another global state
    assert (asked, more, resumed.iterations, trainer.current_epoch) == (15 * cost, 0, 15, 3)
    for a, b in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1]), a[0]


@each_attack
def test_checkpoint_holds_the_student_alone(make, cost, tmp_path):
    student = make()
    trainer = steal(student, Oracle(Linear()))
    x = torch.randn(6, 1, 8, 8)
    for weights_only in (True, False):
        path = tmp_path / f"{weights_only}.ckpt"
        trainer.save_checkpoint(path, weights_only=weights_only)
        content = torch.load(path, weights_only=True)
        assert not any(name.startswith("generator.") for name in content["state_dict"])
        assert ("data_free" in content) is not weights_only
        fresh = load_weights(make(), trainer.datamodule.data, path)
        with torch.no_grad():
            assert torch.equal(fresh(x), student.eval()(x))
        for module in (make(), student):  # without and with a generator
            Trainer(**SILENT).test(module, trainer.datamodule, ckpt_path=path, weights_only=True, verbose=False)
            with torch.no_grad():
                assert torch.equal(module.eval()(x), fresh(x))


@each_attack
def test_stage_of_an_experiment(make, cost, tmp_path):
    oracle = Oracle(Linear(), ledger=QueryLedger(tmp_path / "queries.sqlite", budget=3 * cost + 1))
    attack = DataFreeDataModule(oracle, Noise(), batch_size=16, iterations_per_epoch=2)
    options = {"max_epochs": 50, "accelerator": "cpu", "enable_progress_bar": False}
    with Stage(tmp_path / "stage", "theft", {}) as stage:
        metrics = fit(stage, make(), attack, options, 0, {"class_path": "x"})
        assert (metrics["iterations"], metrics["queries"]) == (3, 3 * cost)
        load_weights(make(), attack.data, tmp_path / "stage" / MODEL)
        assert 0 <= metrics["test_accuracy"] <= 1


def test_randomness_is_of_seed_and_iteration():
    def run(seed, global_seed):
        torch.manual_seed(0)
        student = DFMEStudent(Small(4, 1), **SMALL)

        class Reseed(Callback):
            def on_train_start(self, *_):
                torch.manual_seed(global_seed)

            def on_train_end(self, *_):
                self.after = torch.random.get_rng_state()

        reseed, state = Reseed(), torch.Generator().manual_seed(global_seed).get_state()
        steal(student, Oracle(Linear()), seed=seed, callbacks=[reseed])
        assert torch.equal(reseed.after, state)
        return student.network.layers[1].weight

    first, again, other = run(0, 1), run(0, 2), run(1, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- refusals


@each_attack
def test_classes_are_refused_before_anything_is_asked(make, cost):
    victim = Linear()
    with pytest.raises(
        MisconfigurationException, match=r"needs probabilities, but the oracle gives hard answers\. A class"
    ):
        steal(make(), Oracle(victim, HardLabel()))
    assert victim.asked == 0


def test_other_refusals():
    oracle, data = Oracle(Linear()), Noise()
    attack = DataFreeDataModule(oracle, data, batch_size=16)
    make = ATTACKS[0][0]
    with pytest.raises(MisconfigurationException, match="has no data to train a Student on"):
        Trainer(max_epochs=1, **SILENT).fit(Student(linear), attack)
    with pytest.raises(MisconfigurationException, match=r"max_epochs=-1 and max_steps=7"):
        Trainer(max_steps=7, **SILENT).fit(make(), attack)
    with pytest.raises(MisconfigurationException, match="precision='bf16-true' cannot hold"):
        Trainer(max_epochs=1, precision="bf16-true", **SILENT).fit(make(), attack)
    with pytest.raises(
        MisconfigurationException, match="asks the oracle of a DataFreeDataModule, but is run with Noise"
    ):
        Trainer(max_epochs=1, **SILENT).fit(make(), data)
    with pytest.raises(MisconfigurationException, match="One iteration costs 80 queries, and the budget is 79"):
        steal(make(), Oracle(Linear(), ledger=QueryLedger(budget=79)))
    with pytest.raises(ValueError, match="iterations_per_epoch must be at least 1, got 0"):
        DataFreeDataModule(oracle, data, iterations_per_epoch=0)
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        make(directions=0)
    with pytest.raises(ValueError, match=r"epsilon must be positive and finite, got 0\.0"):
        make(epsilon=0.0)
    with pytest.raises(RuntimeError, match="collects nothing"):
        attack.collect()
    assert oracle.ledger.calls == 0
