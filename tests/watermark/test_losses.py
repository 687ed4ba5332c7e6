"""Loss terms against NumPy, torch.nn.KLDivLoss, and the limit of high temperature."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meadef_lightning.watermark import combination_loss, evasion_loss, verification_loss

B, K = 4, 6
LOGITS = hnp.arrays(np.float64, (B, K), elements=st.floats(-15, 15))
TEMPERATURES = st.floats(0.2, 20)


def log_softmax(z):
    return (
        z - z.max(axis=1, keepdims=True) - np.log(np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    )


@settings(deadline=None, max_examples=40)
@given(LOGITS, st.integers(0, K - 1))
def test_verification_is_the_mean_surprise_at_the_target(z, target):
    expected = -log_softmax(z)[:, target].mean()
    np.testing.assert_allclose(verification_loss(torch.from_numpy(z), target), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [2, 257, 1281, 3333])
def test_verification_means_the_same_class_in_every_precision(dtype, target):
    logits = torch.zeros(3, 4000, dtype=dtype)
    logits[:, target] = 100
    assert verification_loss(logits, target) == 0
    assert verification_loss(logits, target - 1) > 90


@settings(deadline=None, max_examples=40)
@given(LOGITS, st.lists(st.integers(0, K - 1), min_size=B, max_size=B))
def test_evasion_is_the_mean_surprise_at_its_labels(z, labels):
    expected = -log_softmax(z)[np.arange(B), labels].mean()
    np.testing.assert_allclose(evasion_loss(torch.from_numpy(z), torch.tensor(labels)), expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(LOGITS, LOGITS, LOGITS, TEMPERATURES)
def test_combination_is_the_divergence_of_the_watermark_from_its_sources(wm, first, second, t):
    p = np.exp(log_softmax(wm / t))
    by_hand = sum((p * (log_softmax(wm / t) - log_softmax(s / t))).sum(axis=1).mean() for s in (first, second)) * t**2
    torch_kl = torch.nn.KLDivLoss(reduction="batchmean")
    wm, first, second = map(torch.from_numpy, (wm, first, second))
    by_torch = sum(torch_kl((s / t).log_softmax(1), (wm / t).softmax(1)) for s in (first, second)) * t**2
    got = combination_loss(wm, first, second, temperature=t)
    torch.testing.assert_close(got, torch.tensor(by_hand), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got, by_torch, rtol=1e-8, atol=1e-8)
    assert got > -1e-9
    assert abs(combination_loss(wm, wm, wm, t)) < 1e-9


def test_combination_has_the_papers_direction():
    # p = (.9, .1) against q = (.5, .5): KL(p‖q) = .368, KL(q‖p) = .511
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.9 * np.log(1.8) + 0.1 * np.log(0.2)
    assert float(combination_loss(p, q, q)) == pytest.approx(2 * forward, abs=1e-6)
    assert float(combination_loss(p, q, p)) == pytest.approx(forward, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(LOGITS, LOGITS)
def test_temperature_squared_keeps_the_size_at_high_temperature(wm, source):
    # Hinton et al. (2015), §2.1: T²·KL becomes half the mean squared difference of the centred logits
    centred = (wm - wm.mean(axis=1, keepdims=True)) - (source - source.mean(axis=1, keepdims=True))
    limit = (centred**2).sum(axis=1).mean() / (2 * K) * 2
    got = combination_loss(*map(torch.from_numpy, (wm, source, source)), temperature=1e4)
    np.testing.assert_allclose(got, limit, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sources_get_gradients_only_when_asked(temperature):
    wm, first, second = torch.randn(3, B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wm.requires_grad_(), first.requires_grad_(), second.requires_grad_()
    combination_loss(wm, first, second, temperature).backward()
    assert first.grad is None
    assert second.grad is None
    # d/dz of T²·KL(p‖q) is T·p·(log p - log q - KL), the mean over the batch
    p, q1, q2 = ((z / temperature).log_softmax(1).detach() for z in (wm, first, second))
    by_hand = sum(p.exp() * (p - q - (p.exp() * (p - q)).sum(1, keepdim=True)) for q in (q1, q2)) * temperature / B
    torch.testing.assert_close(wm.grad, by_hand)

    wm.grad = None
    combination_loss(wm, first, second, temperature, detach_sources=False).backward()
    torch.testing.assert_close(wm.grad, by_hand)
    # and d/ds of T²·KL(p‖q(s)) is T·(q - p)
    torch.testing.assert_close(first.grad, (q1.exp() - p.exp()) * temperature / B)
    torch.testing.assert_close(second.grad, (q2.exp() - p.exp()) * temperature / B)


def test_the_terms_do_not_depend_on_the_number_of_samples():
    wm, first, second = torch.randn(3, B, K, dtype=torch.float64)
    labels = torch.randint(K, (B,))
    torch.testing.assert_close(verification_loss(wm.repeat(5, 1), 2), verification_loss(wm, 2))
    torch.testing.assert_close(evasion_loss(wm.repeat(5, 1), labels.repeat(5)), evasion_loss(wm, labels))
    torch.testing.assert_close(
        combination_loss(*(z.repeat(5, 1) for z in (wm, first, second))), combination_loss(wm, first, second)
    )


def test_extreme_logits_stay_finite():
    wm, source = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    for loss in (verification_loss(wm, 1), combination_loss(wm, source, source), evasion_loss(wm, torch.tensor([1]))):
        assert torch.isfinite(loss)
        assert loss > 1e4
