"""Splits that stay where they are give what splits in memory give."""

import json

import pytest
import torch
from torch import nn

from meadef_lightning.data import DigitsDataModule, stored
from meadef_lightning.data.stored import StoredImages, batches, read_split
from meadef_lightning.verification import verify
from meadef_lightning.verification.fingerprints import tensors_fingerprint
from meadef_lightning.watermark import WatermarkKey


class Lines(nn.Module):
    """A classifier without training: which tenth of the image is brightest."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, (2, 5)).flatten(1)


class BlackBox:
    def query(self, x):
        return Lines()(x)


@pytest.fixture
def nothing_fits(monkeypatch):
    monkeypatch.setattr(stored, "IN_MEMORY", 0)


def test_rows_are_those_of_the_tensor(nothing_fits):
    data = DigitsDataModule()
    x, y = data.tensors("test")
    images, labels = read_split(data, "test")
    assert isinstance(images, StoredImages)
    assert images.shape == x.shape
    assert images.dtype == x.dtype
    assert torch.equal(labels, y)
    rows = torch.tensor([5, 0, 5, len(x) - 1])
    assert torch.equal(images[rows], x[rows])
    assert torch.equal(images[3:9], x[3:9])
    parts = list(batches(images, 100))
    assert [len(part) for part in parts[:-1]] == [100] * (len(parts) - 1)
    assert torch.equal(torch.cat(parts), x)


def test_fingerprints_are_those_of_the_tensors(nothing_fits):
    data = DigitsDataModule()
    assert tensors_fingerprint(*read_split(data, "verification")) == tensors_fingerprint(*data.tensors("verification"))


def test_small_splits_are_read_and_so_are_those_of_others(monkeypatch):
    class Changed(DigitsDataModule):
        def tensors(self, split):
            x, y = super().tensors(split)
            return -x, y

    assert torch.equal(read_split(DigitsDataModule(), "test")[0], DigitsDataModule().tensors("test")[0])
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    assert torch.equal(read_split(Changed(), "test")[0], Changed().tensors("test")[0])


@pytest.mark.parametrize("suspect", [Lines(), BlackBox()])
def test_a_verification_of_stored_splits_is_the_same(suspect, tmp_path, monkeypatch):
    key, results = WatermarkKey.draw(10, "secret"), []
    for limit in (stored.IN_MEMORY, 0):
        monkeypatch.setattr(stored, "IN_MEMORY", limit)
        path = tmp_path / f"{limit}.json"
        verdict, responses = verify(
            suspect, key, DigitsDataModule(), samples=40, decoy_samples=4, accelerator="cpu", evidence_path=path
        )
        results.append((verdict, responses.counts.tolist(), json.loads(path.read_text())["data"]))
    assert results[0] == results[1]
