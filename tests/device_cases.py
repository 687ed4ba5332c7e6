"""Small models and data that device tests put on the CPU and on the second device, and the comparison of what came out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from second_device import SECOND
from torch import Tensor, nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.data.thief import ThiefData

CLASSES = 4


def images(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 32) -> Tensor:
    return torch.arange(count) % CLASSES


def network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, CLASSES),
        )  # fmt: skip
    with torch.no_grad():
        model[-1].bias -= model(images()).mean(0)  # there are running statistics now, and every class is answered
    return model.eval()


def thief() -> ThiefData:
    low, high = torch.full((1, 1, 1), -3.0), torch.full((1, 1, 1), 3.0)
    return ThiefData(images(), labels(), images(16, seed=1), labels(16), CLASSES, low, high)


class Blobs(SplitDataModule):
    """Coarse images of four classes."""

    class_names = ("a", "b", "c", "d")
    image_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__(batch_size=20, victim_size=40, attacker_size=40, verification_size=40, validation_size=20)

    def load(self) -> tuple[TensorImages, TensorImages]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (200, 1, 2, 2), generator=generator, dtype=torch.uint8)
        pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return TensorImages(pixels[:140], labels(140)), TensorImages(pixels[140:], labels(60))


def there(value: Any) -> Any:
    """The value on the second device, whatever holds tensors."""
    if isinstance(value, Tensor):
        return value.to(SECOND)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(SECOND)
    if isinstance(value, ThiefData):
        return replace(value, **{name: there(part) for name, part in vars(value).items() if torch.is_tensor(part)})
    return type(value)(map(there, value)) if isinstance(value, (tuple, list)) else value


def assert_same(found: Any, expected: Any, device: torch.device | None = None) -> None:
    """Asserts equality to the bit, and where given the device of every tensor that was found."""
    if isinstance(expected, Tensor):
        assert device is None or found.device == device
        assert torch.equal(found.cpu(), expected)
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, device)
    elif isinstance(expected, dict):
        assert_same([*found.values()], [*expected.values()], device)
    else:
        assert found == expected
