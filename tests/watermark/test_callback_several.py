"""Several keys in one model: a callback each, which add their terms, log, resume and leave as if they were alone."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from user_modules import (
    BATCH,
    CLASSES,
    KEY,
    SILENT,
    UserModule,
    assert_clean,
    assert_same,
    callback,
    fit,
    loader,
    make,
    recorded_draws,
    written_term,
)

from meadef_lightning.watermark import Fixed, WatermarkCallback, WatermarkKey

SECOND = WatermarkKey(
    source_classes=(0, 2), target_class=4, num_classes=CLASSES, seed=8
)  # written_term knows one target


def second(**options) -> WatermarkCallback:
    given = {"start": 0.0, "samples": 3, "balancing": Fixed(0.5, 0.0, 0.25), "batchnorm": "running", "tilt": 0.0}
    return WatermarkCallback(SECOND, **{**given, **options}).named("second")


class Twin(UserModule):
    """Adds both terms by hand; the callbacks draw in turn."""

    def training_step(self, batch, batch_idx):
        loss, step = super().training_step(batch, batch_idx), self.trainer.fit_loop.total_batch_idx
        loss = loss + written_term(self, self, self.draws[2 * step], {"ver": 1.0, "com": 0.5, "eva": 0.75})
        return loss + written_term(self, self, self.draws[2 * step + 1], {"ver": 0.5, "eva": 0.25})


def test_both_terms_are_added():
    module, twin = make(UserModule, dropout=0.0), make(Twin, dropout=0.0)
    with recorded_draws() as draws:
        fit(module, [callback(), second()])
    assert [len(draw["watermark"]) for draw in draws] == [4, 3] * 12
    twin.draws = draws
    fit(twin)
    assert_same(module, twin)


@pytest.mark.parametrize("order", [1, -1])
def test_the_module_is_its_own_again_whoever_leaves_first(order):
    module = make(UserModule)
    fit(module, [callback(), second()][::order])
    assert_clean(module)
    assert module.training_step.__func__ is UserModule.training_step

    class Failing(Callback):
        def on_train_batch_end(self, *args):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(module, [callback(), second(), Failing()][::order])
    assert_clean(module)
    pickle.dumps(module)


def test_an_instances_own_step_comes_back():
    module = make(UserModule)
    module.training_step = own = lambda batch, batch_idx: module.loss(batch)
    fit(module, [callback(), second()])
    assert module.training_step is own


def test_each_logs_under_its_name():
    class Validated(UserModule):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch), batch_size=BATCH)

    def rates(*callbacks):
        trainer = Trainer(callbacks=list(callbacks), **SILENT)
        trainer.validate(make(Validated), loader(), verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name != "val_loss"}

    assert rates(callback(), second()) == {**rates(callback()), **rates(second())}
    names = set(fit(make(UserModule), [callback(), second()]).callback_metrics)
    assert names == {f"watermark/{n}" for n in ("loss", "ver", "com", "eva")} | {
        f"second/{n}" for n in ("loss", "ver", "eva")
    }


class Stop(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.parametrize("frozen", [False, True])
def test_resumed_equals_uninterrupted(tmp_path, frozen):
    """The second begins later; both keep BatchNorm as it is, or neither does."""
    options = {"batchnorm": "frozen", "start": 0.25} if frozen else {}
    whole, first, rest = (make(UserModule, dropout=0.0) for _ in range(3))

    def both():
        return [callback(**options), second(**{**options, "start": 0.6})]

    fit(whole, both(), max_epochs=4)
    with pytest.raises(InterruptedError):
        fit(first, [*both(), Stop(tmp_path / "last.ckpt")], max_epochs=4)
    assert set(torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]) == {
        "WatermarkCallback",
        "WatermarkCallback{'name': 'second'}",
    }
    fit(rest, both(), max_epochs=4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert_same(whole, rest)
    assert rest.body[1].training


def test_a_checkpoint_of_another_key_is_refused(tmp_path):
    with pytest.raises(InterruptedError):
        fit(make(UserModule), [callback(), Stop(tmp_path / "last.ckpt")], max_epochs=3)
    module = make(UserModule)
    with pytest.raises(ValueError, match="another key was embedded"):
        fit(module, [WatermarkCallback(SECOND)], max_epochs=3, ckpt_path=str(tmp_path / "last.ckpt"))
    assert_clean(module)


def test_two_of_one_name_are_refused_by_lightning():
    for names in itertools.product(("watermark", "second"), repeat=2):
        callbacks = [WatermarkCallback(KEY).named(name) for name in names]
        if len(set(names)) == 2:
            Trainer(callbacks=callbacks, **SILENT)
            continue
        with pytest.raises(RuntimeError, match="state_key` must be unique"):
            Trainer(callbacks=callbacks, **SILENT)
    with pytest.raises(ValueError, match="must not be empty"):
        WatermarkCallback(KEY).named("")
