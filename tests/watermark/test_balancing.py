"""Balancing rules as parts of a training: fixed weights, what is kept between steps and what is left alone, and gradients taken by hand."""

import numpy as np
import pytest
import torch
from balancing_cases import SEEDS, Point, small_network, terms, two_task_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meadef_lightning.watermark import MGDA, Balancing, Fixed, LastLayerMGDA

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


# ---- between steps


def test_an_overflow_does_not_stay_in_the_kept_weights():
    x = nn.ParameterList([nn.Parameter(torch.ones(2))])
    mgda = MGDA(every_n_steps=100)
    mgda(x[0].sum() * float("inf"), terms(x[0].sum()), x)  # a step that a gradient scaler throws away
    total = mgda(x[0].sum(), terms(2 * x[0].sum()), x)
    assert total.item() == pytest.approx(0.5 * 2 + 0.5 * 4)


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
