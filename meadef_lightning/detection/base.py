"""What every search for a watermark ends in: scores first, a decision at the method's own threshold second."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from meadef_lightning.data.thief import ThiefData


@dataclass(frozen=True, eq=False)
class Finding:
    """What a search in one model found.

    Args:
        score: How suspicious the model is; higher is more.
        threshold: The method's published threshold.
        decision: Whether the model is called marked.
        classes: Score of each class, shape ``(K,)``; higher is more suspicious.
        flagged: The classes that are called targets.
        pictures: Inverted triggers, shape ``(K, C, H, W)`` in the model's input space, or ``None``.
    """

    score: float
    threshold: float
    decision: bool
    classes: Tensor
    flagged: tuple[int, ...] = ()
    pictures: Tensor | None = None


class ModelDetector(ABC):
    """Looks for a watermark in a model, with its weights and clean images in hand."""

    @abstractmethod
    def inspect(self, model: nn.Module, data: ThiefData, seed: int = 0) -> Finding:
        """Searches a model.

        Args:
            model: Maps ``(B, C, H, W)`` to logits ``(B, K)``; put into eval mode, its parameters left as they are.
            data: The thief's data.
            seed: Seed of everything random; torch's global random state is left as it was.
        """


class InputDetector(ABC):
    """Looks for watermark samples among queries."""

    @abstractmethod
    def fit(self, model: nn.Module, data: ThiefData, seed: int = 0) -> None:
        """Learns what clean inputs look like to the model, from the thief's own clean images."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Scores queries, asked together.

        Args:
            x: Queries, shape ``(N, C, H, W)``.

        Returns:
            Suspicion of each, float32 ``(N,)``; higher is more.
        """

    @property
    @abstractmethod
    def threshold(self) -> float:
        """Scores above it are called watermark samples; set by :meth:`fit` at the method's share of false alarms."""


def anomaly_index(values: ArrayLike) -> np.ndarray:
    """Distance of each value from the median in units of 1.4826 times the median absolute deviation, signed.

    Neural Cleanse (Wang et al., S&P 2019, §IV-A) flags the small ones beyond −2. Where the deviation is 0, values at the median get 0
    and the others an infinite index of their sign.

    Args:
        values: Shape ``(K,)``.

    Returns:
        float64 of shape ``(K,)``.
    """
    array = np.asarray(values, dtype=np.float64)
    distance = array - np.median(array)
    scale = 1.4826 * np.median(np.abs(distance))
    with np.errstate(divide="ignore", invalid="ignore"):
        index = np.where(distance == 0, 0.0, distance / scale)
    return np.asarray(index)


def roc_auc(marked: ArrayLike | Tensor, clean: ArrayLike | Tensor) -> float:
    """Probability that a marked one is scored above a clean one, ties half (area under the ROC curve).

    Args:
        marked: Scores of watermark samples or marked models, shape ``(n,)``, ``n >= 1``.
        clean: Scores of clean ones, shape ``(m,)``, ``m >= 1``.
    """
    from sklearn.metrics import roc_auc_score

    marked, clean = np.asarray(marked, dtype=np.float64), np.asarray(clean, dtype=np.float64)
    # scikit-learn refuses infinite scores, whose order is all that matters
    scores = np.nan_to_num(np.concatenate([marked, clean]), posinf=1e300, neginf=-1e300)
    return float(roc_auc_score(np.r_[np.ones(len(marked)), np.zeros(len(clean))], scores))


def without_training(model: nn.Module) -> nn.Module:
    """Puts a model into eval mode with parameters that ask for no gradient: a copy, so that the caller's is left alone."""
    frozen = copy.deepcopy(model).eval()
    return frozen.requires_grad_(False)
