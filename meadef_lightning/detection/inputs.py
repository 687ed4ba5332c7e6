"""What the searches among queries share: looking into a model's last layer, and a threshold set on clean images.

A search learns from the thief's working images what clean inputs look like, and its threshold from the images he has set aside:
the score that at most a chosen share of these exceeds. That share is what a false alarm costs him: refused customers.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import InputDetector, without_training
from meadef_lightning.watermark.tilt import penultimate_features


def alarm_threshold(scores: Tensor, false_alarms: float) -> float:
    """The least score that at most a share of the given ones exceeds.

    Args:
        scores: Scores of clean inputs, ``(M,)``.
        false_alarms: The share, in ``[0, 1)``.
    """
    # an own score of one of them rather than a value between two, so that ties never raise more alarms than asked for
    return float(torch.quantile(scores.double(), 1 - false_alarms, interpolation="higher"))


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def features_and_classes(model: nn.Module, x: Tensor, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """A model's penultimate features and its answers, from one forward pass.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``; in eval mode.
        x: Images, ``(N, C, H, W)``.
        batch_size: Images a forward pass.

    Returns:
        Inputs of the last ``nn.Linear`` that runs, float32 ``(N, D)``, and classes, int64 ``(N,)``, both on the CPU.

    Raises:
        MisconfigurationException: If no ``nn.Linear`` runs.
    """
    features, classes = [], []

    def answer(part: Tensor) -> Tensor:
        logits: Tensor = model(part)
        classes.append(logits.argmax(dim=-1).cpu())
        return logits

    for part in torch.split(x, batch_size):
        try:
            inputs = penultimate_features(model, answer, part.to(device_of(model)))
        except ValueError as error:
            raise MisconfigurationException(
                f"{type(model).__name__} runs no nn.Linear on its images, so it has no penultimate features to look at. Let it end in "
                "an nn.Linear, or use a detector that looks at answers only (STRIP, UAPConsistency)."
            ) from error
        features.append(inputs.flatten(1).float().cpu())
    return torch.cat(features), torch.cat(classes)


class CalibratedDetector(InputDetector):
    """A search among queries whose threshold is set on clean images.

    Args:
        false_alarms: Share of clean images that may score above the threshold, in ``[0, 1)``.

    Raises:
        ValueError: If it is out of range.
    """

    def __init__(self, false_alarms: float) -> None:
        if not 0 <= false_alarms < 1:
            raise ValueError(f"false_alarms={false_alarms} is a share of clean images and must lie in [0, 1).")
        self.false_alarms = false_alarms
        self._model: nn.Module | None = None
        self._threshold: float | None = None

    @abstractmethod
    def learn(self, model: nn.Module, data: ThiefData, seed: int) -> None:
        """Looks at the clean images ``data.x``; ``model`` is in eval mode, and nobody else's."""

    @abstractmethod
    def suspicion(self, model: nn.Module, x: Tensor) -> Tensor:
        """Scores queries as :meth:`score` does, with the model that was learnt from."""

    @override
    def fit(self, model: nn.Module, data: ThiefData, seed: int = 0) -> None:
        """Learns from the thief's working images, and sets the threshold on those set aside."""
        self._model = without_training(model)
        self.learn(self._model, data, seed)
        self._threshold = alarm_threshold(self.score(data.validation_x), self.false_alarms)

    @override
    def score(self, x: Tensor) -> Tensor:
        """Scores queries.

        Raises:
            MisconfigurationException: Before :meth:`fit`.
        """
        if self._model is None:
            raise MisconfigurationException(f"{type(self).__name__} knows no model yet: call fit(model, data) first.")
        return self.suspicion(self._model, x).float().cpu()

    @property
    @override
    def threshold(self) -> float:
        if self._threshold is None:
            raise MisconfigurationException(f"{type(self).__name__} has no threshold yet: call fit(model, data) first.")
        return self._threshold
