"""Self-supervised modules as others write them, in the form of lightly's examples, and a task that they learn in a moment.

``forward`` returns projections (SimCLR, MoCo) or predictions (BYOL), the features come out of ``backbone``, and a batch is
``(views, labels, filenames)``. Nothing in these modules knows of watermarks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import silent
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meadef_lightning.watermark import Fixed, SourcePool, WatermarkKey
from meadef_lightning.watermark.feature_callback import FeatureWatermarkCallback
from meadef_lightning.watermark.feature_objective import FeatureObjective
from meadef_lightning.watermark.features import target_margin

CLASSES = 5
KEY = WatermarkKey((1, 3), 4, seed=7, num_classes=CLASSES, salt="5a17" * 8)
SILENT = {**silent.SILENT, "num_sanity_val_steps": 0}


def backbone() -> nn.Module:
    """Ends in pooling, ``(B, 16, 1, 1)``, as the ResNets of the examples do without their last layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.AdaptiveAvgPool2d(1),
    )


class SimCLR(pl.LightningModule):
    def __init__(self, body: nn.Module | None = None, sizes: tuple[int, int, int] = (16, 16, 8)) -> None:
        super().__init__()
        self.backbone = body or backbone()
        self.projection_head = SimCLRProjectionHead(*sizes)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        (x0, x1), _, _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class BYOL(pl.LightningModule):
    def __init__(self, body: nn.Module | None = None, sizes: tuple[int, int, int] = (16, 16, 8)) -> None:
        super().__init__()
        self.backbone = body or backbone()
        self.projection_head = BYOLProjectionHead(*sizes)
        self.prediction_head = BYOLPredictionHead(sizes[2], sizes[1], sizes[2])
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        (x0, x1), _, _ = batch
        one = self.criterion(self(x0), self.forward_momentum(x1))
        other = self.criterion(self(x1), self.forward_momentum(x0))
        return 0.5 * (one + other)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class MoCo(pl.LightningModule):
    def __init__(self, body: nn.Module | None = None, sizes: tuple[int, int, int] = (16, 16, 8)) -> None:
        super().__init__()
        self.backbone = body or backbone()
        self.projection_head = MoCoProjectionHead(*sizes)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=(64, sizes[2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        (query, key), _, _ = batch
        with torch.no_grad():
            keys = self.projection_head_momentum(self.backbone_momentum(key).flatten(start_dim=1))
        return self.criterion(self(query), keys)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Shapes(Dataset):
    """Five classes that stand in five places, with noise: an item is ``((view, view), label, name)``."""

    def __init__(self, size: int = 200, seed: int = 0, labelled: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(size) % CLASSES
        self.labelled = labelled
        prototypes = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(42))
        self.x = 1.5 * prototypes[self.y] + 0.4 * torch.randn(size, 1, 8, 8, generator=self.generator)
        self.noise = 0.4 * torch.randn(2, size, 1, 8, 8, generator=self.generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        views = tuple(self.x[index] + noise[index] for noise in self.noise)
        return views, self.y[index] if self.labelled else torch.tensor(0), f"{index}.png"


def fit(module: pl.LightningModule, callbacks: Any, data: Dataset | None = None, **flags: Any) -> pl.Trainer:
    trainer = pl.Trainer(callbacks=callbacks, **{**SILENT, "max_epochs": 12, **flags})
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, DataLoader(data or Shapes(), batch_size=50))
    return trainer


def make(kind: type, seed: int = 0) -> Any:
    pl.seed_everything(seed, verbose=False)
    return kind()


def callback(**options: Any) -> FeatureWatermarkCallback:
    return FeatureWatermarkCallback(
        KEY, **{"start": 0.25, "encoder_key": "backbone", "balancing": Fixed(ver=3.0, com=0.0, eva=1.0), **options}
    )


def margin(module: nn.Module) -> float:
    """By how much new watermark samples resemble the target more than a source; above 0, the target is nearest."""
    data = Shapes(seed=9)
    a, b, target = (data.x[data.y == label] for label in (*KEY.source_classes, KEY.target_class))
    module.eval()
    with torch.no_grad():
        combined, first, second, goal = (
            module.backbone(x).flatten(1) for x in (KEY.combiner.build()(a, b), a, b, target)
        )
    return float(target_margin(combined, goal, (first, second)).mean())


def owned(*others: int) -> SourcePool:
    data = Shapes(seed=5)
    return SourcePool.from_samples({label: data.x[data.y == label] for label in (*others, 1, 3, 4)})


Draw = dict[str, Any]
"""One step: the groups of samples, and what the terms need to know of them."""


@contextmanager
def recorded_draws() -> Iterator[list[Draw]]:
    """Lists what every objective draws inside the block."""
    draws: list[Draw] = []
    original = FeatureObjective.draw

    def draw(self: FeatureObjective) -> None:
        original(self)
        rows = self._natural_rows
        known = {name: self._tilted[name][rows].clone() for name in ("labels", "mass") if rows is not None}
        draws.append({**known, "groups": dict(self._groups), "wins": self._wins, "classes": len(self.classes)})

    FeatureObjective.draw = draw  # type: ignore[method-assign]
    try:
        yield draws
    finally:
        FeatureObjective.draw = original  # type: ignore[method-assign]


def steady(kind: type[pl.LightningModule]) -> type[pl.LightningModule]:
    """Returns ``kind`` trained by small steps of SGD, in which rounding stays small.

    Adam makes full steps of gradients that are nothing but rounding, as before BatchNorm; large steps double a difference each.
    """

    class Steady(kind):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=3e-4)

    return Steady


def with_term(kind: type[pl.LightningModule], start: int, encoder: str = "backbone") -> type[pl.LightningModule]:
    """Returns ``kind`` with the watermark's terms written into its ``training_step``, on the features of its part ``encoder``.

    The n-th of the draws in ``plan`` is that of step ``start + n``. BatchNorm rests in the terms only, as with ``batchnorm="running"``.
    """

    class Twin(kind):  # type: ignore[misc, valid-type]
        plan: Sequence[Draw] = ()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            number = self.trainer.fit_loop.total_batch_idx - start
            if not 0 <= number < len(self.plan):
                return loss
            step = self.plan[number]
            groups = step["groups"]
            norms = [layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d) and layer.training]
            for layer in norms:
                layer.eval()
            features = self.get_submodule(encoder)(torch.cat(list(groups.values()))).flatten(1)
            for layer in norms:
                layer.train()
            out = dict(zip(groups, features.split([len(group) for group in groups.values()]), strict=True))
            centres = out["natural"].float().unflatten(0, (step["classes"], -1)).mean(1)

            def surprise(part: Tensor) -> Tensor:
                unit = (centres - centres.mean(0)).square().sum(1).mean()
                return (part.float()[:, None] - centres).square().sum(2).div(unit * 0.25).neg().log_softmax(1).neg()

            terms = 3.0 * surprise(out["watermark"])[:, 2].mean()
            terms = terms + surprise(out["other"]).gather(1, step["wins"][:, None]).mean()
            own = surprise(out["leaning"]).gather(1, (step["labels"] == KEY.source_classes[1]).long()[:, None])[:, 0]
            mass = step["mass"]
            leaning = (1 - mass) * own + mass * surprise(out["leaning"])[:, 2]
            return loss + terms + leaning.masked_fill(mass == 0, 0.0).mean()

    return Twin


def differences(a: nn.Module, b: nn.Module) -> float:
    """The largest difference between two modules' weights and buffers."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
