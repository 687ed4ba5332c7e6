"""What every way to scrub a model shares: a copy of it, a path with a measured cost, and the point where the thief stops.

A removal walks a *path* of growing strength (epochs, pruned share, noise) and shows every point to an observer, who answers whether to
go on. The thief's observer is :class:`AccuracyBudget`, which sees what he can see: accuracy on his own images. What an owner
sees at the same points (watermark success) is measured beside, and decides nothing.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from meadef_lightning.data.loading import EpochShuffle
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.extraction.base import TensorBatches, as_is
from meadef_lightning.modes import evaluation_mode
from meadef_lightning.quiet import quiet
from meadef_lightning.random_state import kept_random_state
from meadef_lightning.watermark.tilt import evaluating

Observe = Callable[[float, nn.Module], bool]
"""Called with the strength reached and the model there (eval mode); answers whether to go on."""


def device_of(model: nn.Module, otherwise: torch.device | str = "cpu") -> torch.device:
    """Where a model's parameters are, or ``otherwise`` if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device(otherwise))


def logits_of(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """A model's answers ``(N, K)`` to ``x``, in eval mode and on its device, returned on that of ``x``; flags are restored.

    Larger batches than the default fit no CPU's cache, and take up to twice the time for small networks.
    """
    device = device_of(model, x.device)
    with evaluating(model):
        return torch.cat([model(part.to(device)).to(x.device) for part in torch.split(x, batch_size)])


def classes_of(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """The classes that a model answers, int64 ``(N,)``; see :func:`logits_of`."""
    return logits_of(model, x, batch_size).argmax(dim=-1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples that a model answers with their class."""
    return float((classes_of(model, x) == y).float().mean())


def growing(name: str, values: Sequence[float], below: float = math.inf) -> tuple[float, ...]:
    """Checks the strengths of a path whose points are numbers given in advance.

    Args:
        name: What the argument is called.
        values: The strengths.
        below: What all of them must be below.

    Raises:
        ValueError: If there is none, if they do not grow, or if one is not in ``(0, below)``.
    """
    if not values or not 0 < min(values) <= max(values) < below or any(b <= a for a, b in pairwise(values)):
        upper = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(
            f"{name}={list(values)} must be one or more numbers above 0{upper}, each larger than the one before."
        )
    return tuple(values)


DOUBT = 2.0
"""Standard errors by which a measured loss of accuracy must exceed the budget before a walk is given up."""


class AccuracyBudget:
    """The thief's rule: stop where an attack has cost, beyond doubt, more accuracy on his own images than he can bear.

    It keeps the last model within the budget, which is what he takes home. The walk itself goes on while the loss, less two
    standard errors, is within: on 120 images these are five points, and one unlucky epoch among a hundred would otherwise be the end.

    Args:
        model: The model before the attack.
        data: His data.
        points: Accuracy he gives away at most, in ``[0, 1]``.
        to_the_end: Whether to walk to the path's end and take its last point home, whatever it costs: for attacks that are
            :attr:`Removal.from_scratch`.

    Raises:
        ValueError: If ``points`` is out of range.
    """

    def __init__(self, model: nn.Module, data: ThiefData, points: float = 0.05, to_the_end: bool = False) -> None:
        if not 0 <= points <= 1:
            raise ValueError(f"points={points} is a share of accuracy and must lie in [0, 1].")
        self.data, self.points, self.to_the_end = data, points, to_the_end
        self.right = self._right(model)
        self.start = float(self.right.mean())
        self.best = copy.deepcopy(model)
        self.strength = 0.0

    def __call__(self, strength: float, model: nn.Module) -> bool:
        """Measures the model; keeps it if it is within the budget, and answers whether to go on."""
        loss = doubt = 0.0
        if not self.to_the_end:  # whose loss decides nothing
            # paired by image, so that the error is that of the few images whose answer has changed
            lost = self.right - self._right(model)
            loss, doubt = float(lost.mean()), DOUBT * float(lost.std(correction=0)) / math.sqrt(len(lost))
        if loss <= self.points:
            self.best, self.strength = copy.deepcopy(model), strength
        return loss - doubt <= self.points

    def _right(self, model: nn.Module) -> Tensor:
        """1 for each validation image that a model answers with its class, else 0; float64 ``(M,)``."""
        return (classes_of(model, self.data.validation_x) == self.data.validation_y).double()


class Removal(ABC):
    """One way to scrub a model that a thief holds with all its weights.

    Attributes:
        unit: What the strength along the path counts, e.g. ``"epochs"``.
        from_scratch: Whether the path begins with weights that know nothing of the task, so that accuracy rises along it. No budget can
            stop such an attack early: its last point is its result (``AccuracyBudget(..., to_the_end=True)``).
    """

    unit: str = "epochs"
    from_scratch: bool = False

    @abstractmethod
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        """Walks the path.

        Works on a copy: ``model`` is not changed. ``observe`` is called at every point, in order of growing strength, and the walk
        ends when it answers ``False``. Torch's global random state is left as it was.

        Args:
            model: Maps ``(B, C, H, W)`` to logits ``(B, K)``.
            data: The thief's data.
            observe: Told about every point.
            seed: Seed of everything random.
        """

    def gains(self, model: nn.Module, data: ThiefData) -> dict[str, float]:
        """What the thief has won with the model that he takes home, besides its accuracy: names and rates in ``[0, 1]``; mostly nothing."""
        return {}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Gives an untouched model the form in which ``observe`` sees it, so that saved weights can be loaded into it.

        Most removals keep the architecture, and return the model itself.
        """
        return model


class _Path(Callback):
    """Shows the module's model to an observer after every epoch."""

    def __init__(self, observe: Observe, model: Callable[[], nn.Module]) -> None:
        self.observe, self.model = observe, model

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the Trainer when the observer has seen enough."""
        model = self.model()
        # some removals train parts of a model only, and what is measured must not steer what is trained
        with kept_random_state(device_of(model)), evaluation_mode(model):
            if not self.observe(trainer.current_epoch + 1, model):
                trainer.should_stop = True


def train_path(
    module: LightningModule,
    model: nn.Module,
    dataset: tuple[Tensor, ...],
    observe: Observe,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    **trainer: Any,
) -> None:
    """Trains with Lightning, where the model is and stays, and shows it to the observer after every epoch.

    Args:
        module: What is trained; holds ``model`` somewhere.
        model: The scrubbed model.
        dataset: Tensors with as many rows, which become the module's batches, shuffled.
        observe: Told about every epoch.
        epochs: Most epochs.
        batch_size: Samples a step; a last smaller batch is left out unless it is the only one.
        seed: Seed of order and of everything else random.
        **trainer: Further arguments of the Trainer.
    """
    device = device_of(model)
    options: dict[str, Any] = {
        "accelerator": device.type,
        "devices": 1 if device.index is None else [device.index],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    with kept_random_state(device), quiet():
        torch.manual_seed(seed)
        # said of what is meant here: layers that are not tuned, and students without held-out images
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        rows = TensorBatches(*dataset)
        loader = DataLoader(
            rows,
            batch_size=min(batch_size, len(rows)),
            sampler=EpochShuffle(rows, seed),
            collate_fn=as_is,
            drop_last=True,
            generator=torch.Generator(),
        )
        callbacks = [_Path(observe, lambda: model), *trainer.pop("callbacks", [])]
        Trainer(max_epochs=epochs, callbacks=callbacks, **(options | trainer)).fit(module, loader)
    model.to(device)  # Lightning leaves it on the CPU
