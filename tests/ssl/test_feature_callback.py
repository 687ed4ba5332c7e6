"""The watermark on self-supervised modules of others: what it reaches, what it leaves alone, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ssl_modules import BYOL, KEY, SILENT, Shapes, SimCLR, callback, fit, make, margin, owned
from torch.utils.data import DataLoader


@pytest.mark.parametrize("kind", [SimCLR, BYOL])
def test_it_pulls_the_watermarks_features_to_the_target_of_an_unmodified_module(kind, tmp_path):
    plain, marked = make(kind), make(kind)
    fit(plain, [])
    embedding = callback()
    trainer = fit(marked, [embedding])
    assert trainer.callback_metrics["watermark/ver"] < 0.3
    assert margin(marked) > 0 > margin(plain) + 1  # the target is nearest, and was not near before
    # nothing of ours is left: the same attributes, the same parts, and a checkpoint that the plain class loads
    assert set(vars(marked)) == set(vars(plain))
    assert "training_step" not in vars(marked)
    assert [name for name, _ in marked.named_modules()] == [name for name, _ in plain.named_modules()]
    trainer.save_checkpoint(tmp_path / "marked.ckpt", weights_only=True)
    loaded = kind.load_from_checkpoint(tmp_path / "marked.ckpt", weights_only=True)
    assert list(loaded.state_dict()) == list(plain.state_dict())
    assert b"5a17" not in (tmp_path / "marked.ckpt").read_bytes()


def test_a_momentum_encoder_takes_the_watermark_over():
    module = make(BYOL)
    fit(module, [callback()])
    module.backbone = module.backbone_momentum
    assert margin(module) > 0


def test_before_its_start_it_changes_nothing():
    plain, marked = make(SimCLR), make(SimCLR)
    fit(plain, [], max_epochs=2)
    with pytest.warns(UserWarning, match="without a single watermarked step"):
        fit(marked, [callback(start=0.99)], max_epochs=2)
    for name, weights in plain.state_dict().items():
        assert torch.equal(weights, marked.state_dict()[name]), name


@pytest.mark.parametrize("others", [(), (0, 2)], ids=["three classes", "all classes"])
def test_a_pool_of_the_owners_serves_a_training_without_labels(others):
    module = make(SimCLR)
    fit(module, [callback(pool=owned(*others))], Shapes(labelled=False))
    assert margin(module) > 0


def test_frozen_batchnorm_keeps_its_statistics_once_embedding_has_begun():
    """Those of an embedding that starts at half the training are those of a training that ends there."""
    long, short = make(SimCLR), make(SimCLR)
    fit(long, [callback(start=0.5)], max_epochs=4)
    fit(short, [], max_epochs=2)
    assert torch.equal(long.backbone[1].running_mean, short.backbone[1].running_mean)
    assert int(long.backbone[1].num_batches_tracked) == int(short.backbone[1].num_batches_tracked) == 16


@pytest.mark.parametrize("input_key", [0, [0, 0], lambda batch: batch[0][0]])
def test_where_a_batch_keeps_its_samples(input_key):
    views, y, _ = next(iter(DataLoader(Shapes(), batch_size=10)))
    x, labels = callback(input_key=input_key)._parts((views, y, None))
    assert torch.equal(x, views[0])
    assert torch.equal(labels, y)


def test_the_second_view_by_its_path():
    batch = {"views": [torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)], "label": torch.zeros(2).long()}
    x, _ = callback(input_key=["views", 1], target_key="label")._parts(batch)
    assert torch.equal(x, batch["views"][1])


class Validated(SimCLR):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("given", [False, True], ids=["validation data", "pool"])
def test_validation_measures_the_features_of_combinations(given):
    module = make(Validated)
    pool = owned() if given else None
    trainer = pl.Trainer(callbacks=[callback(pool=pool)], max_epochs=12, check_val_every_n_epoch=12, **SILENT)
    pl.seed_everything(1, verbose=False)
    data, val = Shapes(), Shapes(60, seed=3)
    trainer.fit(module, DataLoader(data, batch_size=50), DataLoader(val, batch_size=60))
    x = owned().take(100) if given else [(val.x + val.noise[0])[val.y == label] for label in (1, 3, 4)]
    module.eval()
    with torch.no_grad():
        features = [module.backbone(part).flatten(1) for part in (KEY.combiner.build()(x[0], x[1]), x[2], x[0], x[1])]
    mean = torch.stack([part.mean(0) for part in features[1:]])
    cosines = torch.nn.functional.cosine_similarity(features[0][:, None] - mean.mean(0), mean - mean.mean(0), dim=-1)
    logged = trainer.callback_metrics
    assert float(logged["watermark/wsr"]) == pytest.approx(float((cosines.argmax(1) == 0).float().mean()))
    expected = (cosines[:, 0] - cosines[:, 1:].max(1).values).mean()
    assert float(logged["watermark/margin"]) == pytest.approx(float(expected), abs=1e-5)
    assert logged["watermark/wsr"] > 0.9
    assert logged["watermark/wfpr"] < 0.5


class Keeper(pl.Callback):
    """Saves in the middle and stops."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    whole, first, second = (make(SimCLR) for _ in range(3))
    data = DataLoader(Shapes(), batch_size=50)
    for module, extra, resume in (
        (whole, [], None),
        (first, [Keeper(tmp_path / "half.ckpt")], None),
        (second, [], tmp_path / "half.ckpt"),
    ):
        trainer = pl.Trainer(callbacks=[callback(), *extra], max_epochs=4, **SILENT)
        pl.seed_everything(1, verbose=False)
        trainer.fit(module, data, ckpt_path=resume)
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, second.state_dict()[name]), name
    assert not torch.equal(whole.backbone[0].weight, first.backbone[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_key": "body"}, r"encoder_key='body' names no part of SimCLR .* \['backbone', 'projection_head'"),
        ({"encoder_key": "backbone.9.x"}, "encoder_key='backbone.9.x' names no part"),
        ({"output_key": "features"}, "output_key='features' points to nothing"),
        ({"output_key": 0}, r"must answer features of shape \(\d+, D\)"),
        ({"target_key": 2}, "Samples and labels must be tensors"),
    ],
)
def test_bad_set_ups_are_named(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(
            make(SimCLR),
            [callback(start=0.0, batchnorm="running", samples=4 if "output_key" in options else 8, **options)],
        )


def test_a_class_that_combinations_are_compared_with_and_that_never_comes_is_named():
    data = Shapes()
    data.y = data.y.clone().masked_fill_(data.y == KEY.target_class, KEY.source_classes[0])
    with pytest.raises(
        MisconfigurationException, match="at least one of the key's source classes, its target class and"
    ):
        fit(make(SimCLR), [callback(start=0.0, batchnorm="running")], data)
