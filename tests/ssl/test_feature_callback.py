"""The watermark on self-supervised modules of others, in the form of lightly's examples: written for ``pytorch_lightning``.

``forward`` returns projections (SimCLR) or predictions (BYOL), the features come out of ``backbone``, and a batch is
``(views, labels, filenames)``. Nothing in these modules knows of watermarks.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meadef_lightning.watermark import Fixed, SourcePool, WatermarkKey
from meadef_lightning.watermark.feature_callback import FeatureWatermarkCallback
from meadef_lightning.watermark.feature_objective import FeatureObjective, contrasted_classes, encode
from meadef_lightning.watermark.features import target_margin

CLASSES = 5
KEY = WatermarkKey((1, 3), 4, seed=7, num_classes=CLASSES, salt="5a17" * 8)
SILENT = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


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
    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = SimCLRProjectionHead(16, 16, 8)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        (x0, x1), _, _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class BYOL(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = BYOLProjectionHead(16, 16, 8)
        self.prediction_head = BYOLPredictionHead(8, 16, 8)
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


def test_what_the_objective_forwards_and_weighs():
    """One forward of the groups; the same terms from the losses called on them; terms of weight 0 are left out."""
    calls: list[Tensor] = []
    module = nn.Flatten()

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        return module(x)

    options = {"samples": 4, "per_class": 3, "pool": owned(2, 0)}
    objective = FeatureObjective(KEY, balancing=Fixed(ver=1.0, com=0.0, eva=0.0), **options)
    objective.draw()
    assert set(objective.terms(module, forward)) == {"ver"}
    assert [len(x) for x in calls] == [4 + 5 * 3]
    objective = FeatureObjective(KEY, balancing=Fixed(ver=1.0, com=0.5, eva=0.5), **options)
    objective.draw()
    terms = objective.terms(module, forward)
    wm, natural, a, b, other = calls[1].flatten(1).split([4, 5 * 3, 4, 4, 4])
    centres = natural.unflatten(0, (5, 3)).mean(1)
    # each class's natural samples are its own, as the places of the shapes tell, and the target stands third
    places = torch.stack([owned(2, 0).take(100)[row].flatten(1).mean(0) for row in (2, 3, 4, 0, 1)])
    found = torch.cdist(centres, places).argmin(1)
    assert [(1, 3, 4, 2, 0)[row] for row in found] == list(objective.classes)
    assert objective.classes[:3] == (1, 3, 4)
    unit = (centres - centres.mean(0)).square().sum(1).mean()
    logits = [-(part[:, None] - centres).square().sum(2) / unit / 0.25 for part in (wm, other)]
    expected = torch.nn.functional.cross_entropy(logits[0], torch.full((4,), 2))
    assert float(terms["ver"]) == pytest.approx(float(expected), rel=1e-3)
    p = [part.log_softmax(1) for part in (wm, a, b)]
    divergence = sum((p[0].exp() * (p[0] - source)).sum(1).mean() for source in p[1:])
    assert float(terms["com"]) == pytest.approx(float(divergence), rel=1e-4)
    surprise = -logits[1].log_softmax(1)
    possible = [surprise[torch.arange(4), torch.tensor(wins)].mean() for wins in itertools.product((0, 1), repeat=4)]
    assert min(abs(float(terms["eva"]) / float(value) - 1) for value in possible) < 1e-3


def test_which_classes_take_part_is_the_keys_secret_and_bounded():
    keys = [WatermarkKey((5, 8), 2, seed=seed, num_classes=1_000_000, salt="5a17" * 8) for seed in (1, 2)]
    chosen = [FeatureObjective(key, rank=rank).classes for key in keys for rank in (0, 3)]
    assert chosen[0] == chosen[1]  # in every process
    assert chosen[2] == chosen[3]
    assert not set(chosen[0][3:]) & set(chosen[2][3:])
    for classes in chosen:
        assert classes[:3] == (5, 8, 2)
        assert len(set(classes)) == 10
        assert all(0 <= label < 1_000_000 for label in classes)
    small = [WatermarkKey((5, 8), 2, seed=seed, num_classes=10, salt="5a17" * 8) for seed in range(70)]
    ten = [contrasted_classes(key, range(10), 1) for key in small]
    assert {classes[3] for classes in ten} == set(range(10)) - {2, 5, 8}
    assert contrasted_classes(keys[0], [2, 5, 8], 7) == contrasted_classes(keys[0], range(9), 0) == (5, 8, 2)


def test_it_waits_for_all_classes_that_take_part():
    objective = FeatureObjective(KEY, per_class=1)
    data = Shapes()
    for label in (1, 3, 4, 0):
        objective.observe(data.x[data.y == label], data.y[data.y == label])
        assert not objective.ready
    objective.observe(data.x[:5], data.y[:5])
    assert objective.ready
    assert set(callback()._validation_pool.classes) == {1, 3, 4}


def test_the_default_forwards_at_most_a_quarter_of_a_step_on_256_views():
    key = WatermarkKey((1, 3), 4, seed=7, num_classes=10, salt="5a17" * 8)
    objective = FeatureObjective(key)
    objective.observe(torch.randn(40, 1, 8, 8), torch.arange(40) % 10)
    objective.draw()
    assert objective.classes[:3] == (1, 3, 4)
    assert set(objective.classes) == set(range(10))
    assert sum(map(len, objective._groups.values())) <= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [({"per_class": 0}, "per_class=0 must be at least 1"), ({"negatives": -1}, "negatives=-1 must be at least 0")],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        callback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_key": "body"}, r"encoder_key='body' names no part of SimCLR .* \['backbone', 'projection_head'"),
        ({"encoder_key": "backbone.9.x"}, "encoder_key='backbone.9.x' names no part"),
        ({"output_key": "features"}, "output_key='features' points to nothing"),
        ({"output_key": 0}, r"must answer features of shape \(28, D\)"),
        ({"target_key": 2}, "Samples and labels must be tensors"),
    ],
)
def test_bad_set_ups_are_named(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(
            make(SimCLR),
            [callback(start=0.0, batchnorm="running", samples=4 if "output_key" in options else 8, **options)],
        )


def test_a_pool_of_two_classes_is_refused():
    data = Shapes()
    pool = SourcePool.from_samples({label: data.x[data.y == label] for label in KEY.source_classes})
    with pytest.raises(ValueError, match="two source classes and its target class"):
        callback(pool=pool)


def test_parts_of_parts_and_methods_make_features():
    module = make(BYOL)
    x = torch.randn(3, 1, 8, 8)
    module.eval()
    assert torch.equal(encode(module, "backbone.0", x), module.backbone[0](x).flatten(1))
    assert torch.equal(encode(module, "forward_momentum", x), module.forward_momentum(x))
    assert torch.equal(encode(module, None, x), module(x))
