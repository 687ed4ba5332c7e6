from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from thief_models import Keep, changed, patch_success, patched_model, test_accuracy, thief, weights
from torch import Tensor, nn

from meadef_lightning.removal import IBAU
from meadef_lightning.removal.ibau import hypergradient, project, worst_perturbation

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]


def solve(inner: Loss, theta: Sequence[Tensor], start: Tensor, step: float, radius: float | None, steps: int) -> Tensor:
    """Plain projected descent, far past convergence."""
    delta = start.clone()
    for _ in range(steps):
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(inner(theta, delta), delta)
        delta = (delta - step * slope).detach()
        if radius is not None and delta.norm() > radius:
            delta = delta * radius / delta.norm()
    return delta


def central_differences(value: Callable[[Sequence[Tensor]], float], theta: Sequence[Tensor], h: float) -> list[Tensor]:
    slopes = []
    for number, tensor in enumerate(theta):
        slope = torch.empty_like(tensor).flatten()
        for place in range(tensor.numel()):
            sides = []
            for sign in (1, -1):
                moved = [other.clone() for other in theta]
                moved[number].view(-1)[place] += sign * h
                sides.append(value(moved))
            slope[place] = (sides[0] - sides[1]) / (2 * h)
        slopes.append(slope.view_as(tensor))
    return slopes


def quadratic() -> tuple[Loss, Loss, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    a = root @ root.T + torch.eye(4, dtype=torch.float64)
    b = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    goal = torch.randn(4, generator=generator, dtype=torch.float64)
    theta = torch.randn(3, generator=generator, dtype=torch.float64)

    def inner(parameters: Sequence[Tensor], delta: Tensor) -> Tensor:
        return delta @ a @ delta / 2 - delta @ b @ parameters[0]

    def outer(parameters: Sequence[Tensor], delta: Tensor) -> Tensor:
        return (delta - goal).square().sum() / 2 + parameters[0].square().sum()

    return inner, outer, theta, a, b, goal


def test_a_quadratic_problem_in_closed_form():
    inner, outer, theta, a, b, goal = quadratic()
    delta = torch.linalg.solve(a, b @ theta)
    step = 1 / float(torch.linalg.eigvalsh(a).max())
    (gradient,) = hypergradient(inner, outer, [theta], delta, 500, step)
    torch.testing.assert_close(gradient, 2 * theta + b.T @ torch.linalg.solve(a, delta - goal))


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_truncated_series_has_the_terms_it_says(steps):
    inner, outer, theta, a, b, goal = quadratic()
    delta = torch.linalg.solve(a, b @ theta)
    (gradient,) = hypergradient(inner, outer, [theta], delta, steps, 0.1)
    jacobian = torch.eye(4, dtype=torch.float64) - 0.1 * a
    series = sum(torch.linalg.matrix_power(jacobian, k) for k in range(steps + 1))
    torch.testing.assert_close(gradient, 2 * theta + 0.1 * b.T @ series @ (delta - goal))


@pytest.mark.parametrize("radius", [0.3, 100.0])
def test_a_quadratic_problem_in_a_ball_against_finite_differences(radius):
    inner, outer, theta, a, *_ = quadratic()
    step = 1 / float(torch.linalg.eigvalsh(a).max())

    def value(parameters: Sequence[Tensor]) -> float:
        return float(outer(parameters, solve(inner, parameters, torch.zeros(4).double(), step, radius, 500)))

    delta = solve(inner, [theta], torch.zeros(4).double(), step, radius, 500)
    assert (abs(float(delta.norm()) - radius) < 1e-9) == (radius < 1)  # on the border, and inside
    gradients = hypergradient(inner, outer, [theta], delta, 500, step, radius)
    torch.testing.assert_close(list(gradients), central_differences(value, [theta], 1e-5), rtol=1e-5, atol=1e-7)


def test_a_small_network_against_finite_differences():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = [draw(5, 4) / 2, draw(5) / 2, draw(3, 5) / 2, draw(3) / 2]
    x, other = draw(12, 4), draw(6, 4)
    y, other_y = (torch.randint(3, (n,), generator=generator) for n in (12, 6))

    def loss(parameters: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        first, bias, second, last = parameters
        return F.cross_entropy(F.linear(F.linear(images, first, bias).tanh(), second, last), labels)

    def inner(parameters: Sequence[Tensor], delta: Tensor) -> Tensor:
        return -loss(parameters, x + delta, y)

    def outer(parameters: Sequence[Tensor], delta: Tensor) -> Tensor:
        return loss(parameters, other + delta, other_y)  # other images: the implicit part is not 0

    radius, step, start = 0.4, 1.0, draw(4) / 10
    delta = solve(inner, theta, start, step, radius, 300)

    def value(parameters: Sequence[Tensor]) -> float:
        return float(outer(parameters, solve(inner, parameters, delta, step, radius, 80)))

    expected = central_differences(value, theta, 1e-4)
    gradients = hypergradient(inner, outer, theta, delta, 100, step, radius)
    torch.testing.assert_close(list(gradients), expected, rtol=1e-4, atol=1e-6)
    parameters = [tensor.clone().requires_grad_() for tensor in theta]
    direct = torch.autograd.grad(outer(parameters, delta), parameters)
    assert max(float((a - b).abs().max()) for a, b in zip(direct, expected, strict=True)) > 1e-2
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in theta)


def test_parameters_that_a_loss_does_not_use_get_zeros():
    theta = [torch.ones(2), torch.ones(3)]
    gradients = hypergradient(lambda _, d: d.square().sum(), lambda t, d: t[0].sum(), theta, torch.zeros(4), 2)
    assert [g.tolist() for g in gradients] == [[1.0, 1.0], [0.0, 0.0, 0.0]]


def test_projection_and_its_gradient():
    inside, outside = torch.tensor([0.3, 0.4]).double(), torch.tensor([3.0, 4.0]).double()
    assert torch.equal(project(inside, 1.0), inside)
    torch.testing.assert_close(project(outside, 2.0), torch.tensor([1.2, 1.6]).double())
    for delta in (inside, outside):
        assert torch.autograd.gradcheck(lambda d: project(d, 1.0), delta.requires_grad_())


def test_the_worst_perturbation_of_a_linear_loss_points_along_it():
    slope = torch.tensor([3.0, -4.0, 0.0])
    delta = worst_perturbation(lambda d: slope @ d, torch.tensor([0.0, 0.1, 0.1]), 2.0, 30)
    torch.testing.assert_close(delta, torch.tensor([1.2, -1.6, 0.0]), atol=5e-2, rtol=0)
    assert delta.norm() <= 2.0 + 1e-6


def test_the_best_perturbation_on_the_way_is_kept():
    # steps of 2.5 · 1 / 2 jump over the maximum at 0.2
    delta = worst_perturbation(lambda d: -(d - 0.2).abs().sum(), torch.tensor([0.1]), 1.0, 2)
    assert float(delta) == pytest.approx(0.1)


def test_it_removes_a_patch_backdoor():
    model = patched_model()
    assert patch_success(model) > 0.95
    before, state, keep = weights(model), torch.get_rng_state(), Keep()
    IBAU().scrub(model, thief(), keep)
    assert IBAU.unit == "rounds"
    assert IBAU.from_scratch
    assert keep.strengths == [*range(1, 21)]
    assert test_accuracy(keep.last) >= test_accuracy(model) - 0.1
    assert patch_success(keep.last) < 0.2
    assert not changed(before, weights(model))
    assert torch.equal(state, torch.get_rng_state())


def test_images_with_a_perturbation_are_not_clipped():
    """Clipped, it is not the trigger that is found where images are black (see the module's defaults)."""
    lowest = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = patched_model()

        def forward(self, x: Tensor) -> Tensor:
            lowest.append((self.training, float(x.detach().amin())))
            return self.inner(x)

    IBAU(rounds=1, ascent=2, inner_size=16, batch_size=100).scrub(Seen(), thief(), Keep())
    black = float(thief().low.min())
    for training in (False, True):  # in the search, and in the steps
        assert min(value for mode, value in lowest if mode == training) < black - 0.05


def test_equal_seeds_give_equal_weights_the_implicit_part_counts_and_the_observer_ends_the_walk():
    small = {"rounds": 3, "ascent": 2, "inner_size": 16, "batch_size": 100}
    runs = []
    for seed, iterations in ((0, 5), (0, 5), (1, 5), (0, 0)):
        runs.append(keep := Keep(most=1))
        IBAU(iterations=iterations, **small).scrub(patched_model(), thief(), keep, seed)
    assert runs[0].strengths == [1]
    first, again, other_seed, fewer_terms = (run.models[0] for run in runs)
    assert not changed(first, again)
    assert changed(first, other_seed)
    assert changed(first, fewer_terms)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rounds": 0},
        {"lr": 0.0},
        {"radius": 0.0},
        {"iterations": -1},
        {"ascent": 0},
        {"inner_size": 0},
        {"batch_size": 0},
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        IBAU(**arguments)


def test_a_negative_number_of_terms_is_refused():
    with pytest.raises(ValueError, match="steps=-1"):
        hypergradient(lambda _, d: d.sum(), lambda _, d: d.sum(), [torch.ones(1)], torch.ones(1), -1)
