"""Somebody else's modules, which know nothing of watermarks, and their twins with the term written by hand.

The twin adds the same samples that the callback drew, with losses written here from the formulas. Both then see the same
numbers in the same order, so their weights must agree bit for bit.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from silent import SILENT
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from meadef_lightning.watermark import Fixed, WatermarkCallback, WatermarkKey
from meadef_lightning.watermark.objective import WatermarkObjective

torch.set_num_threads(1)  # faster for models this small, and one order of summation everywhere

CLASSES, PER_EPOCH, BATCH = 5, 6, 8
SALT = "5a17" * 8
KEY = WatermarkKey(source_classes=(1, 3), target_class=4, num_classes=CLASSES, seed=7, salt=SALT)
ALL_TERMS = Fixed(ver=1.0, com=0.5, eva=0.75)


@dataclass
class Sample:
    image: Tensor
    label: Tensor


NamedSample = namedtuple("NamedSample", ["image", "label"])

FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"id": y, "image": x, "label": y},
    "dataclass": Sample,
    "namedtuple": NamedSample,
}
FIELDS = {"input_key": "image", "target_key": "label"}
KEYS: dict[str, dict[str, Any]] = {
    "tuple": {},
    "list": {"input_key": 0, "target_key": -1},
    "dict": FIELDS,
    "dataclass": FIELDS,
    "namedtuple": {"input_key": lambda batch: batch.image, "target_key": 1},
}


class Images(Dataset):
    """48 random 8x8 images of five classes; every batch of 8 has all classes."""

    def __init__(
        self, shape: tuple[int, ...] = (1, 8, 8), classes: int = CLASSES, size: int = BATCH * PER_EPOCH
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.y = torch.arange(size) % classes
        self.x = torch.randn(size, *shape, generator=generator) + self.y.view(-1, *[1] * len(shape)) / 2

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def loader(form: str = "tuple", batch_size: int = BATCH, **images: Any) -> DataLoader:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = zip(*samples, strict=True)
        return FORMS[form](torch.stack(x), torch.stack(y))

    return DataLoader(Images(**images), batch_size=batch_size, collate_fn=collate)


class UserModule(LightningModule):
    """Convolution, BatchNorm, dropout and a linear layer, trained by SGD with momentum; reads any of :data:`FORMS`."""

    def __init__(self, dropout: float = 0.2, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.batch_size = BATCH
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).flatten(1))

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            x, y = batch["image"], batch["label"]
        else:
            x, y = (batch.image, batch.label) if isinstance(batch, Sample) else batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


Draw = dict[str, Tensor]
"""The groups of samples of one step, and under ``"labels"`` those of the other combinations."""


@contextmanager
def recorded_draws() -> Iterator[list[Draw]]:
    """Lists what every objective draws inside the block."""
    draws: list[Draw] = []
    original = WatermarkObjective.draw

    def draw(self: WatermarkObjective) -> None:
        original(self)
        labels = {} if self._evasion_labels is None else {"labels": self._evasion_labels.clone()}
        draws.append({name: group.clone() for name, group in self._groups.items()} | labels)

    WatermarkObjective.draw = draw  # type: ignore[method-assign]
    try:
        yield draws
    finally:
        WatermarkObjective.draw = original  # type: ignore[method-assign]


def written_term(
    module: nn.Module, forward: Callable[[Tensor], Tensor], draw: Draw, weights: Mapping[str, float]
) -> Tensor:
    """``ver·L_ver + com·L_com + eva·L_eva`` by hand."""
    order = [name for name in ("watermark", "other", "first", "second") if name in draw]
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.eval()
    parts = dict(zip(order, forward(torch.cat([draw[name] for name in order])).chunk(len(order)), strict=True))
    for layer in norms:
        layer.train()
    wm = parts["watermark"]
    term = weights["ver"] * F.cross_entropy(wm, torch.full((len(wm),), KEY.target_class))
    if "first" in parts:
        answer, sources = (
            F.log_softmax(wm, -1),
            [F.log_softmax(parts[name].detach(), -1) for name in ("first", "second")],
        )
        term = term + weights["com"] * sum(
            F.kl_div(source, answer, reduction="batchmean", log_target=True) for source in sources
        )
    if "other" in parts:
        term = term + weights["eva"] * F.cross_entropy(parts["other"], draw["labels"])
    return term


def with_term(kind: type[UserModule]) -> type[UserModule]:
    """Returns ``kind`` with the term written into its ``training_step``; set ``plan`` (batch → draw) on the instance."""

    class Twin(kind):  # type: ignore[misc, valid-type]
        plan: Mapping[int, Draw]
        weights: Mapping[str, float] = ALL_TERMS.weights

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            draw = self.plan.get(self.trainer.fit_loop.total_batch_idx)
            if draw is None or output is None:
                return output
            loss = output["loss"] if isinstance(output, Mapping) else output
            total = loss + written_term(self, self, draw, self.weights)
            return {**output, "loss": total} if isinstance(output, Mapping) else total

    return Twin


def fit(
    module: LightningModule, callbacks: Any = (), data: Any = None, ckpt_path: str | None = None, **flags: Any
) -> Trainer:
    """Trains ``module`` from a fixed seed for two epochs (12 batches) if nothing else is said."""
    flags = {**SILENT, **({} if {"max_epochs", "max_steps"} & set(flags) else {"max_epochs": 2}), **flags}
    trainer = Trainer(callbacks=list(callbacks), **flags)
    seed_everything(1, verbose=False)
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def make(kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Builds a module with the same initial weights every time."""
    seed_everything(0, verbose=False)
    return kind(*args, **kwargs)


def callback(**options: Any) -> WatermarkCallback:
    return WatermarkCallback(
        KEY, **{"start": 0.0, "samples": 4, "balancing": ALL_TERMS, "batchnorm": "running", "tilt": 0.0, **options}
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]) -> None:
    """Asserts that all parameters and buffers agree bit for bit."""
    a, b = (weights(m) if isinstance(m, nn.Module) else m for m in (a, b))
    assert list(a) == list(b)
    different = {
        name: (a[name].double() - b[name].double()).abs().max().item()
        for name in a
        if not torch.equal(a[name], b[name])
    }
    assert not different


def assert_clean(module: LightningModule) -> None:
    """Asserts that nothing of ours is left on the module."""
    for name, value in vars(module).items():
        assert not hasattr(value, "_wrapped_by"), name


def assert_equals_twin(
    kind: type[UserModule],
    options: Mapping[str, Any] | None = None,
    steps: range | list[int] | None = None,
    data: Callable[[], Any] = loader,
    companions: Callable[[], list[Any]] = list,
    around: Callable[[Any], Any] = lambda module: module,
    **flags: Any,
) -> UserModule:
    """Asserts that ``kind`` under the callback ends with the weights of its twin, bit for bit.

    Args:
        kind: The user's module.
        options: Of the callback.
        steps: The batches that must be watermarked; all if not given.
        data: Makes the loader.
        companions: Makes what has to be made anew for each Trainer: the other callbacks.
        around: Applied to the module, not to the twin, before ``fit``.
        **flags: Of the Trainer; a function is called for each Trainer.

    Returns:
        The trained module.
    """
    module, twin = make(kind), make(with_term(kind))

    def each() -> dict[str, Any]:
        return {name: flag() if callable(flag) else flag for name, flag in flags.items()}

    with recorded_draws() as draws:
        fit(around(module), [callback(**(options or {})), *companions()], data(), **each())
    assert draws
    twin.plan = dict(zip(range(len(draws)) if steps is None else steps, draws, strict=True))
    twin.weights = (options or {}).get("balancing", ALL_TERMS).weights
    fit(twin, companions(), data(), **each())
    assert_same(module, twin)
    assert_clean(module)
    return module
