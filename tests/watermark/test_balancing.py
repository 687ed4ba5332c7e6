"""Balancing rules against closed forms, a quadratic program solved by SciPy, and gradients taken by hand."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meadef_lightning.watermark import MGDA, Balancing, Fixed, LastLayerMGDA

SEEDS = st.integers(0, 2**32 - 1)


class Point(nn.Module):
    """A point in parameter space, split over two tensors, in which losses are quadratic bowls."""

    def __init__(self, dim, rng):
        super().__init__()
        self.left = nn.Parameter(torch.tensor(rng.standard_normal(dim // 2)))
        self.right = nn.Parameter(torch.tensor(rng.standard_normal(dim - dim // 2)))
        self.idle = nn.Parameter(torch.ones(3))  # no loss depends on it
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def position(self):
        return torch.cat([self.left, self.right])

    def bowls(self, count, rng):
        """Random quadratics ½(x - c)ᵀA(x - c), and their gradients A(x - c) at the point."""
        x, dim = self.position(), self.left.numel() + self.right.numel()
        losses, gradients = [], []
        for _ in range(count):
            root, centre = rng.standard_normal((dim, dim)) / dim**0.5, rng.standard_normal(dim)
            matrix = root @ root.T + np.eye(dim)
            offset = x - torch.tensor(centre)
            losses.append(offset @ torch.tensor(matrix) @ offset / 2)
            gradients.append(matrix @ offset.detach().numpy())
        return losses, np.array(gradients)


def terms(*losses):
    return dict(zip(("ver", "eva"), losses, strict=False))


def two_task_weight(g1, g2):
    """Share of the first gradient in the shortest convex combination (Sener & Koltun 2018, Eq. 6)."""
    return float(np.clip((g2 - g1) @ g2 / ((g2 - g1) @ (g2 - g1)), 0, 1))


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


# ---- fixed weights


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(0.01, 10), st.floats(0, 10), st.floats(0, 10))
def test_fixed_is_the_weighted_sum(seed, ver, com, eva):
    rng = np.random.default_rng(seed)
    point = Point(5, rng)
    losses, gradients = point.bowls(4, rng)
    total = Fixed(ver, com, eva)(losses[0], dict(zip(("ver", "com", "eva"), losses[1:], strict=True)), point)
    weights = np.array([1, ver, com, eva])
    assert total.item() == pytest.approx(weights @ [loss.item() for loss in losses], rel=1e-6)
    total.backward()
    np.testing.assert_allclose(
        torch.cat([point.left.grad, point.right.grad]), weights @ gradients, rtol=1e-5, atol=1e-8
    )


def test_fixed_without_terms_is_the_task():
    assert float(Fixed()(torch.tensor(3.0), {}, nn.Identity())) == 3
    assert Fixed().needs_gradients is False


# ---- MGDA


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


def test_an_overflow_does_not_stay_in_the_kept_weights():
    x = nn.ParameterList([nn.Parameter(torch.ones(2))])
    mgda = MGDA(every_n_steps=100)
    mgda(x[0].sum() * float("inf"), terms(x[0].sum()), x)  # a step that a gradient scaler throws away
    total = mgda(x[0].sum(), terms(2 * x[0].sum()), x)
    assert total.item() == pytest.approx(0.5 * 2 + 0.5 * 4)


def small_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    x, y = torch.randn(3, 10, 4), torch.randint(3, (3, 10))
    return net, [lambda n=net, i=i: F.cross_entropy(n(x[i]), y[i]) for i in range(3)]


@pytest.mark.parametrize("balancing", [MGDA(), MGDA(normalize="loss+"), LastLayerMGDA(), LastLayerMGDA(layer="0")])
def test_the_parameters_grad_is_not_touched(balancing):
    net, losses = small_network()
    kept = []
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
        kept.append(parameter.grad)
    total = balancing(losses[0](), terms(losses[1](), losses[2]()), net)
    for i, (parameter, before) in enumerate(zip(net.parameters(), kept, strict=True)):
        assert parameter.grad is before
        assert before is None or torch.equal(before, torch.full_like(parameter, float(i)))
    assert not balancing.alphas.requires_grad
    total.backward()  # the graph is still there
    alphas = balancing.alphas.tolist()
    expected = torch.autograd.grad(sum(a * loss() for a, loss in zip(alphas, losses, strict=True)), [*net.parameters()])
    for i, (parameter, gradient) in enumerate(zip(net.parameters(), expected, strict=True)):
        torch.testing.assert_close(parameter.grad, gradient + (i if i % 2 else 0))


def test_weights_are_kept_between_solutions():
    x = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    mgda = MGDA(every_n_steps=3)
    seen = []
    for step in range(7):
        g = torch.tensor([1.0 + step, 0.0])
        mgda(x[0] @ g, terms(x[0] @ torch.tensor([0.0, 1.0])), x)
        seen.append(float(mgda.alphas[0]))
    fresh = [1 / (1 + (1 + step) ** 2) for step in (0, 3, 6)]  # orthogonal gradients share inversely to their squares
    np.testing.assert_allclose(seen, [fresh[0]] * 3 + [fresh[1]] * 3 + [fresh[2]], rtol=1e-4)


def test_another_number_of_terms_solves_anew():
    x = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    one, two = x[0] @ torch.tensor([1.0, 0.0]), x[0] @ torch.tensor([0.0, 1.0])
    mgda = MGDA(every_n_steps=100)
    mgda(one, terms(two), x)
    mgda(one, terms(two, one - two), x)
    assert mgda.alphas.shape == (3,)


def test_kept_weights_and_count_are_state():
    mgda, x = MGDA(every_n_steps=4), nn.ParameterList([nn.Parameter(torch.ones(2))])
    for _ in range(2):
        mgda(x[0].sum(), terms(2 * x[0].sum()), x)
    state = mgda.state_dict()
    assert int(state["calls"]) == 2
    assert state["alphas"].tolist() == [1, 0]


def test_autocast_finds_the_same_weights():
    net, losses = small_network()
    plain, mixed = MGDA(), MGDA()
    plain(losses[0](), terms(losses[1](), losses[2]()), net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed(losses[0](), terms(losses[1](), losses[2]()), net)
    torch.testing.assert_close(mixed.alphas, plain.alphas, atol=0.05, rtol=0)


def test_tiny_half_precision_gradients_do_not_vanish():
    # 1e-8 is nothing in float16, 1024 times as much is something
    x = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    tiny = torch.tensor(1e-8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mgda = MGDA()
        mgda(x[0][0].float() * tiny, terms(x[0][1].float() * tiny), x)
    torch.testing.assert_close(mgda.alphas, torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)


def test_gradients_are_averaged_over_the_ranks(monkeypatch):
    """Two ranks, of which the other one's gradients come from a stand-in for all_reduce."""
    mine, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda matrix: matrix.add_(other))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    x = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    mgda = MGDA()
    mgda(x[0] @ mine[0], terms(x[0] @ mine[1]), x)
    # the means are (2, 0) and (0, ½)
    torch.testing.assert_close(mgda.alphas, torch.tensor([0.25 / 4.25, 4 / 4.25]), atol=1e-4, rtol=0)


# ---- last layer


@pytest.mark.parametrize(("layer", "index"), [(None, 4), ("4", 4), ("0", 0), ("2", 2)])
def test_last_layer_compares_gradients_of_that_layer(layer, index):
    net, losses = small_network()
    balancing = LastLayerMGDA(layer=layer)
    balancing(losses[0](), terms(losses[1]()), net)
    g1, g2 = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(), [*net[index].parameters()])]).double().numpy()
        for loss in losses[:2]
    )
    assert float(balancing.alphas[0]) == pytest.approx(two_task_weight(g1, g2), abs=1e-3)


def test_last_layer_skips_what_comes_after_the_last_linear_layer():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.BatchNorm1d(3))
    found = LastLayerMGDA().parameters_to_balance(net)
    assert [id(p) for p in found] == [id(p) for p in net[1][0].parameters()]
    net[1][0].bias.requires_grad_(False)
    assert len(LastLayerMGDA().parameters_to_balance(net)) == 1


# ---- errors


def test_last_layer_names_what_there_is():
    net, losses = small_network()
    with pytest.raises(
        ValueError, match=r"layer='head'\) finds no such layer; the module's linear layers are \['0', '2', '4'\]"
    ):
        LastLayerMGDA(layer="head")(losses[0](), terms(losses[1]()), net)
    with pytest.raises(ValueError, match=r"linear layers are \[\]"):
        LastLayerMGDA().parameters_to_balance(nn.Conv2d(1, 1, 1))
    net[4].requires_grad_(False)
    with pytest.raises(ValueError, match="'4' has no trained parameters"):
        LastLayerMGDA().parameters_to_balance(net)


@pytest.mark.parametrize("kind", [Fixed, MGDA, LastLayerMGDA])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ver": -1}, "weight ver=-1"),
        ({"com": float("inf")}, "weight com=inf"),
        ({"eva": float("nan")}, "weight eva=nan"),
        ({"ver": 0}, "ver=0 would leave out the verification loss"),
    ],
)
def test_weights_are_checked(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("kind", [MGDA, LastLayerMGDA])
def test_options_are_checked(kind):
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        kind(every_n_steps=0)
    with pytest.raises(ValueError, match="normalize='l1' is not one of"):
        kind(normalize="l1")
    assert kind().needs_gradients is True


def test_the_base_says_what_is_to_be_implemented():
    with pytest.raises(TypeError, match="Balancing must implement forward"):
        Balancing()(torch.tensor(1.0), {}, nn.Identity())
