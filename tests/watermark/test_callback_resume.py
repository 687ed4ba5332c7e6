"""Checkpoints: a resumed training equals the uninterrupted one, and no checkpoint or log gives the key away."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from user_modules import (
    ALL_TERMS,
    KEY,
    SALT,
    SILENT,
    Images,
    UserModule,
    assert_same,
    callback,
    fit,
    loader,
    make,
    recorded_draws,
)

from meadef_lightning.watermark import MGDA, Fixed, LastLayerMGDA, SourcePool


class Interrupt(Callback):
    """Saves everything after a batch or an epoch, and stops there."""

    def __init__(self, path: Path, batch: int | None = None, epoch: int | None = None) -> None:
        self.path, self.batch, self.epoch = path, batch, epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            raise InterruptedError

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def module() -> UserModule:
    return make(UserModule, dropout=0.0)  # Lightning does not restore the global generator that dropout draws from


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": 0.5},
        {"start": 0.25, "stop": 0.75, "every_n_steps": 4},
        {"buffer_size": 3},
        {"tilt": 0.4},
        {"balancing": MGDA(every_n_steps=5)},
        {"balancing": LastLayerMGDA(every_n_steps=2), "start": 0.25, "every_n_steps": 3},
    ],
    ids=["always", "before the start", "window", "small pool", "tilt", "MGDA", "LastLayerMGDA"],
)
@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_equals_uninterrupted(tmp_path, options, epoch):
    whole, first, second = module(), module(), module()
    with recorded_draws() as draws:
        fit(whole, [callback(**options)], max_epochs=4)
    with recorded_draws() as again:
        with pytest.raises(InterruptedError):
            fit(first, [callback(**options), Interrupt(tmp_path / "last.ckpt", epoch=epoch)], max_epochs=4)
        fit(second, [callback(**options)], max_epochs=4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert_same(whole, second)
    assert len(draws) == len(again)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(draws, again, strict=True) for name in a)


def test_resumed_in_mid_epoch_equals_uninterrupted(tmp_path):
    """Lightning goes on with the next batch index but reads the data from the start, so a constant batch is used."""
    images = Images(size=8)
    data = torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([images] * 6), batch_size=8)
    whole, first, second = module(), module(), module()
    options = {"start": 0.25, "every_n_steps": 2}
    fit(whole, [callback(**options)], data)
    with pytest.raises(InterruptedError):
        fit(first, [callback(**options), Interrupt(tmp_path / "mid.ckpt", batch=8)], data)
    fit(second, [callback(**options)], data, ckpt_path=str(tmp_path / "mid.ckpt"))
    assert_same(whole, second)


def test_resumed_with_the_pool_of_the_owner(tmp_path):
    images = Images()
    samples = {label: images.x[images.y == label] for label in KEY.source_classes}
    modules = [module() for _ in range(3)]
    pools = [SourcePool.from_samples(samples) for _ in range(3)]
    fit(modules[0], [callback(pool=pools[0])])
    with pytest.raises(InterruptedError):
        fit(modules[1], [callback(pool=pools[1]), Interrupt(tmp_path / "p.ckpt", epoch=0)])
    fit(modules[2], [callback(pool=pools[2])], ckpt_path=str(tmp_path / "p.ckpt"))
    assert_same(modules[0], modules[2])


def test_the_checkpoint_of_modelcheckpoint_resumes_too(tmp_path):
    whole, second = module(), module()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, [callback(), saving], enable_checkpointing=True, max_epochs=3)
    fit(second, [callback()], max_epochs=3, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert_same(whole, second)


# ---- with and without the callback


def checkpoint(path: Path, **options: Any) -> Path:
    saving = ModelCheckpoint(path, filename="model")
    fit(module(), [callback(**options), saving], enable_checkpointing=True)
    return path / "model.ckpt"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_loads_without_the_callback(tmp_path):
    path = checkpoint(tmp_path)
    loaded = UserModule.load_from_checkpoint(path, dropout=0.0, weights_only=True)
    state = torch.load(path, weights_only=True)
    assert state["state_dict"].keys() == module().state_dict().keys()
    assert_same(loaded, state["state_dict"])
    resumed = module()
    fit(resumed, max_epochs=3, ckpt_path=str(path))
    assert not torch.equal(resumed.head.weight, loaded.head.weight)


def test_a_checkpoint_from_before_the_callback_can_be_gone_on_with(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="plain")
    fit(module(), [saving], enable_checkpointing=True)
    with recorded_draws() as draws:
        fit(module(), [callback(start=0.5)], max_epochs=4, ckpt_path=str(tmp_path / "plain.ckpt"))
    assert len(draws) == 12


def test_another_buffer_size_than_the_checkpoint_had_is_refused(tmp_path):
    path = checkpoint(tmp_path, buffer_size=4)
    with pytest.raises(ValueError, match="resume with the buffer_size"):
        fit(module(), [callback(buffer_size=5)], max_epochs=3, ckpt_path=str(path))


def test_another_number_of_processes_is_said_to_break_the_identity(tmp_path):
    path = checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    ranks = content["callbacks"]["WatermarkCallback"]["ranks"]
    ranks["1"] = ranks["0"]
    torch.save(content, path)
    with pytest.warns(UserWarning, match="written by 2 process"):
        fit(module(), [callback()], max_epochs=3, ckpt_path=str(path))


# ---- the key stays secret


def texts(value: Any) -> list[str]:
    """All names and values of a checkpoint that are not tensors."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (*texts(key), *texts(item))]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    return [] if isinstance(value, torch.Tensor) else [str(value)]


def test_no_checkpoint_and_no_log_holds_the_key(tmp_path):
    class Described(UserModule):
        def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
            super().__init__(dropout, lr)
            self.save_hyperparameters()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

    logger = CSVLogger(tmp_path, name="csv", version=0)
    saving = ModelCheckpoint(tmp_path, filename="model")
    flags = {**SILENT, "enable_checkpointing": True, "logger": logger}
    trainer = Trainer(max_epochs=2, log_every_n_steps=1, callbacks=[callback(), saving], **flags)
    trainer.fit(make(Described), loader(), loader())

    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"dropout": 0.0, "lr": 0.05}
    words = texts(content)
    assert not [word for word in words if SALT in word or "source_classes" in word or "target_class" in word]
    assert not [word for word in words if KEY.combiner.class_path in word]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SALT.encode() not in path.read_bytes(), path
            assert KEY.commitment().encode() not in path.read_bytes(), path
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        names = set(csv.DictReader(file).fieldnames or ())
    assert {name for name in names if name.startswith("watermark")} == {
        f"watermark/{name}" for name in ("loss", "ver", "com", "eva", "wsr", "wfpr")
    }
    assert (tmp_path / "csv" / "version_0" / "hparams.yaml").read_text().split() == ["dropout:", "0.0", "lr:", "0.05"]


def test_only_computed_terms_are_logged():
    trainer = fit(make(UserModule), [callback(balancing=Fixed(1.0, 0.0, 0.0))])
    assert {name for name in trainer.callback_metrics if name.startswith("watermark")} == {
        "watermark/loss",
        "watermark/ver",
    }
    trainer = fit(make(UserModule), [callback(balancing=ALL_TERMS)])
    values = {name: trainer.callback_metrics[f"watermark/{name}"].double() for name in ("loss", "ver", "com", "eva")}
    expected = sum(ALL_TERMS.weights[name] * values[name] for name in ("ver", "com", "eva"))
    torch.testing.assert_close(values["loss"], expected, rtol=1e-5, atol=1e-6)
