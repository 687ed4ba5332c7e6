import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples
from sklearn.pipeline import make_pipeline

from meadef_lightning.detection.activation_clustering import ActivationClustering, cluster_scores
from meadef_lightning.detection.base import roc_auc


def test_scores_are_those_of_a_pipeline():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 20, generator=generator)
    features[45:] += 1.2
    clean = torch.arange(60) < 40
    groups = make_pipeline(PCA(10), KMeans(2, n_init=20, random_state=1)).fit_predict(features.double().numpy())
    reduced = PCA(10).fit_transform(features.double().numpy())
    silhouette = silhouette_samples(reduced, groups).mean()
    expected = [silhouette * np.mean(groups[:40] != group) for group in groups]
    np.testing.assert_allclose(cluster_scores(features, clean, 10, seed=0), expected, atol=1e-6)


def test_clean_images_weigh_as_much_as_the_queries():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(10, 2, generator=generator)
    marked = torch.tensor([[12.0, -4.0], [12.0, 4.0]]).repeat(15, 1) + 0.1 * torch.randn(30, 2, generator=generator)
    scores = cluster_scores(torch.cat([clean, marked]), torch.arange(40) < 10, 2, seed=0)
    # each clean image three times: the same as a weight of 3
    repeated = torch.cat([clean] * 3 + [marked]).double().numpy()
    groups = KMeans(2, n_init=20, random_state=1).fit_predict(repeated)
    silhouette = silhouette_samples(repeated[20:], groups[20:]).mean()
    expected = [silhouette * np.mean(groups[:10] != group) for group in groups[20:]]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert float(scores[10:].min()) > 0.5 > 0.0 == float(scores[:10].max())


def test_a_far_group_without_clean_images_scores_its_silhouette():
    features = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    scores = cluster_scores(features, torch.tensor([True, True, False, False]), 10, seed=0)
    # distances within: 2; to the other group: 11 and 9 on average
    silhouette = ((1 - 2 / 11) + (1 - 2 / 9)) / 2
    assert scores.tolist() == pytest.approx([0, 0, silhouette, silhouette])


def test_what_cannot_be_cut_is_not_suspicious():
    assert cluster_scores(torch.ones(9, 4), torch.arange(9) < 5, 10, seed=0).tolist() == [0] * 9
    assert cluster_scores(torch.tensor([[0.0], [9.0]]), torch.tensor([True, False]), 10, seed=0).tolist() == [0, 0]


@pytest.mark.parametrize(("count", "least"), [(15, 0.95), (150, 0.85)])
def test_patches_are_found_few_or_many(patch_case, count, least):
    auc = {}
    for name in ("patched", "clean"):
        detector = ActivationClustering()
        detector.fit(getattr(patch_case, name), patch_case.thief)
        scores = detector.score(torch.cat([patch_case.natural, patch_case.marked[:count]]))
        natural, marked = scores[: len(patch_case.natural)], scores[len(patch_case.natural) :]
        auc[name] = roc_auc(marked, natural)
        assert float((natural > detector.threshold).float().mean()) <= 0.15
        assert float((marked > detector.threshold).float().mean()) == pytest.approx(float(name == "patched"), abs=0.15)
    # of many, some fall in with the clean images, and share their score of 0
    assert auc["patched"] >= least
    assert 0.3 <= auc["clean"] <= 0.7


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="dimensions=0"):
        ActivationClustering(dimensions=0)
