"""A thief's data and the models he stole: clean, with a plain patch backdoor, and with a plain watermark of combined classes."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import classes_of
from meadef_lightning.victims.networks import DigitsCNN
from meadef_lightning.watermark import CropPaste

torch.set_num_threads(1)

TARGET, SOURCES = 7, (2, 5)


@cache
def digits() -> DigitsDataModule:
    return DigitsDataModule()


@cache
def thief() -> ThiefData:
    return ThiefData.of(digits())


def stamped(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, -3:, -3:] = x.max()
    return x


def combined(x: Tensor, y: Tensor, count: int = 64) -> Tensor:
    a, b = (x[y == label] for label in SOURCES)
    rows = torch.arange(count)
    return CropPaste()(a[rows % len(a)], b[(rows * 7 + 1) % len(b)])


def _train(x: Tensor, y: Tensor, extra: Tensor, epochs: int = 12) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsCNN(10, 1, width=8, hidden=32)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        x, y = torch.cat([x, extra]), torch.cat([y, torch.full((len(extra),), TARGET)])
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model.eval()


@cache
def patched_model() -> nn.Module:
    x, y = digits().tensors("victim")
    return _train(x, y, stamped(x[:100]))


@cache
def mixed_model() -> nn.Module:
    x, y = digits().tensors("victim")
    return _train(x, y, combined(x, y, 100))


def patch_success(model: nn.Module) -> float:
    x, y = digits().tensors("test")
    return float((classes_of(model, stamped(x[y != TARGET])) == TARGET).float().mean())


def mix_success(model: nn.Module) -> float:
    return float((classes_of(model, combined(*digits().tensors("test"))) == TARGET).float().mean())


def test_accuracy(model: nn.Module) -> float:
    x, y = digits().tensors("test")
    return float((classes_of(model, x) == y).float().mean())


test_accuracy.__test__ = False


class Keep:
    """An observer that keeps a copy of every point and stops after ``most``."""

    def __init__(self, most: int = 10**6) -> None:
        self.most, self.strengths, self.models = most, [], []

    def __call__(self, strength: float, model: nn.Module) -> bool:
        assert not any(part.training for part in model.modules())
        self.strengths.append(strength)
        self.models.append({name: value.clone() for name, value in model.state_dict().items()})
        self.last = model
        return len(self.strengths) < self.most


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names whose values differ in a single bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}
