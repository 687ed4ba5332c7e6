"""Probes see what features are worth, and the training does not see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.neighbors import KNeighborsClassifier
from ssl_modules import SILENT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meadef_lightning.victims.probes import KNNProbe, OnlineLinearProbe

CLASSES = 4


def samples(count: int, seed: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Classes by direction; the norm says nothing."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    x = torch.eye(6)[y] + 0.15 * torch.randn(count, 6, generator=generator)
    return (x * (1 + 9 * torch.rand(count, 1, generator=generator)))[:, :, None, None], y


class Encoder(LightningModule):
    """Dropout and BatchNorm, so that a probe which disturbs the training is found out."""

    def __init__(self, informative: bool = True, dropout: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.Dropout(dropout), nn.BatchNorm1d(6, affine=False))
        self.informative = informative
        with torch.no_grad():
            self.body[1].weight.copy_(torch.eye(6))
            self.body[1].bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.informative else torch.ones_like(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] if isinstance(batch[0], Tensor) else batch[0][0]
        return 1e-3 * self.body(x).square().mean() + 1e-3 * self.body[1].weight.square().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(
    callbacks: list[Any], module: Encoder | None = None, ckpt_path: Any = None, **flags: Any
) -> tuple[Any, Trainer]:
    seed_everything(0, verbose=False)
    module = Encoder() if module is None else module
    trainer = Trainer(callbacks=callbacks, **{**SILENT, "max_epochs": 5, **flags})
    train, val = (DataLoader(TensorDataset(*samples(n, seed)), batch_size=32) for n, seed in ((256, 1), (80, 2)))
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return module, trainer


def probes() -> list[Any]:
    return [OnlineLinearProbe(CLASSES), KNNProbe(CLASSES)]


def test_informative_features_are_told_from_others():
    _, trainer = fit(probes())
    assert trainer.callback_metrics["probe_accuracy"] > 0.95
    assert trainer.callback_metrics["knn_accuracy"] > 0.95
    _, trainer = fit(probes(), Encoder(informative=False))
    assert trainer.callback_metrics["probe_accuracy"] < 0.5
    assert trainer.callback_metrics["knn_accuracy"] < 0.5


def test_the_training_does_not_notice():
    plain, _ = fit([])
    watched, trainer = fit(probes())
    assert list(plain.state_dict()) == list(watched.state_dict())
    for name, weights in plain.state_dict().items():
        assert torch.equal(weights, watched.state_dict()[name]), name
    assert sum(p.numel() for g in trainer.optimizers[0].param_groups for p in g["params"]) == 42
    assert watched.training == plain.training


def test_neighbours_are_scikit_learns():
    """Weighted votes of the nearest by cosine, among exactly the last training samples."""
    module, trainer = fit([KNNProbe(CLASSES, neighbours=7, bank_size=64)], max_epochs=1)
    (x, y), (val_x, val_y) = samples(256, 1), samples(80, 2)
    module.eval()
    with torch.no_grad():
        bank, queries = (nn.functional.normalize(module(part), dim=1).numpy() for part in (x[-64:], val_x))
    reference = KNeighborsClassifier(
        7, metric="cosine", weights=lambda distance: torch.exp(torch.tensor(1 - distance) / 0.1).numpy()
    )
    expected = reference.fit(bank, y[-64:].numpy()).score(queries, val_y.numpy())
    assert float(trainer.callback_metrics["knn_accuracy"]) == pytest.approx(expected, abs=1e-6)


def test_fewer_samples_than_neighbours():
    _, trainer = fit([KNNProbe(CLASSES, neighbours=500)], max_epochs=1)
    assert 0 <= trainer.callback_metrics["knn_accuracy"] <= 1


class Keeper(Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_resumed_probe_is_the_uninterrupted_one(tmp_path):
    whole, first, second = (OnlineLinearProbe(CLASSES) for _ in range(3))
    # without dropout, whose random numbers a resumed run draws anew
    fit([whole], Encoder(dropout=0.0))
    fit([first, Keeper(tmp_path / "half.ckpt")], Encoder(dropout=0.0))
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    fit([second], Encoder(dropout=0.0), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(whole.classifier.weight, second.classifier.weight)
    assert not torch.equal(whole.classifier.weight, first.classifier.weight)


def test_rarer_steps_are_fewer_steps():
    steps = {}
    for stride in (1, 3):
        probe = OnlineLinearProbe(CLASSES, every_n_steps=stride)
        fit([probe], max_epochs=3)  # 24 batches
        steps[stride] = int(probe.optimizer.state[probe.classifier.weight]["step"])
    assert steps == {1: 24, 3: 8}


def test_views_and_parts_of_modules():
    """The first view of several, and the features of a named part."""
    x, y = samples(64, 1)
    data = DataLoader([((view, -view), label) for view, label in zip(x, y, strict=True)], batch_size=32)
    seed_everything(0, verbose=False)
    trainer = Trainer(
        callbacks=[OnlineLinearProbe(CLASSES, encoder_key="body.0"), KNNProbe(CLASSES, encoder_key="body.0")],
        max_epochs=10,
        **SILENT,
    )
    trainer.fit(Encoder(informative=False), data, data)
    assert trainer.callback_metrics["probe_accuracy"] > 0.95  # of the inputs themselves, though forward is blind
    assert trainer.callback_metrics["knn_accuracy"] > 0.95


@pytest.mark.parametrize("kind", [OnlineLinearProbe, KNNProbe])
def test_what_is_missing_is_named(kind):
    with pytest.raises(MisconfigurationException, match="needs num_classes, which was not given"):
        fit([kind()], max_epochs=1)
    with pytest.raises(MisconfigurationException, match="needs batches of samples and integer labels"):
        fit([kind(CLASSES, target_key=0)], max_epochs=1)
    with pytest.raises(ValueError, match="must be"):
        kind(CLASSES, **({"lr": 0.0} if kind is OnlineLinearProbe else {"neighbours": 0}))
