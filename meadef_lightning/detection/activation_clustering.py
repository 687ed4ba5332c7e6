"""Activation clustering: do the samples that a class is answered for fall into two groups, one of them without clean images?

**Source.** "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering" (Chen et al., SafeAI 2019), Algorithm 1 and §4.2.

**Algorithm.** For each class that the model answers:

1. Put the queries that it answers with this class together with the thief's clean images that it answers so.
2. Reduce their penultimate features to ``dimensions`` principal components, and cut them in two by k-means, in which the clean images
   weigh no less than the queries.
3. A cut means something if the two groups are far apart: the silhouette ``s``, from −1 to 1.
4. A group is suspicious if few of the clean images are in it: with ``q`` the share of them that is, its members score
   ``max(s, 0) · (1 − q)``.

**Cost.** One forward pass a query; principal components, k-means and silhouette a class.

**Defaults.** Ten dimensions as in the paper, which reduces by independent components; principal components are what most of its users take,
since they always converge. The paper cleans a training set in which less than half of a class is marked, so it calls the smaller
group poisonous, by its relative size and the silhouette. A thief screens queries instead, and has images that he knows are
clean: here the size is counted in these, and marked queries are never the heavier part, or the cut would go through them where they are
the majority. A class with fewer than two clean images is compared with all clean images.

**Pitfalls.** Scores depend on all queries that are asked together, and all members of a group share one: false alarms come in groups, and
a marked query that falls in with the clean images scores below most of them. Fewer than about ten marked queries in a class are no
group. Two-means cuts any class in two; without the silhouette, clean classes would raise alarms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.inputs import CalibratedDetector, features_and_classes


def cluster_scores(features: Tensor, clean: Tensor, dimensions: int, seed: int) -> Tensor:
    """Suspicion of each member of one class: the silhouette of its two groups, times the clean share of the other group.

    Args:
        features: ``(N, D)``.
        clean: Which rows are known to be clean, bool ``(N,)``, at least one.
        dimensions: Principal components kept, fewer where there are not so many.
        seed: Seed of components and k-means.

    Returns:
        float64 ``(N,)`` in ``[0, 1]``; zeros for fewer than three rows, or for rows that are all the same.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    if len(features) < 3 or bool((features == features[0]).all()):
        return torch.zeros(len(features), dtype=torch.float64)
    rows = features.double().numpy()
    reduced = PCA(min(dimensions, *rows.shape), random_state=seed).fit_transform(rows)
    weight = max(1.0, (len(clean) - int(clean.sum())) / int(clean.sum()))
    weights = torch.where(clean, weight, 1.0).numpy()
    groups = KMeans(2, n_init=10, random_state=seed).fit_predict(reduced, sample_weight=weights)
    silhouette = float(silhouette_score(reduced, groups))
    group = torch.from_numpy(groups).long()
    share = torch.bincount(group[clean], minlength=2).double() / clean.sum()
    return max(silhouette, 0.0) * (1 - share[group])


class ActivationClustering(CalibratedDetector):
    """Two-means on the features of each answered class.

    Args:
        dimensions: Principal components kept.
        false_alarms: Share of clean images that may be called watermark samples.
        batch_size: Images a forward pass.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dimensions: int = 10, false_alarms: float = 0.05, batch_size: int = 512) -> None:
        super().__init__(false_alarms)
        if min(dimensions, batch_size) < 1:
            raise ValueError(f"{dimensions=} and {batch_size=} must be at least 1.")
        self.dimensions, self.batch_size = dimensions, batch_size

    @override
    def learn(self, model: nn.Module, data: ThiefData, seed: int) -> None:
        """Keeps the clean images' features."""
        self._features, self._classes = features_and_classes(model, data.x, self.batch_size)
        self._seed = seed

    @override
    def suspicion(self, model: nn.Module, x: Tensor) -> Tensor:
        """Suspicion of each query's group, ``(N,)`` in ``[0, 1]``; the queries are looked at together."""
        features, classes = features_and_classes(model, x, self.batch_size)
        scores = torch.zeros(len(x), dtype=torch.float64)
        for value in torch.unique(classes):
            known = self._features[self._classes == value]
            if len(known) < 2:
                known = self._features
            asked = classes == value
            joint = torch.cat([known, features[asked]])
            clean = torch.arange(len(joint)) < len(known)
            scores[asked] = cluster_scores(joint, clean, self.dimensions, self._seed)[len(known) :]
        return scores
