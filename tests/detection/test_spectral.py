import numpy as np
import pytest
import torch

from meadef_lightning.detection.base import roc_auc
from meadef_lightning.detection.spectral import SpectralSignatures, spectral_scores
from meadef_lightning.victims.networks import penultimate


def by_eigenvector(rows, centre):
    """Scores from the covariance's eigenvector rather than the matrix's singular one."""
    rows = np.asarray(rows, dtype=np.float64) - np.asarray(centre, dtype=np.float64)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    return (rows @ vectors[:, -1]) ** 2


@pytest.mark.parametrize("shape", [(30, 8), (5, 12), (1, 4)])
def test_scores_are_numpys(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = by_eigenvector(features, features.double().mean(0))
    np.testing.assert_allclose(spectral_scores(features), expected, atol=1e-10)
    left, values, _ = np.linalg.svd(features.double() - features.double().mean(0), full_matrices=False)
    np.testing.assert_allclose(spectral_scores(features), (left[:, 0] * values[0]) ** 2, atol=1e-10)
    centre = torch.ones(shape[1])
    np.testing.assert_allclose(spectral_scores(features, centre), by_eigenvector(features, centre), atol=1e-10)


def test_each_answered_class_is_looked_at_with_its_clean_images(patch_case):
    model, thief = patch_case.patched, patch_case.thief
    detector = SpectralSignatures(batch_size=100)
    detector.fit(model, thief)
    queries = torch.cat([patch_case.natural[:60], patch_case.marked[:20]])
    scores = detector.score(queries).numpy()
    with torch.no_grad():
        known, asked = (penultimate(model, x).numpy() for x in (thief.x, queries))
        known_classes, asked_classes = (model(x).argmax(-1).numpy() for x in (thief.x, queries))
    for value in np.unique(asked_classes):
        clean = known[known_classes == value]
        joint = by_eigenvector(np.concatenate([clean, asked[asked_classes == value]]), clean.mean(0))
        expected = joint[len(clean) :] / joint[: len(clean)].mean()
        np.testing.assert_allclose(scores[asked_classes == value], expected, rtol=1e-3, atol=1e-5)


def test_a_class_without_clean_images_is_compared_with_all(patch_case):
    thief = patch_case.thief
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
    with torch.no_grad():  # answers 1 only if the first pixel is brighter than white
        model[1].weight.zero_()
        model[1].weight[1, 0] = 1
        model[1].bias.copy_(torch.tensor([float(thief.high), 0.0]) + torch.tensor([1.0, 0.0]))
    detector = SpectralSignatures()
    detector.fit(model, thief)
    query = patch_case.natural[:1].clone()
    query[0, 0, 0, 0] = 50
    rows = torch.cat([thief.x, query]).flatten(1)
    joint = by_eigenvector(rows, rows[:-1].double().mean(0))
    assert float(detector.score(query)) == pytest.approx(joint[-1] / joint[:-1].mean(), rel=1e-3)


@pytest.mark.parametrize("count", [15, 150])
def test_patches_are_found_few_or_many(patch_case, count):
    auc = {}
    for name in ("patched", "clean"):
        detector = SpectralSignatures()
        detector.fit(getattr(patch_case, name), patch_case.thief)
        scores = detector.score(torch.cat([patch_case.natural, patch_case.marked[:count]]))
        natural, marked = scores[: len(patch_case.natural)], scores[len(patch_case.natural) :]
        auc[name] = roc_auc(marked, natural)
        assert float((natural > detector.threshold).float().mean()) <= 0.1
    assert auc["patched"] >= 0.97
    # a patch is unusual to any model, and some of that shows
    assert auc["clean"] <= 0.75
