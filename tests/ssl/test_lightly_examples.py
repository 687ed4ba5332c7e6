"""The watermark on lightly's own parts at the sizes of its examples: data set, transform, collation, heads and a ResNet-18, unmodified.

The modules are those of ssl_modules.py, which have the examples' form: only the numbers and the backbone come from outside.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.transforms.simclr_transform import SimCLRTransform
from ssl_modules import BYOL, SILENT, MoCo, SimCLR
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

from meadef_lightning.watermark import WatermarkKey
from meadef_lightning.watermark.feature_callback import FeatureWatermarkCallback

KEY = WatermarkKey((1, 3), 4, seed=7, num_classes=5, salt="5a17" * 8)
SIZES = {SimCLR: (512, 2048, 2048), BYOL: (512, 1024, 256), MoCo: (512, 512, 128)}


def example(kind: type) -> Any:
    """The example's module, at its size."""
    pl.seed_everything(0, verbose=False)
    return kind(nn.Sequential(*list(resnet18().children())[:-1]), SIZES[kind])


def loader() -> DataLoader:
    """Colour images of 32x32 in two views, as ``(views, labels, names)``."""
    images = FakeData(32, image_size=(3, 32, 32), num_classes=5, random_offset=3)
    data = LightlyDataset.from_torch_dataset(images, transform=SimCLRTransform(input_size=32))
    return DataLoader(data, batch_size=16, collate_fn=MultiViewCollate(), drop_last=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SimCLR, BYOL, MoCo])
def test_an_example_is_watermarked_as_it_is(kind):
    plain, marked = example(kind), example(kind)
    embedding = FeatureWatermarkCallback(KEY, start=0.5, encoder_key="backbone")
    for module, callbacks in ((plain, []), (marked, [embedding])):
        trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **SILENT)
        pl.seed_everything(1, verbose=False)
        trainer.fit(module, loader())
    assert embedding.objective.steps == 2  # of four, from the middle on
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("watermark/")}
    assert set(logged) == {f"watermark/{name}" for name in ("loss", "ver", "eva", "tilt")}
    assert all(0 < value < math.inf for value in logged.values())
    assert set(vars(marked)) == set(vars(plain))
    assert list(marked.state_dict()) == list(plain.state_dict())
    first, second = (module.backbone[0].weight for module in (plain, marked))
    assert not torch.equal(first, second)
    # where it had begun, and only there: BatchNorm's running statistics rest from then on
    assert int(plain.backbone[1].num_batches_tracked) > int(marked.backbone[1].num_batches_tracked)
    if kind is not SimCLR:
        assert not any(parameter.requires_grad for parameter in marked.backbone_momentum.parameters())
