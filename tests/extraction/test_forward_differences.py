"""Gradients from differences along random directions, the precision they need, and the generator they train."""

import pytest
import torch

from meadef_lightning.extraction.datafree import (
    ImageGenerator,
    _float32_switches,
    forward_differences,
    full_precision,
    unit_directions,
)

SMALL = {"latent": 8, "width": 4}

# --- the estimate


def test_directions_are_uniform_on_the_sphere():
    torch.manual_seed(0)
    u = unit_directions(5000, torch.zeros(2, 1, 2, 3)).flatten(2)
    torch.testing.assert_close(u.norm(dim=2), torch.ones(5000, 2))
    for point in range(2):  # E[u] = 0 and E[u uᵀ] = I/d
        torch.testing.assert_close(u[:, point].mean(0), torch.zeros(6), atol=0.03, rtol=0)
        torch.testing.assert_close(u[:, point].T @ u[:, point] / 5000, torch.eye(6) / 6, atol=0.02, rtol=0)
    assert not torch.allclose(u[:, 0], u[:, 1])


def differences(function, x, m, epsilon):
    u = unit_directions(m, x)
    points = torch.cat([x[None], x + epsilon * u])
    return forward_differences(function(points), u, epsilon), u


def test_estimate_of_a_linear_function_is_its_projection():
    torch.manual_seed(0)
    x, w = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    estimate, u = differences(lambda p: (p * w).flatten(2).sum(2), x, 1, 0.1)
    along = (u[0] * w).flatten(1).sum(1)  # d ⟨w, u⟩ u, by hand
    torch.testing.assert_close(estimate, 8 * along[:, None, None, None] * u[0])


def test_estimate_converges_to_the_gradient():
    torch.manual_seed(0)
    matrix = torch.randn(8, 8, dtype=torch.float64)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def quadratic(points):
        return torch.einsum("...i,ij,...j->...", points.flatten(-3), matrix, points.flatten(-3))

    (true,) = torch.autograd.grad(quadratic(x).sum(), x)
    with torch.no_grad():
        errors = [float((differences(quadratic, x, m, 1e-6)[0] - true).norm() / true.norm()) for m in (10, 1000, 40000)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # as 1/√m, i.e. by factors of 10 and 6
    assert errors[2] < 0.03


def test_full_precision_is_switched_on_and_back():
    def switches():
        return [getattr(owner, name) for owner, name, _ in _float32_switches()]

    torch.set_float32_matmul_precision("medium")
    try:
        before = switches()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision(torch.device("cpu")):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                assert switches() == [exact for *_, exact in _float32_switches()] != before
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert switches() == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 10)])
def test_generator_makes_images(shape):
    low, high = torch.linspace(-2, -1, shape[0])[:, None, None], torch.linspace(0.3, 2.1, shape[0])[:, None, None]
    torch.manual_seed(0)
    generator = ImageGenerator(shape, low, high, **SMALL)
    x = generator(torch.randn(5, 8))
    assert x.shape == (5, *shape)
    for images in (generator.images(x), generator.images(100 * x)):
        assert ((images >= low) & (images <= high)).all()
    torch.testing.assert_close(generator.images(torch.zeros(shape)), ((low + high) / 2).expand(shape))
    torch.testing.assert_close(generator.images(torch.full(shape, 99.0)), high.expand(shape))
