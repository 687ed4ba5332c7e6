import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation
from torch import nn

from meadef_lightning.detection.base import anomaly_index, roc_auc, without_training

SCORES = st.lists(st.sampled_from([-np.inf, -2.0, 0.0, 0.5, 0.5 + 1e-9, 3.0, np.inf]), min_size=1, max_size=8)


def test_anomaly_index_by_hand():
    # median 3, distances 2 1 0 1 97, their median 1
    expected = np.array([-2, -1, 0, 1, 97]) / 1.4826
    np.testing.assert_allclose(anomaly_index([1, 2, 3, 4, 100]), expected)


def test_anomaly_index_is_scipys_scale():
    values = np.random.default_rng(0).normal(size=31)
    expected = (values - np.median(values)) / median_abs_deviation(values, scale="normal")
    np.testing.assert_allclose(anomaly_index(values), expected, rtol=1e-4)  # 1.4826 is rounded


def test_anomaly_index_without_deviation():
    np.testing.assert_array_equal(anomaly_index([5, 5, 5, 5, 1, 9]), [0, 0, 0, 0, -np.inf, np.inf])
    np.testing.assert_array_equal(anomaly_index([2, 2, 2]), 0)


@settings(deadline=None, max_examples=40)
@given(SCORES, SCORES)
def test_roc_auc_counts_pairs(marked, clean):
    wins = [1.0 if m > c else 0.5 if m == c else 0.0 for m, c in itertools.product(marked, clean)]
    assert roc_auc(marked, clean) == pytest.approx(np.mean(wins))


def test_roc_auc_takes_tensors():
    assert roc_auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.875


def test_without_training_is_a_copy():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    frozen = without_training(model)
    assert model.training
    assert model[0].weight.requires_grad
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0
