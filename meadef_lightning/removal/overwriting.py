"""Overwriting: the thief embeds a watermark of his own into the stolen model, with the owner's tool and a key that he draws.

**Source.** Overwriting is a standard test of watermarks, e.g. Uchida et al., "Embedding Watermarks into Deep Neural Networks" (ICMR 2017),
and Lukas et al., "SoK: How Robust is Image Classification Deep Neural Network Watermarking?" (S&P 2022). Here the second watermark is
of the same kind as the first (:class:`~meadef_lightning.watermark.callback.WatermarkCallback`).

**Algorithm.** 1. Draw a key from the thief's secret (:meth:`Overwriting.key`). 2. Copy the model. 3. Fine-tune all layers on his clean images with
the callback attached from the first step on.

**Cost.** As fine-tuning, with ``samples`` combinations and four times as many other samples more in every step.

**Defaults.** The callback's, but for ``start=0``, since the model is trained already; BatchNorm frozen, so that clean accuracy pays little.
Cross-entropy without label smoothing and hence, as the callback advises, ``tilt`` 0.25. 10 epochs of Adam with 1e-3, batches of 64.

**Pitfalls.** That the second watermark is learnt does not mean that the first is gone: measure both. Nor does a model with two watermarks
settle who was first; the owner's dated commitment to his key does. The thief's evasion loss calls combinations in all ways but his own
by their sources, but of *his* two classes only: it can hit the owner's watermark where the keys share both sources.
"""

from __future__ import annotations

import copy

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, classes_of, train_path
from meadef_lightning.removal.finetuning import Tuner, adam, check_training
from meadef_lightning.watermark.callback import WatermarkCallback
from meadef_lightning.watermark.key import WatermarkKey


class Overwriting(Removal):
    """Embeds a second key while the model is fine-tuned; see the module's documentation.

    Args:
        secret: The thief's own secret, from which his key is drawn. It protects nothing, so it may stand in a configuration.
        epochs: Passes over the thief's images.
        batch_size: Clean images a step.
        samples: Watermark samples a step.
        tilt: Most probability that natural samples of his source classes give to his target, in ``[0, 1)``.
        optimizer: Makes the optimiser from all parameters.

    Raises:
        ValueError: If a number is out of range or the secret empty.
    """

    def __init__(
        self,
        secret: str = "a thief's own secret",  # noqa: S107 - no password: it is the attacker's, and public
        epochs: int = 10,
        batch_size: int = 64,
        samples: int = 8,
        tilt: float = 0.25,
        optimizer: OptimizerCallable = adam,
    ) -> None:
        check_training(epochs, batch_size)
        self.secret, self.epochs, self.batch_size = secret, epochs, batch_size
        self.samples, self.tilt, self.optimizer = samples, tilt, optimizer
        self._callback(self.key(3))  # refuses bad arguments now, and not after hours of training a victim

    def key(self, num_classes: int) -> WatermarkKey:
        """The thief's key for a task of ``num_classes`` classes, with which the second watermark is verified."""
        return WatermarkKey.draw(num_classes, self.secret)

    def _callback(self, key: WatermarkKey) -> WatermarkCallback:
        return WatermarkCallback(key, start=0.0, samples=self.samples, tilt=self.tilt, batchnorm="frozen")

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        tuned = copy.deepcopy(model).train().requires_grad_(True)
        module = Tuner(tuned, self.optimizer, [self._callback(self.key(data.num_classes))])
        train_path(module, tuned, (data.x, data.y), observe, epochs=self.epochs, batch_size=self.batch_size, seed=seed)

    @override
    def gains(self, model: nn.Module, data: ThiefData) -> dict[str, float]:
        """Success of the thief's own watermark: combinations of validation images that the model answers with his target."""
        key = self.key(data.num_classes)
        a, b = (data.validation_x[data.validation_y == label] for label in key.source_classes)
        pairs = min(len(a), len(b))
        if not pairs:
            return {}  # he has no image to show it with
        combined = key.combiner.build()(a[:pairs], b[:pairs], torch.Generator().manual_seed(key.seed))
        return {"success of his own key": float((classes_of(model, combined) == key.target_class).float().mean())}
