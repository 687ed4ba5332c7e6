"""What is left on a module: after fit, after errors, in copies and pickles, and beside other people's wrappers."""

from __future__ import annotations

import copy
import pickle
import signal
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from user_modules import (
    BATCH,
    KEY,
    PER_EPOCH,
    SILENT,
    Images,
    UserModule,
    assert_clean,
    assert_equals_twin,
    assert_same,
    callback,
    fit,
    loader,
    make,
    recorded_draws,
    with_term,
)

from meadef_lightning.watermark import MGDA, WatermarkCallback


def is_plain(module: UserModule) -> bool:
    """Whether ``training_step`` is the class's own."""
    return module.training_step.__func__ is type(module).training_step


def test_the_module_is_its_own_again_after_fit():
    module, plain = make(UserModule), make(UserModule)
    fit(module, [callback()])
    fit(plain)
    assert is_plain(module)
    assert set(vars(module)) == set(vars(plain))
    assert dict(module.named_modules()).keys() == dict(plain.named_modules()).keys()


@pytest.mark.parametrize("again", ["same callback", "new callback"])
def test_a_second_fit_adds_the_term_once(again):
    twin = make(with_term(UserModule))
    module, ours = make(UserModule), callback()
    with recorded_draws() as draws:
        fit(module, [ours])
        fit(module, [ours if again == "same callback" else callback()])
    twin.plan = dict(enumerate(draws[:12]))
    fit(twin)
    twin.plan = dict(enumerate(draws[12:]))
    fit(twin)
    assert_same(module, twin)


def test_the_same_trainer_can_go_on():
    module, trainer = make(UserModule), Trainer(max_epochs=1, callbacks=[callback()], **SILENT)
    with recorded_draws() as draws:
        trainer.fit(module, loader())
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader())
    assert len(draws) == 2 * PER_EPOCH
    assert is_plain(module)


def test_a_callback_carries_nothing_from_one_module_to_the_next():
    """With MGDA, whose kept weights and counter would show."""
    ours = callback(balancing=MGDA(every_n_steps=5))
    first, second = make(UserModule), make(UserModule)
    fit(first, [ours])
    fit(second, [ours])
    assert_same(first, second)


def breaking(hook: str, error: BaseException) -> Callback:
    """A callback whose ``hook`` raises."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    other = Callback()
    setattr(other, hook, broken)
    return other


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_before_backward"]
)
def test_after_an_error_the_module_is_clean(hook):
    module = make(UserModule)
    with pytest.raises(ZeroDivisionError):
        fit(module, [callback(), breaking(hook, ZeroDivisionError())])
    assert is_plain(module)
    reference = make(UserModule)
    module.load_state_dict(reference.state_dict())
    fit(module)
    fit(reference)
    assert_same(module, reference)


def test_after_ctrl_c_the_module_is_clean():
    module = make(UserModule)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(module, [callback(), breaking("on_train_batch_end", KeyboardInterrupt())])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further Ctrl-C while it shuts down
    assert is_plain(module)


def test_after_an_error_in_the_step_a_repeated_fit_equals_the_twin():
    class Fragile(UserModule):
        fail = True

        def training_step(self, batch, batch_idx):
            if self.fail and batch_idx == 2:
                raise ZeroDivisionError
            return self.loss(batch)

    module, ours, start = make(Fragile), callback(), make(Fragile).state_dict()
    with pytest.raises(ZeroDivisionError):
        fit(module, [ours])
    module.load_state_dict(start)
    module.fail = False
    with recorded_draws() as draws:
        fit(module, [ours])
    twin = make(with_term(UserModule))
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)


# ---- copies in the middle of training


class Copying(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == 5:
            self.copied = copy.deepcopy(pl_module)
            self.pickled = pickle.dumps(pl_module)
            self.callback = pickle.dumps(trainer.callbacks[0])
            self.callback_copy = copy.deepcopy(trainer.callbacks[0])


def test_copies_made_in_mid_training_train_plainly():
    module, copying = make(UserModule), Copying()
    fit(module, [callback(), copying])
    unpickled, reference = pickle.loads(copying.pickled), make(UserModule)  # noqa: S301
    reference.load_state_dict(copying.copied.state_dict())
    assert_same(copying.copied, unpickled)
    assert is_plain(unpickled)
    for other in (copying.copied, unpickled, reference):
        fit(other)
    assert_same(copying.copied, reference)
    assert_same(unpickled, reference)
    assert_same(module, assert_equals_twin(UserModule))  # and the original was not disturbed


def test_a_copy_that_is_run_while_the_original_trains_has_its_plain_loss():
    class Comparing(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            loss = copy.deepcopy(pl_module).training_step(batch, batch_idx)
            assert torch.equal(loss, pl_module.loss(batch))
            self.compared = True

    comparing = Comparing()
    fit(make(UserModule, dropout=0.0), [callback(), comparing])
    assert comparing.compared


def test_a_copy_of_the_module_can_be_watermarked_with_the_same_callback():
    ours, copying = callback(), Copying()
    fit(make(UserModule), [ours, copying])
    module, twin = copying.copied, make(with_term(UserModule))
    twin.load_state_dict(module.state_dict())
    with recorded_draws() as draws:
        fit(module, [ours])
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)


@pytest.mark.parametrize("kind", ["fresh", "used", "pickled in mid-training", "copied in mid-training"])
def test_copies_of_the_callback_work(kind):
    ours, copying = callback(), Copying()
    if kind != "fresh":
        fit(make(UserModule), [ours, copying])
    other = {
        "fresh": lambda: pickle.loads(pickle.dumps(ours)),  # noqa: S301
        "used": lambda: pickle.loads(pickle.dumps(ours)),  # noqa: S301
        "pickled in mid-training": lambda: pickle.loads(copying.callback),  # noqa: S301
        "copied in mid-training": lambda: copying.callback_copy,
    }[kind]()
    module = make(UserModule)
    fit(module, [other])
    assert is_plain(module)
    assert_same(module, assert_equals_twin(UserModule))


# ---- other people's wrappers


def test_a_step_replaced_in_the_modules_own_setup_is_wrapped_again():
    class Replacing(UserModule):
        def setup(self, stage):
            self.training_step = self.another_step

        def another_step(self, batch, batch_idx):
            return 2 * self.loss(batch)

    class Twin(UserModule):
        def training_step(self, batch, batch_idx):
            return 2 * self.loss(batch)

    module, twin = make(Replacing), make(with_term(Twin))
    with recorded_draws() as draws:
        fit(module, [callback()])
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)
    assert module.training_step.__func__ is Replacing.another_step


def test_a_setup_that_wraps_our_wrapper_gets_the_term_once():
    """The module doubles whatever its step was; the outermost wrapper adds the term, so it is not doubled."""

    class Wrapping(UserModule):
        def setup(self, stage):
            step = self.training_step
            self.training_step = lambda batch, batch_idx: 2 * step(batch, batch_idx)

    class Twin(UserModule):
        def training_step(self, batch, batch_idx):
            return 2 * self.loss(batch)

    module, twin = make(Wrapping), make(with_term(Twin))
    with recorded_draws() as draws:
        fit(module, [callback()])
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)


def test_a_module_that_switches_to_manual_optimisation_in_setup_is_noticed():
    class Late(UserModule):
        def setup(self, stage):
            self.automatic_optimization = False

    module = make(Late)
    with pytest.raises(MisconfigurationException, match="manual_optimization=True"):
        fit(module, [callback()])
    assert_clean(module)


def test_validation_that_runs_training_step_is_not_watermarked():
    class Reusing(UserModule):
        def __init__(self):
            super().__init__()
            self.losses = []

        def validation_step(self, batch, batch_idx):
            self.losses.append(float(self.training_step(batch, batch_idx)))

    def train(callbacks):
        module = make(Reusing)
        trainer = Trainer(max_epochs=2, val_check_interval=2, num_sanity_val_steps=0, callbacks=callbacks, **SILENT)
        trainer.fit(module, loader(), loader())
        return module

    with recorded_draws() as draws:
        module = train([callback(stop=0.01)])
    assert len(draws) == 1
    fresh = Reusing()
    fresh.load_state_dict(module.state_dict())
    trainer = Trainer(callbacks=[callback()], **SILENT)
    trainer.validate(fresh, loader(), verbose=False)
    assert module.losses[-PER_EPOCH:] == fresh.losses

    with recorded_draws() as draws:
        module = train([callback()])
    assert len(draws) == 2 * PER_EPOCH
    fresh.losses.clear()
    fresh.load_state_dict(module.state_dict())
    trainer.validate(fresh, loader(), verbose=False)
    assert module.losses[-PER_EPOCH:] == fresh.losses


def test_pytorch_lightning_accepts_the_callback():
    pl = pytest.importorskip("pytorch_lightning")

    class Foreign(pl.LightningModule):
        __init__, forward, loss = UserModule.__init__, UserModule.forward, UserModule.loss
        training_step, configure_optimizers = UserModule.training_step, UserModule.configure_optimizers

    def build():
        torch.manual_seed(0)
        module = Foreign.__new__(Foreign)
        pl.LightningModule.__init__(module)
        source = make(UserModule)
        module.lr, module.body, module.head = source.lr, source.body, source.head
        return module

    def train(callbacks):
        module = build()
        trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **SILENT)
        torch.manual_seed(1)
        trainer.fit(module, loader())
        return module

    module = train([callback(start=0.5)])
    assert_same(module, assert_equals_twin(UserModule, {"start": 0.5}, steps=range(6, 12)))
    assert is_plain(module)


def test_the_key_can_be_a_file(tmp_path):
    module = make(UserModule)
    fit(module, [WatermarkCallback(str(KEY.save(tmp_path / "key.json")), start=0.0, samples=4, batchnorm="running")])
    other = make(UserModule)
    fit(other, [WatermarkCallback(KEY, start=0.0, samples=4, batchnorm="running")])
    assert_same(module, other)


def test_a_batch_that_brings_no_source_sample_is_survived():
    """The pool of an earlier batch serves; before both classes were seen, nothing is embedded."""
    images = Images()
    order = torch.argsort(images.y, stable=True)  # classes one after another: 1 from batch 1, 3 from batch 3 on

    class Sorted(Images):
        def __getitem__(self, index):
            return images.x[order[index]], images.y[order[index]]

    first = int((images.y[order] == 3).nonzero()[0]) // BATCH
    data = torch.utils.data.DataLoader(Sorted(), BATCH)
    assert_equals_twin(UserModule, data=lambda: data, steps=range(first, 12))
