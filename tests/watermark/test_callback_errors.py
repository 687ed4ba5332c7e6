"""Bad input: each a clear error with the remedy, which does not tell the secret."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from user_modules import CLASSES, KEY, Images, UserModule, assert_clean, callback, fit, loader, make

from meadef_lightning.watermark import CombinerSpec, SourcePool, WatermarkCallback, WatermarkKey


def refusal(module, data, ours=None, **flags) -> str:
    with pytest.raises(MisconfigurationException) as error:
        fit(module, [ours or callback()], data, **flags)
    assert_clean(module)
    return str(error.value)


# ---- classes


def test_a_source_class_that_is_not_in_the_data():
    message = refusal(make(UserModule), loader(classes=3))
    assert "no sample of at least one of the key's source classes" in message
    assert "draw a key for the classes there are, or give a pool" in message
    assert not re.search(r"\d", message)  # it does not name the classes


def test_a_source_class_that_is_not_in_a_single_batch_is_only_a_warning():
    with pytest.warns(UserWarning, match="no sample of at least one"):
        fit(make(UserModule), [callback()], loader(classes=3), fast_dev_run=True)
    with pytest.warns(UserWarning, match="no sample of at least one"):
        fit(make(UserModule), [callback()], loader(classes=3), limit_train_batches=1, max_epochs=1)


def test_labels_beyond_the_keys_classes():
    class Wide(UserModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 8 * 8, 8)

    message = refusal(make(Wide), loader(classes=8))
    assert "labels from 0 to 7, but the key is for classes 0 to 4" in message
    assert "number of classes" in message


def test_a_model_with_another_number_of_classes():
    class Wide(UserModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 8 * 8, 8)

    message = refusal(make(Wide), loader())
    assert "logits of shape (16, 5), got (16, 8)" in message
    assert "num_classes" in message


# ---- batches


class Anything(UserModule):
    """Trains on whatever comes."""

    def loss(self, batch):
        return self.head.weight.square().mean()


X, Y = torch.randn(48, 1, 8, 8), torch.arange(48) % CLASSES


def batches(form):
    return DataLoader(TensorDataset(X, Y), 8, collate_fn=lambda rows: form(*map(torch.stack, zip(*rows, strict=True))))


@pytest.mark.parametrize(
    ("form", "options", "expected"),
    [
        (lambda x, y: x, {}, r"Labels must be integers.*torch\.float32.*target_key"),
        (lambda x, y: {"x": x, "y": y}, {}, r"input_key=0 points to nothing.*\['x', 'y'\]"),
        (
            lambda x, y: {"x": x, "y": y},
            {"input_key": "x", "target_key": "label"},
            r"target_key='label' points to nothing",
        ),
        (lambda x, y: (x,), {}, r"target_key=1 points to nothing: got a tuple of 1 parts"),
        (lambda x, y: (x, y), {"input_key": "image"}, r"input_key='image' points to nothing"),
        (lambda x, y: ([x], y), {}, r"must be tensors, got list and Tensor.*input_key and target_key"),
        (lambda x, y: (y, x), {}, r"must be floating-point and of shape \(B, C, \*spatial\).*int64"),
        (lambda x, y: (x.flatten(1), y), {}, r"must be floating-point and of shape \(B, C, \*spatial\).*\(8, 64\)"),
        (lambda x, y: ((255 * x).byte(), y), {}, r"must be floating-point.*uint8.*on_after_batch_transfer"),
        (lambda x, y: (x, y.float()), {}, r"Labels must be integers.*float32"),
        (lambda x, y: (x, F.one_hot(y, CLASSES)), {}, r"Labels must be integers, one a sample, shape \(8,\).*\(8, 5\)"),
        (lambda x, y: (x, y[:4]), {}, r"Labels must be integers, one a sample"),
        (lambda x, y: (x, y - 1), {}, r"labels from -1 to 3"),
    ],
)
def test_batches_of_a_wrong_form(form, options, expected):
    assert re.search(expected, refusal(make(Anything), batches(form), callback(**options)))


def test_unlabelled_batches_name_the_pool_as_remedy():
    assert "SourcePool.from_samples" in refusal(make(Anything), DataLoader(X, 8))


def test_a_step_that_takes_an_iterator():
    class Iterating(UserModule):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    message = refusal(make(Iterating), loader())
    assert "takes a dataloader_iter" in message
    assert "WatermarkLossMixin" in message


class Pooled(UserModule):
    """Takes images of any size."""

    def forward(self, x):
        return super().forward(F.adaptive_avg_pool2d(x, 8))


class Growing(Images):
    """In the second half of an epoch the images are larger, and there may be no source class among them."""

    def __init__(self, absent: bool) -> None:
        super().__init__()
        self.absent = absent

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x, y) if index < 24 else (x.repeat(1, 2, 2), y * (not self.absent))


def test_samples_that_change_their_shape():
    fit(make(Pooled), [callback()], DataLoader(Growing(absent=False), 8), max_epochs=2)
    message = refusal(make(Pooled), DataLoader(Growing(absent=True), 8))
    assert "changed their shape" in message
    assert "Resize them to one shape, or give a pool" in message


# ---- outputs


def test_an_output_key_that_points_to_nothing():
    class Mapped(UserModule):
        def forward(self, x):
            return {"logits": super().forward(x)}

        def loss(self, batch):
            return F.cross_entropy(self(batch[0])["logits"], batch[1])

    message = refusal(make(Mapped), loader(), callback(output_key="scores"))
    assert "output_key='scores' points to nothing: got a mapping with the keys ['logits']" in message
    assert "must answer logits of shape (16, 5), got dict. Set output_key" in refusal(make(Mapped), loader())


def test_a_module_without_a_forward():
    class Headless(UserModule):
        forward = LightningModule.forward

        def loss(self, batch):
            return F.cross_entropy(self.head(self.body(batch[0]).flatten(1)), batch[1])

    message = refusal(make(Headless), loader())
    assert "its forward must map samples to logits" in message
    assert "Headless" in message


@pytest.mark.parametrize(
    ("returned", "expected"), [({"x": 1}, "'loss' key needs to be present"), (1.0, "must return a Tensor")]
)
def test_what_lightning_refuses_is_left_to_lightning(returned, expected):
    class Odd(UserModule):
        def training_step(self, batch, batch_idx):
            return returned

    assert expected in refusal(make(Odd), loader())


# ---- the pool and the key


def test_a_pool_of_other_classes():
    pool = SourcePool.from_samples({0: X[:2], 2: X[2:4]})
    with pytest.raises(ValueError, match="does not hold exactly the key's two source classes") as error:
        callback(pool=pool)
    assert not re.search(r"\d", str(error.value))


def test_a_pool_whose_samples_do_not_fit_the_model():
    pool = SourcePool.from_samples({label: torch.randn(2, 1, 9, 9) for label in KEY.source_classes})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(make(UserModule), [callback(pool=pool)])


def test_a_combiner_that_cannot_combine_these_samples():
    stripes = CombinerSpec("meadef_lightning.watermark.combiners.Stripes", {"pattern": [0, 1] * 6})
    key = WatermarkKey((1, 3), 4, CLASSES, combiner=stripes, space=(stripes,))
    message = refusal(make(UserModule), loader(), WatermarkCallback(key, start=0.0))
    assert "cannot be cut into 12 stripes" in message


def test_a_key_file_that_is_none(tmp_path):
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        WatermarkCallback(str(tmp_path / "key.json"))
    with pytest.raises(ValueError, match="Cannot read the watermark key"):
        WatermarkCallback(str(tmp_path / "nothing.json"))
