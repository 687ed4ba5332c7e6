"""The watermark on lightly's own parts at the sizes of its examples: data set, transform, collation, heads and a ResNet-18, unmodified.

Its example scripts are not part of its package, nor of this one. The modules of ssl_modules.py have their form, and a module that the package
does hold is tested as it is. ``LIGHTLY_EXAMPLES=CHECKOUT/examples/pytorch_lightning python -m pytest tests/ssl/test_lightly_examples.py`` takes the
classes out of the published scripts, as they stand there.
"""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.embedding import SelfSupervisedEmbedding
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from ssl_modules import BYOL, SILENT, MoCo, SimCLR, callback, differences, recorded_draws, with_term
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18

FORMS = {"SimCLR": (SimCLR, (512, 2048, 2048)), "BYOL": (BYOL, (512, 1024, 256)), "MoCo": (MoCo, (512, 512, 128))}
SCRIPTS = os.environ.get("LIGHTLY_EXAMPLES")


def in_their_form(name: str) -> type[pl.LightningModule]:
    """A module of ours in the form and at the size of the example."""
    kind, sizes = FORMS[name]

    class Example(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(nn.Sequential(*list(resnet18().children())[:-1]), sizes)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return Example


def published(name: str) -> type[pl.LightningModule]:
    """The class of the published script, unchanged, with the imports that it needs; the script's rest downloads images and trains."""
    path = Path(str(SCRIPTS)) / f"{name.lower()}.py"
    script = ast.parse(path.read_text(), str(path))
    (module,) = (node for node in script.body if isinstance(node, ast.ClassDef) and node.name == name)
    used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    imports = [
        node
        for node in script.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any((alias.asname or alias.name.partition(".")[0]) in used for alias in node.names)
    ]
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(ast.Module([*imports, module], []), path, "exec"), names)  # noqa: S102
    kind: type[pl.LightningModule] = names[name]
    return kind


def images() -> DataLoader:
    """Colour images of 32x32 in two views, as ``(views, labels, names)``."""
    data = LightlyDataset.from_torch_dataset(
        FakeData(16, image_size=(3, 32, 32), num_classes=5), transform=SimCLRTransform(input_size=32)
    )
    return DataLoader(data, batch_size=8, collate_fn=MultiViewCollate(), drop_last=True)


def train(module: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    """Four steps, by the module's own optimiser."""
    trainer = pl.Trainer(max_epochs=2, callbacks=list(callbacks), **SILENT)
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, images())
    return trainer


def make(kind: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    return kind()


NEEDS_SCRIPTS = pytest.mark.skipif(
    SCRIPTS is None, reason="needs LIGHTLY_EXAMPLES, a folder of lightly's example scripts"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source"),
    [
        *((name, in_their_form) for name in FORMS),
        pytest.param("SimCLR", published, marks=NEEDS_SCRIPTS),
        pytest.param("BYOL", published, marks=NEEDS_SCRIPTS),
    ],
)
def test_an_example_is_watermarked_as_it_is(name, source):
    kind = source(name)
    plain, marked, twin = make(kind), make(kind), make(with_term(kind, 2))
    embedding = callback(start=0.5, batchnorm="running")
    train(plain)
    with recorded_draws() as draws:
        trainer = train(marked, embedding)
    assert embedding.objective.steps == len(draws) == 2  # of four, from the middle on
    twin.plan = draws
    train(twin)
    assert differences(marked, twin) < differences(marked, plain) / 1000  # the same terms written by hand
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("watermark/")}
    assert set(logged) == {f"watermark/{name}" for name in ("loss", "ver", "eva", "tilt")}
    assert all(0 < value < math.inf for value in logged.values())
    assert set(vars(marked)) == set(vars(plain))
    assert list(marked.state_dict()) == list(plain.state_dict())
    if name != "SimCLR":
        assert not any(parameter.requires_grad for parameter in marked.backbone_momentum.parameters())


class Joined(nn.Module):
    """What lightly's ``SelfSupervisedEmbedding`` takes: projections of both views at once."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1)
        )
        self.head = SimCLRProjectionHead(16, 16, 8)

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.head(self.backbone(x).flatten(1)) for x in views]


def test_a_published_module_that_keeps_its_encoder_deeper():
    def embedding(kind: type[SelfSupervisedEmbedding]) -> Any:
        pl.seed_everything(0, verbose=False)
        model = Joined()
        return kind(model, NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06), images())

    plain, marked = embedding(SelfSupervisedEmbedding), embedding(SelfSupervisedEmbedding)
    twin = embedding(with_term(SelfSupervisedEmbedding, 2, "model.backbone"))
    train(plain)
    with recorded_draws() as draws:
        train(marked, callback(start=0.5, batchnorm="running", encoder_key="model.backbone"))
    twin.plan = draws
    train(twin)
    assert len(draws) == 2
    assert differences(marked, twin) < differences(marked, plain) / 1000
