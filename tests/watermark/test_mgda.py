"""MGDA's weights against closed forms, and a quadratic program solved by SciPy."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from balancing_cases import SEEDS, Point, terms, two_task_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meadef_lightning.watermark import MGDA


def quadratic_program(gramian):
    """Minimises αᵀGα over the simplex with SLSQP, from every corner and the middle."""
    n, size = len(gramian), np.abs(gramian).max()
    solutions = [
        scipy.optimize.minimize(
            lambda alpha: alpha @ gramian @ alpha / size,
            start,
            jac=lambda alpha: 2 * gramian @ alpha / size,
            bounds=[(0, 1)] * n,
            constraints={"type": "eq", "fun": lambda alpha: alpha.sum() - 1, "jac": lambda alpha: np.ones(n)},
            method="SLSQP",
            options={"ftol": 1e-13},
        ).x
        for start in (*np.eye(n), np.full(n, 1 / n))
    ]
    return min(solutions, key=lambda alpha: alpha @ gramian @ alpha)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(2, 12))
def test_mgda_meets_the_closed_form_for_two_losses(seed, dim):
    rng = np.random.default_rng(seed)
    point = Point(dim, rng)
    losses, (g1, g2) = point.bowls(2, rng)
    total = MGDA()(losses[0], terms(losses[1]), point)
    alpha = two_task_weight(g1, g2)
    assert total.item() == pytest.approx(alpha * losses[0].item() + (1 - alpha) * losses[1].item(), rel=1e-4)
    total.backward()
    direction = alpha * g1 + (1 - alpha) * g2
    scale = np.abs([g1, g2]).max()
    np.testing.assert_allclose(torch.cat([point.left.grad, point.right.grad]) / scale, direction / scale, atol=1e-4)


@pytest.mark.parametrize(
    ("g1", "g2", "alpha"),
    [
        ((1, 0), (0, 1), 0.5),  # orthogonal
        ((2, 0), (0, 1), 0.2),
        ((1, 0), (3, 0), 1.0),  # parallel: the shorter one
        ((1, 1), (3, 1), 1.0),  # the shorter lies inside the longer's half-space
        ((1, 0), (-3, 0), 0.75),  # opposite: they cancel
    ],
)
def test_mgda_by_eye(g1, g2, alpha):
    x = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    mgda = MGDA()
    mgda(x[0] @ torch.tensor(g1).float(), {"ver": x[0] @ torch.tensor(g2).float()}, x)
    torch.testing.assert_close(mgda.alphas, torch.tensor([alpha, 1 - alpha]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_mgda_meets_a_quadratic_program_for_three_losses(seed):
    rng = np.random.default_rng(seed)
    point = Point(8, rng)
    losses, gradients = point.bowls(3, rng)
    mgda = MGDA()
    mgda(losses[0], terms(*losses[1:]), point)
    gramian = gradients @ gradients.T
    exact, found = quadratic_program(gramian), mgda.alphas.double().numpy()
    # Frank–Wolfe stops early: its weights are right to a few hundredths, its norm to a few per cent
    np.testing.assert_allclose(found, exact, atol=0.08)
    assert math.sqrt(found @ gramian @ found) < 1.06 * math.sqrt(exact @ gramian @ exact)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.sampled_from(["none", "l2", "loss+"]), st.integers(2, 10))
def test_mgda_finds_a_short_common_descent_direction(seed, normalize, dim):
    rng = np.random.default_rng(seed)
    point = Point(dim, rng)
    losses, gradients = point.bowls(3, rng)
    mgda = MGDA(normalize=normalize)
    mgda(losses[0], terms(*losses[1:]), point)
    alphas = mgda.alphas.double().numpy()
    assert (alphas >= 0).all()
    assert alphas.sum() == pytest.approx(1, abs=1e-5)
    if normalize != "none":
        gradients = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    if normalize == "loss+":
        gradients = gradients / [[loss.item()] for loss in losses]
    direction = alphas @ gradients
    longest = np.linalg.norm(gradients, axis=1).max()
    assert np.linalg.norm(direction) <= np.linalg.norm(gradients.mean(axis=0)) * (1 + 1e-4)
    # of the min-norm point, every gradient's product with it is at least its squared length
    assert (gradients @ direction >= direction @ direction - 0.05 * longest**2).all()


def test_the_watermark_loss_is_one_loss_with_its_weights():
    rng = np.random.default_rng(3)
    point = Point(6, rng)
    (task, ver, com, eva), (g, g_ver, g_com, g_eva) = point.bowls(4, rng)
    mgda = MGDA(ver=0.5, com=2.0, eva=3.0)
    total = mgda(task, {"ver": ver, "com": com, "eva": eva}, point)
    a = mgda.alphas.double().numpy()
    assert total.item() == pytest.approx(a @ [task.item(), (0.5 * ver + 2 * com).item(), (3 * eva).item()], rel=1e-5)
    gradients = np.array([g, 0.5 * g_ver + 2 * g_com, 3 * g_eva])
    reference = MGDA()
    x = nn.ParameterList([nn.Parameter(torch.zeros(6, dtype=torch.float64))])
    reference(*(lambda one, two, three: (one, terms(two, three), x))(*(torch.tensor(gradients) @ x[0])))
    torch.testing.assert_close(mgda.alphas, reference.alphas, atol=1e-4, rtol=1e-3)
    total.backward()
    np.testing.assert_allclose(torch.cat([point.left.grad, point.right.grad]), a @ gradients, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_normalizing_by_length_makes_two_losses_equal(seed):
    rng = np.random.default_rng(seed)
    point = Point(6, rng)
    losses, gradients = point.bowls(2, rng)
    mgda = MGDA(normalize="l2")
    mgda(1000 * losses[0], terms(losses[1]), point)
    torch.testing.assert_close(mgda.alphas, torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)
    mgda = MGDA(normalize="loss+")
    mgda(1000 * losses[0], terms(losses[1]), point)
    g1, g2 = (
        g / np.linalg.norm(g) / (factor * loss.item())
        for g, loss, factor in zip(gradients, losses, (1000, 1), strict=True)
    )
    assert float(mgda.alphas[0]) == pytest.approx(two_task_weight(g1, g2), abs=1e-3)


@pytest.mark.parametrize("normalize", ["none", "l2", "loss+"])
def test_a_loss_that_is_already_perfect_takes_all_the_weight(normalize):
    x = nn.ParameterList([nn.Parameter(torch.ones(4))])
    mgda = MGDA(normalize=normalize)
    total = mgda(x[0].sum(), terms(0 * x[0].sum(), x[0].square().sum()), x)
    assert mgda.alphas.tolist() == [0, 1, 0]  # nothing is shorter than no gradient
    assert torch.isfinite(total)
