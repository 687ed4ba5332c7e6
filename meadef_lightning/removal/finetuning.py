"""Fine-tuning: the thief trains on with his own clean images, and hopes that the watermark is forgotten.

**Source.** Adi et al., "Turning Your Weakness Into a Strength" (USENIX Security 2018), §5: the four modes; MEA-Defender (S&P 2024),
§V-E, which tunes for up to 100 epochs.

**Algorithm.** 1. Copy the model. 2. With ``RT…``, give the last linear layer new weights. 3. Minimise cross-entropy on the thief's
images, over all layers (``…AL``) or the last one alone (``…LL``), epoch after epoch.

| mode | last layer | what is tuned | default labels | epochs |
|---|---|---|---|---|
| ``FTAL`` | kept | all layers | true | 5 |
| ``FTLL`` | kept | last layer | true | 5 |
| ``RTAL`` | reset | all layers | the model's own | 5 |
| ``RTLL`` | reset | last layer | the model's own | 10 |

**Cost.** ``epochs`` passes over the thief's images.

**Defaults.** Labels, epochs and batch of 64 as in a public survey of removal attacks, and its learning rate of 1e-3, which here is
Adam's: with SGD it hardly moves a model in so few steps, and an attack that does nothing is no test. For SGD with the usual
momentum give ``optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9}}``.

**Pitfalls.** With all layers tuned, BatchNorm goes on learning its running statistics, as in any training. In the ``…LL`` modes everything
but the last layer is in eval mode: published code often leaves the others in training mode, where running statistics move and
dropout stays on, so that a "frozen" feature extractor is not. ``RT…`` begins far below the model's accuracy
(:attr:`~meadef_lightning.removal.base.Removal.from_scratch`). Fine-tuning on labels of the model itself teaches it nothing new about clean
images; what it forgets is off their manifold. The learning rate decides: on digits, a plain patch backdoor was untouched by 5 epochs of SGD
at 1e-3 (momentum 0.9), kept 96 % under Adam at 1e-3, and 5 % after 8 epochs of SGD at 0.2, which cost 6 points of accuracy. Try several,
and let the accuracy budget choose.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, classes_of, train_path
from meadef_lightning.removal.layers import last_linear, reset

Mode = Literal["FTAL", "FTLL", "RTAL", "RTLL"]


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Adam with a learning rate of 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)


def check_training(epochs: int, batch_size: int) -> None:
    """Raises a ``ValueError`` unless both are at least 1."""
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be at least 1.")


class Tuner(LightningModule):
    """Cross-entropy on batches ``(x, y)``, and nothing else: what a thief tunes a model with.

    Args:
        model: Maps ``(B, C, H, W)`` to logits; layers that are in eval mode stay there.
        optimizer: Makes the optimiser from the parameters that ask for gradients.
        callbacks: Handed to the Trainer.
        augmentation: Maps images to images of the same shape, anew in every step. ``None``: they are seen as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable,
        callbacks: Sequence[Callback] = (),
        augmentation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.augment = nn.Identity() if augmentation is None else copy.deepcopy(augmentation).train()
        self._optimizer, self._callbacks = optimizer, list(callbacks)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, K)`` logits."""
        logits: Tensor = self.model(x)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self(self.augment(x)), y)

    @override
    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Hands the callbacks to the Trainer."""
        return self._callbacks

    @override
    def configure_optimizers(self) -> Optimizer:
        """Builds the optimiser."""
        return self._optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])


class FineTuning(Removal):
    """Trains on with the thief's images; see the module's documentation.

    Args:
        mode: ``"FTAL"``, ``"FTLL"``, ``"RTAL"`` or ``"RTLL"``.
        labels: ``"true"``, or ``"model"`` for the classes that the model itself answers before it is changed. ``None``: the mode's.
        epochs: Passes over the thief's images. ``None``: the mode's.
        batch_size: Images a step.
        optimizer: Makes the optimiser from the parameters that are tuned.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    def __init__(
        self,
        mode: Mode = "FTAL",
        labels: Literal["true", "model"] | None = None,
        epochs: int | None = None,
        batch_size: int = 64,
        optimizer: OptimizerCallable = adam,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} must be one of {get_args(Mode)}.")
        if labels not in ("true", "model", None):
            raise ValueError(f"labels={labels!r} must be 'true', 'model', or None for the mode's own.")
        self.mode = mode
        self.from_scratch = mode.startswith("RT")
        self.labels = labels or ("model" if self.from_scratch else "true")
        self.epochs = epochs if epochs is not None else 10 if mode == "RTLL" else 5
        self.batch_size, self.optimizer = batch_size, optimizer
        check_training(self.epochs, batch_size)

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        y = data.y if self.labels == "true" else classes_of(model, data.x)
        tuned = self._copy(model, data.x[:2], seed)
        module = Tuner(tuned, self.optimizer)
        train_path(module, tuned, (data.x, y), observe, epochs=self.epochs, batch_size=self.batch_size, seed=seed)

    def _copy(self, model: nn.Module, x: Tensor, seed: int) -> nn.Module:
        """Copies the model; what is to be tuned is in training mode and asks for gradients, the rest does neither."""
        tuned = copy.deepcopy(model)
        whole = self.mode.endswith("AL")
        tuned.train(whole).requires_grad_(whole)
        if self.mode != "FTAL":
            last = last_linear(tuned, x)
            if self.from_scratch:
                reset(last, seed)
            last.train().requires_grad_(True)
        return tuned
