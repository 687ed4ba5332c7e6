"""Spectral signatures: queries that stand out along the direction in which the features of a class vary most.

**Source.** "Spectral Signatures in Backdoor Attacks" (Tran, Li & Madry, NeurIPS 2018), Algorithm 1.

**Algorithm.** For each class that the model answers:

1. Put the queries that it answers with this class together with the thief's clean images that it answers so.
2. Centre their penultimate features and find the top right singular vector ``v`` of the matrix they form.
3. The score of a row is ``⟨f − f̄, v⟩²``.
4. Divide by the mean score of the clean images, so that classes can be compared.

**Cost.** One forward pass a query, one singular value decomposition a class.

**Defaults.** The paper cleans a training set in which few samples of a class are marked: it centres by the mean of all rows and drops the
``1.5 ε`` largest scores of each class. A thief screens queries instead, and has images that he knows are clean: here the centre is
their mean, so that queries of which most are marked do not become the norm, and the threshold is a quantile on clean images.
A class with fewer than two clean images is compared with all clean images.

**Pitfalls.** Scores depend on all queries that are asked together. Marked queries that fill one direction of a class's clean variation cannot be
told from it; a few among many stay below that variation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.inputs import CalibratedDetector, features_and_classes


def spectral_scores(features: Tensor, centre: Tensor | None = None) -> Tensor:
    """Squared projections on the top right singular vector of centred features.

    Args:
        features: ``(N, D)``, ``N >= 1``.
        centre: ``(D,)``; by default their mean, as in the paper.

    Returns:
        float64 ``(N,)``.
    """
    rows = features.double()
    rows = rows - (rows.mean(dim=0) if centre is None else centre.double())
    top = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    scores: Tensor = (rows @ top).square()
    return scores


class SpectralSignatures(CalibratedDetector):
    """Outliers along the top singular direction of each answered class.

    Args:
        false_alarms: Share of clean images that may be called watermark samples.
        batch_size: Images a forward pass.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, false_alarms: float = 0.05, batch_size: int = 512) -> None:
        super().__init__(false_alarms)
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1.")
        self.batch_size = batch_size

    @override
    def learn(self, model: nn.Module, data: ThiefData, seed: int) -> None:
        """Keeps the clean images' features."""
        self._features, self._classes = features_and_classes(model, data.x, self.batch_size)

    @override
    def suspicion(self, model: nn.Module, x: Tensor) -> Tensor:
        """Squared projections relative to clean ones', ``(N,)``; the queries are looked at together."""
        features, classes = features_and_classes(model, x, self.batch_size)
        scores = torch.zeros(len(x), dtype=torch.float64)
        for value in torch.unique(classes):
            asked, known = classes == value, self._features[self._classes == value]
            if len(known) < 2:
                known = self._features
            joint = spectral_scores(torch.cat([known, features[asked]]), known.mean(dim=0))
            clean = joint[: len(known)].mean().clamp_min(torch.finfo(torch.float64).tiny)
            scores[asked] = joint[len(known) :] / clean
        return scores.clamp_max(torch.finfo(torch.float32).max)
