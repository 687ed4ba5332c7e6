"""When the watermark is embedded, step by step, and that nothing at all is touched while it is not."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset
from user_modules import (
    Images,
    UserModule,
    assert_equals_twin,
    assert_same,
    callback,
    fit,
    make,
    recorded_draws,
    weights,
)

from meadef_lightning.watermark.schedule import Schedule


@pytest.mark.parametrize(
    ("schedule", "flags", "steps"),
    [
        # six batches an epoch
        ({}, {"max_epochs": 2}, range(12)),
        ({"start": 0.5}, {"max_epochs": 2}, range(6, 12)),
        ({"start": 0.25, "stop": 0.5}, {"max_epochs": 2}, range(3, 6)),
        ({"start": 0.3}, {"max_epochs": 2}, range(4, 12)),
        ({"stop": 0.5}, {"max_epochs": 2}, range(6)),
        ({"every_n_steps": 4}, {"max_epochs": 3}, [0, 4, 8, 12, 16]),
        ({"start": 0.5, "every_n_steps": 4}, {"max_epochs": 3}, [12, 16]),
        ({"every_n_steps": 100}, {"max_epochs": 2}, [0]),
        ({"start": 0.5}, {"max_steps": 10}, range(5, 10)),
        ({"start": 0.5}, {"max_steps": 9}, range(5, 9)),
        ({"start": 0.5}, {"max_steps": 8, "max_epochs": 3}, range(4, 8)),
        ({"start": 0.5}, {"max_steps": 100, "max_epochs": 2}, range(6, 12)),
        ({"start": 0.5}, {"max_epochs": 4, "limit_train_batches": 3}, range(6, 12)),
        # counted in optimiser steps and in batches
        ({"start": 0.5}, {"max_steps": 4, "accumulate_grad_batches": 3}, range(6, 12)),
        ({"start": 0.5, "every_n_steps": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, [6, 8, 10]),
    ],
    ids=str,
)
def test_exact_steps(schedule, flags, steps):
    assert_equals_twin(UserModule, schedule, steps=list(steps), **flags)


class Stream(IterableDataset):
    """Data of unknown length."""

    def __iter__(self):
        return iter(Images())


def test_data_without_a_length_starts_with_an_epoch():
    assert_equals_twin(UserModule, {"start": 0.5}, range(12, 24), lambda: DataLoader(Stream(), 8), max_epochs=4)
    assert_equals_twin(UserModule, {"start": 0.5}, range(4, 8), lambda: DataLoader(Stream(), 8), max_steps=8)


def test_data_without_a_length_in_a_single_epoch_is_refused():
    with pytest.raises(MisconfigurationException, match=r"no length to tell.*Set max_steps"):
        fit(make(UserModule), [callback(start=0.5)], DataLoader(Stream(), 8), max_epochs=1)
    fit(make(UserModule), [callback(start=0.0)], DataLoader(Stream(), 8), max_epochs=1)


class Snapshot(Callback):
    """Keeps everything that could differ when the training reaches a batch."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.weights, self.rng = weights(pl_module), torch.get_rng_state()
            self.momentum = [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()]


def test_before_the_start_nothing_differs_from_training_without_us():
    ours, plain = Snapshot(6), Snapshot(6)
    fit(make(UserModule), [callback(start=0.5), ours])
    fit(make(UserModule), [plain])
    assert_same(ours.weights, plain.weights)
    assert torch.equal(ours.rng, plain.rng)
    assert all(torch.equal(a, b) for a, b in zip(ours.momentum, plain.momentum, strict=True))


def test_between_and_after_the_watermarked_steps_no_random_number_is_drawn():
    """The global generator moves by the dropout of one extra forward per watermarked step, and only by that."""
    states = {}
    for stride in (1, 3, 100):
        after = Snapshot(11)
        fit(make(UserModule), [callback(every_n_steps=stride), after])
        states[stride] = after.rng
    module = make(UserModule)
    snapshot = Snapshot(11)
    fit(module, [callback(start=0.9), snapshot])
    plain = Snapshot(11)
    fit(make(UserModule), [plain])
    assert torch.equal(snapshot.rng, plain.rng)
    assert not torch.equal(states[1], states[3])
    assert not torch.equal(states[3], states[100])


def test_a_watermark_whose_turn_never_came_is_reported():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with recorded_draws() as draws, pytest.warns(UserWarning, match=r"without a single watermarked step.*start=0\b"):
        fit(make(UserModule), [callback(start=0.5), Stop()], max_epochs=4)
    assert not draws


def test_early_stopping_after_the_start_is_no_reason_to_warn(recwarn):
    class Logging(UserModule):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

    trainer = fit(make(Logging), [callback(), EarlyStopping("loss", divergence_threshold=-1.0)], max_epochs=4)
    assert trainer.current_epoch < 4
    assert not [w for w in recwarn if "watermarked step" in str(w.message)]


@pytest.mark.parametrize(
    "window", [{"start": -0.1}, {"start": 1.0}, {"stop": 0.0}, {"start": 0.5, "stop": 0.5}, {"stop": 1.5}]
)
def test_a_window_outside_the_training_is_refused(window):
    with pytest.raises(MisconfigurationException, match="0 <= start < stop <= 1"):
        callback(**window)
    with pytest.raises(MisconfigurationException, match="0 <= start < stop <= 1"):
        Schedule(**{"start": 0.0, **window})


def test_a_stride_below_one_is_refused():
    with pytest.raises(MisconfigurationException, match="every_n_steps=0 must be at least 1"):
        callback(every_n_steps=0)


@pytest.mark.filterwarnings("ignore:.*max_epochs")
@pytest.mark.parametrize("window", [{"start": 0.5}, {"start": 0.0, "stop": 0.9}])
def test_a_share_of_a_training_without_end_is_refused(window):
    with pytest.raises(MisconfigurationException, match=r"no end\. Set max_epochs or max_steps, or start=0 and stop=1"):
        fit(make(UserModule), [callback(**window)], max_epochs=-1, max_time="00:00:00:05")


@pytest.mark.filterwarnings("ignore:.*max_epochs")
def test_a_training_without_end_can_be_watermarked_throughout():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 7

    assert_equals_twin(UserModule, companions=lambda: [Stop()], steps=range(8), max_epochs=-1)
