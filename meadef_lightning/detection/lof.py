"""Local outlier factor: queries whose features lie where clean images are sparse.

**Source.** The attack in MEA-Defender's own evaluation (Lv et al., S&P 2024); the factor is that of Breunig et al. (SIGMOD 2000).

**Algorithm.**

1. Take the penultimate features of the thief's clean images, all classes together.
2. A query's score is its local outlier factor among them: how much sparser its surroundings are than those of its ``k`` nearest
   clean neighbours; about 1 for an inlier.
3. The threshold is the factor that a share ``false_alarms`` of the images set aside exceeds.

**Cost.** One forward pass and one neighbour search a query.

**Defaults.** The paper names no ``k``; 20 is scikit-learn's, and within the range that the factor's authors advise. The watermark's paper reads its
results off at false-positive rates of .50 and .75; here the rate is ``false_alarms``, and with a hundred images set aside, 0.05 is about as
small as a quantile can be told.

**Pitfalls.** Novelty, not outlier, detection: a query must not be among the samples that it is compared with, or many marked queries are each
other's neighbours and look dense. In a model without any watermark, unusual images score high, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.inputs import CalibratedDetector, features_and_classes


class LocalOutlierFactor(CalibratedDetector):
    """Local outlier factor among clean features.

    Args:
        neighbors: ``k``; below the number of the thief's images.
        false_alarms: Share of clean images that may be called watermark samples.
        batch_size: Images a forward pass.

    Raises:
        ValueError: If an argument is out of range, or (in `fit`) there are no more images than neighbours.
    """

    def __init__(self, neighbors: int = 20, false_alarms: float = 0.05, batch_size: int = 512) -> None:
        super().__init__(false_alarms)
        if min(neighbors, batch_size) < 1:
            raise ValueError(f"{neighbors=} and {batch_size=} must be at least 1.")
        self.neighbors, self.batch_size = neighbors, batch_size

    @override
    def learn(self, model: nn.Module, data: ThiefData, seed: int) -> None:
        """Finds every clean image's neighbourhood."""
        from sklearn import neighbors

        if self.neighbors >= len(data.x):
            raise ValueError(
                f"neighbors={self.neighbors} must be below the number of clean images, {len(data.x)}. Lower it, or enlarge the "
                "attacker split (attacker_size)."
            )
        features, _ = features_and_classes(model, data.x, self.batch_size)
        self._factor = neighbors.LocalOutlierFactor(n_neighbors=self.neighbors, novelty=True).fit(features.numpy())

    @override
    def suspicion(self, model: nn.Module, x: Tensor) -> Tensor:
        """Local outlier factors, ``(N,)``."""
        features, _ = features_and_classes(model, x, self.batch_size)
        return torch.from_numpy(-self._factor.score_samples(features.numpy()))
