"""``watermark/wsr`` and ``watermark/wfpr`` on validation data, against the same rates computed by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from user_modules import (
    BATCH,
    CLASSES,
    KEY,
    SILENT,
    Images,
    UserModule,
    assert_same,
    callback,
    fit,
    loader,
    make,
    weights,
)

from meadef_lightning.watermark import Fixed, SourcePool


class Validated(UserModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch), batch_size=BATCH)


def validation_images() -> Images:
    """Other images than the training's, in number no multiple of anything."""
    images = Images(size=43)
    images.x = images.x.flip(-1) * 0.9
    return images


def validation_loader() -> DataLoader:
    return DataLoader(validation_images(), BATCH)


def last_of(samples: torch.Tensor, capacity: int) -> list[torch.Tensor]:
    """A ring of ``capacity`` slots, written one sample after another."""
    ring: list[torch.Tensor] = []
    for n, sample in enumerate(samples):
        if n < capacity:
            ring.append(sample)
        else:
            ring[n % capacity] = sample
    return ring


def rates_by_hand(module: UserModule, a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """One pair after another."""
    own, others = KEY.combiner.build(), [spec.build() for spec in KEY.control_combiners()]
    hits = {"own": 0, "other": 0}
    count = max(len(a), len(b))
    module.eval()
    with torch.no_grad():
        for i in range(count):
            pair = a[i % len(a)][None], b[i % len(b)][None]
            hits["own"] += int(module(own(*pair)).argmax()) == KEY.target_class
            hits["other"] += int(module(others[i % len(others)](*pair)).argmax()) == KEY.target_class
    return hits["own"] / count, hits["other"] / count


def logged(trainer: Trainer) -> tuple[float, float]:
    return float(trainer.callback_metrics["watermark/wsr"]), float(trainer.callback_metrics["watermark/wfpr"])


def train(options: dict, val=None, callbacks=(), **flags):
    module = make(Validated)
    flags = {**SILENT, "max_epochs": 4, **flags}
    trainer = Trainer(callbacks=[callback(**options), *callbacks], **flags)
    torch.manual_seed(1)
    trainer.fit(module, loader(), val if val is not None else validation_loader())
    return module, trainer


@pytest.mark.parametrize("capacity", [128, 5])
def test_rates_equal_those_computed_by_hand(capacity):
    module, trainer = train({"buffer_size": capacity, "samples": 8})
    images = validation_images()
    a, b = (last_of(images.x[images.y == label], capacity) for label in KEY.source_classes)
    wsr, wfpr = rates_by_hand(module, a, b)
    assert logged(trainer) == pytest.approx((wsr, wfpr), abs=1e-6)
    assert wsr > 0  # the numbers say something
    assert wsr != wfpr


@pytest.mark.filterwarnings("ignore:The training ended without a single watermarked step")
def test_rates_before_the_start_are_those_of_an_innocent_model():
    module, trainer = train({"start": 0.9}, max_epochs=1, limit_train_batches=2)
    images = validation_images()
    assert logged(trainer) == pytest.approx(rates_by_hand(module, *(list(images.x[images.y == c]) for c in (1, 3))))


def test_rates_of_a_given_pool():
    images = Images()
    samples = {label: images.x[images.y == label][:6] for label in KEY.source_classes}
    module, trainer = train({"pool": SourcePool.from_samples(samples)})
    assert logged(trainer) == pytest.approx(rates_by_hand(module, *map(list, samples.values())), abs=1e-6)


def test_only_the_first_validation_loader_is_used():
    other = DataLoader(Images(size=5), BATCH)
    module, trainer = train({}, [validation_loader(), other])
    images = validation_images()
    assert logged(trainer) == pytest.approx(rates_by_hand(module, *(list(images.x[images.y == c]) for c in (1, 3))))


def test_trainer_validate_measures_a_finished_model():
    module, trained = train({})
    trainer = Trainer(callbacks=[callback()], **SILENT)
    (metrics,) = trainer.validate(module, validation_loader(), verbose=False)
    assert (metrics["watermark/wsr"], metrics["watermark/wfpr"]) == pytest.approx(logged(trained))


def test_validation_runs_in_the_precision_of_the_training():
    """Also where forward outside autocast would fail: the module insists on it."""

    class Strict(Validated):
        def forward(self, x):
            assert torch.is_autocast_enabled("cpu")
            return super().forward(x)

    trainer = Trainer(max_epochs=1, precision="bf16-mixed", callbacks=[callback()], **SILENT)
    trainer.fit(make(Strict), loader(), validation_loader())
    assert "watermark/wsr" in trainer.callback_metrics

    trainer = Trainer(max_epochs=1, precision="bf16-true", callbacks=[callback()], **SILENT)
    trainer.fit(make(Validated), loader(), validation_loader())
    assert "watermark/wsr" in trainer.callback_metrics


def test_a_space_of_one_way_has_no_false_positive_rate():
    from meadef_lightning.watermark import CombinerSpec, WatermarkCallback, WatermarkKey

    blend = CombinerSpec("meadef_lightning.watermark.combiners.PixelBlend")
    key = WatermarkKey((1, 3), 4, CLASSES, combiner=blend, space=(blend,))
    trainer = Trainer(
        max_epochs=1, callbacks=[WatermarkCallback(key, start=0.0, samples=4, batchnorm="running")], **SILENT
    )
    trainer.fit(make(Validated), loader(), validation_loader())
    assert "watermark/wsr" in trainer.callback_metrics
    assert "watermark/wfpr" not in trainer.callback_metrics


# ---- what validation leaves alone


class Snapshot(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == 6:
            self.weights, self.rng = weights(pl_module), torch.get_rng_state()


def test_measuring_changes_no_weights_statistics_or_random_numbers():
    def run(callbacks):
        snapshot = Snapshot()
        trainer = Trainer(max_epochs=2, val_check_interval=2, callbacks=[*callbacks, snapshot], **SILENT)
        module = make(Validated)
        torch.manual_seed(1)
        trainer.fit(module, loader(), validation_loader())
        return snapshot

    ours, plain = run([callback(start=0.5)]), run([])
    assert_same(ours.weights, plain.weights)
    assert torch.equal(ours.rng, plain.rng)


def test_nothing_is_logged_by_the_sanity_check():
    class AfterSanity(Callback):
        def on_train_start(self, trainer, pl_module):
            self.names = {name for name in trainer.callback_metrics if name.startswith("watermark")}

    after = AfterSanity()
    train({}, callbacks=[after], num_sanity_val_steps=2)
    assert after.names == set()


# ---- validation data of another form


@pytest.mark.parametrize(
    "val",
    [
        DataLoader(Images().x, BATCH),
        DataLoader([{"x": torch.zeros(1, 8, 8)}] * 8, BATCH),
        DataLoader([(torch.zeros(1, 8, 8), torch.tensor(9))] * 8, BATCH),
    ],
    ids=["no labels", "mapping", "unknown labels"],
)
def test_validation_batches_of_another_form_cost_the_rates_and_not_the_training(val):
    class Tolerant(UserModule):
        def validation_step(self, batch, batch_idx):
            pass

    module = make(Tolerant)
    trainer = Trainer(max_epochs=1, callbacks=[callback()], **SILENT)
    with pytest.warns(UserWarning, match="watermark/wsr is not measured"):
        trainer.fit(module, loader(), val)
    assert "watermark/wsr" not in trainer.callback_metrics
    assert "watermark/loss" in trainer.callback_metrics


def test_validation_data_without_a_source_class_logs_nothing_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        _, trainer = train({}, DataLoader(Images(classes=3), BATCH))
    assert "watermark/wsr" not in trainer.callback_metrics
    assert caplog.text.count("the validation batches hold no sample of at least one of the classes it needs") == 1


def test_validation_samples_that_a_way_cannot_combine_are_named():
    """Where nothing but the key's own way is needed in training, the others come up in validation first."""

    class Signals(UserModule):
        def forward(self, x):
            return super().forward(x.view(-1, 1, 8, 8))

        def validation_step(self, batch, batch_idx):
            pass

    data = loader(shape=(1, 64))
    trainer = Trainer(max_epochs=1, callbacks=[callback(balancing=Fixed(1.0, 0.0, 0.0))], **SILENT)
    with pytest.raises(MisconfigurationException, match=r"on the validation samples.*WatermarkKey\.draw.*fit signals"):
        trainer.fit(make(Signals), data, data)


def test_no_validation_at_all():
    trainer = fit(make(UserModule), [callback()])
    assert "watermark/wsr" not in trainer.callback_metrics


def test_beside_an_average_of_the_weights():
    """The average stands in for the weights during validation; the callback before it measures the average."""
    ema = EMAWeightAveraging(decay=0.5)
    module, trainer = train({}, callbacks=[ema])
    images = validation_images()
    assert logged(trainer) == pytest.approx(rates_by_hand(module, *(list(images.x[images.y == c]) for c in (1, 3))))
