"""Distilling again: a second extraction, from the model that the thief already holds into a network that knows nothing.

**Source.** Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), used as a removal attack, e.g. in Lukas et al., "SoK: How
Robust is Image Classification Deep Neural Network Watermarking?" (S&P 2022). A watermark that is made to survive extraction has to survive it
twice.

**Algorithm.** 1. Ask the model about the thief's images, once. 2. Take a network of the same architecture with new random weights, or another
``network``. 3. Train it on the answers (:func:`~meadef_lightning.extraction.student.distillation_loss`) with one cycle of the learning
rate (:class:`~meadef_lightning.extraction.student.Student`).

**Cost.** ``epochs`` passes over the thief's images. No query: the model is his.

**Defaults.** Soft answers at temperature 1, 60 epochs of AdamW with a peak of 3e-3 in batches of 64, as students of a first
extraction are trained here. An augmentation lets the student see each image anew in every epoch, under the answer to the plain image.

**Pitfalls.** Accuracy is low at first (:attr:`~meadef_lightning.removal.base.Removal.from_scratch`), and with few images it stays below the
model's: state both. A copy of the architecture must not keep a single stolen weight or running statistic; parts that cannot draw
new weights are refused. Published code often goes on from the stolen weights and calls it distillation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.extraction.student import Student
from meadef_lightning.random_state import kept_random_state
from meadef_lightning.removal.base import Observe, Removal, classes_of, device_of, logits_of, train_path
from meadef_lightning.removal.finetuning import check_training
from meadef_lightning.removal.layers import reset
from meadef_lightning.victims.classifier import NetworkFactory


class _Student(Student):
    """A student that sees every batch augmented on its device."""

    augment: Callable[[Tensor], Tensor]

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments the images, not the answers."""
        x, answers = batch
        return self.augment(x), answers


class DistilAgain(Removal):
    """Trains a fresh network on the model's own answers; see the module's documentation.

    Args:
        network: Makes the network, called with the numbers of classes and of input channels; by default the model's own
            architecture with new weights.
        answers: ``"soft"``: the model's probabilities, or ``"hard"``: its classes.
        temperature: Temperature of soft answers.
        epochs: Passes over the thief's images.
        batch_size: Images a step.
        augmentation: Maps a batch of images to one of the same shape, drawing from torch's global generator.
        optimizer: Makes the optimiser; its learning rate is the peak of one cycle over the run.

    Raises:
        ValueError: If an argument is unknown or out of range; in :meth:`scrub`, if the architecture cannot draw new weights.
    """

    from_scratch = True

    def __init__(
        self,
        network: NetworkFactory | None = None,
        answers: Literal["soft", "hard"] = "soft",
        temperature: float = 1.0,
        epochs: int = 60,
        batch_size: int = 64,
        augmentation: nn.Module | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
    ) -> None:
        if answers not in ("soft", "hard"):
            raise ValueError(f"answers={answers!r} must be 'soft' or 'hard'.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be positive and finite.")
        check_training(epochs, batch_size)
        self.network, self.answers, self.temperature = network, answers, temperature
        self.epochs, self.batch_size, self.augmentation, self.optimizer = epochs, batch_size, augmentation, optimizer

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        answers = self._answers(model, data)
        fresh = self._network(model, data, seed)
        student = _Student(fresh, temperature=self.temperature, optimizer=self.optimizer)
        student.augment = nn.Identity() if self.augmentation is None else copy.deepcopy(self.augmentation)
        train_path(
            student, fresh, (data.x, answers), observe, epochs=self.epochs, batch_size=self.batch_size, seed=seed
        )

    def _answers(self, model: nn.Module, data: ThiefData) -> Tensor:
        soft = self.answers == "soft"
        return logits_of(model, data.x).float().softmax(dim=-1) if soft else classes_of(model, data.x)

    def _network(self, model: nn.Module, data: ThiefData, seed: int) -> nn.Module:
        if self.network is None:
            fresh = copy.deepcopy(model)
            reset(fresh, seed)
        else:
            with kept_random_state(device_of(model)):
                torch.manual_seed(seed)
                fresh = self.network(data.num_classes, data.x.shape[1]).to(device_of(model))
        return fresh.train().requires_grad_(True)

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Makes the other network, if one was given, in the sizes of the model at hand.

        Raises:
            ValueError: If a network was given, and the model does not tell its sizes.
        """
        if self.network is None:
            return model
        linear = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
        convolutions = [layer.in_channels for layer in model.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
        in_channels = getattr(model, "in_channels", convolutions[0] if convolutions else None)
        if not linear or in_channels is None:
            raise ValueError(
                f"{type(model).__name__} does not tell its numbers of classes (of the last nn.Linear) and of input channels (attribute "
                "in_channels, or first convolution), which the new network is made with. Distil into the same architecture (network=None)."
            )
        with kept_random_state():
            return self.network(linear[-1], in_channels).to(device_of(model))
