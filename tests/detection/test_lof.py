import numpy as np
import pytest
import torch
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import roc_auc
from meadef_lightning.detection.lof import LocalOutlierFactor


def brute_force(clean, query, k):
    """Definitions 3 to 7 of Breunig et al., one point at a time; the query is nobody's neighbour."""

    def neighbours(point, among):
        distances = np.array([np.linalg.norm(point - other) for other in among])
        order = np.argsort(distances)[:k]
        return order, distances[order]

    others = [np.delete(np.arange(len(clean)), i) for i in range(len(clean))]
    near = [neighbours(clean[i], clean[others[i]]) for i in range(len(clean))]
    reach = [distances[-1] for _, distances in near]  # k-distances

    def density(order, distances):
        return 1 / np.mean([max(reach[o], d) for o, d in zip(order, distances, strict=True)])

    densities = [density(others[i][near[i][0]], near[i][1]) for i in range(len(clean))]
    order, distances = neighbours(query, clean)
    return np.mean([densities[o] for o in order]) / density(order, distances)


def test_factors_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 2, 3, generator=generator)
    x[25:] *= 0.2  # two densities
    queries = torch.cat([torch.randn(6, 1, 2, 3, generator=generator), torch.full((1, 1, 2, 3), 8.0)])
    thief = ThiefData(x, torch.zeros(40).long(), x[:10] + 0.1, torch.zeros(10).long(), 3, torch.zeros(1), torch.ones(1))
    detector = LocalOutlierFactor(neighbors=4)
    detector.fit(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), thief)  # the features are the pixels
    rows = x.flatten(1).double().numpy()
    expected = [brute_force(rows, query, 4) for query in queries.flatten(1).double().numpy()]
    np.testing.assert_allclose(detector.score(queries), expected, rtol=1e-4)
    assert expected[-1] > 3


def test_patches_are_outliers(patch_case):
    auc = {}
    for name in ("patched", "clean"):
        detector = LocalOutlierFactor()
        detector.fit(getattr(patch_case, name), patch_case.thief)
        natural, marked = detector.score(patch_case.natural), detector.score(patch_case.marked)
        auc[name] = roc_auc(marked, natural)
        assert float((natural > detector.threshold).float().mean()) <= 0.1
    assert auc["patched"] >= 0.95
    # a patch is a novelty to a clean model, too
    assert auc["clean"] <= min(0.88, auc["patched"] - 0.1)


def test_more_neighbours_than_images_are_refused(patch_case):
    with pytest.raises(ValueError, match="neighbors=400 must be below the number of clean images, 400"):
        LocalOutlierFactor(neighbors=400).fit(patch_case.clean, patch_case.thief)
