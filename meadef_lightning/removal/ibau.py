"""I-BAU: unlearn what one small perturbation, added to every image, can do, with the gradient of the whole min-max problem.

**Source.** Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient" (ICLR 2022), Algorithm 1; the fixed-point
iteration for the implicit part is that of Grazzi et al., "On the Iteration Complexity of Hypergradient Computation" (ICML 2020).

**Algorithm.** The problem is ``min_θ max_δ mean CE(f_θ(x + δ), y)`` over perturbations ``δ`` shared by all images and bounded in L2 norm.
A round is: 1. Find ``δ`` for the present ``θ`` by projected ascent with steps of fixed length on ``inner_size`` images. 2. Go once
through the thief's images in batches, and step along the hypergradient of the mean loss ``H`` on the batch with and without perturbation:
``∂H/∂θ + (dδ*/dθ)ᵀ ∂H/∂δ``, where the second part asks how the best perturbation answers to a change of ``θ``. It comes from the implicit
function theorem at the fixed point of projected ascent, and takes ``iterations`` products with its Jacobian (`hypergradient`).

**Cost.** For each batch two passes over it and ``iterations + 2`` over the ``inner_size`` images; for each round ``ascent`` more of
these.

**Defaults.** 5 iterations are the paper's. Its perturbation is held by a norm of 10 for 3×32×32 pixels in [0, 1], and by a penalty of 0.001 on
its square; here by the norm alone, ``radius`` times the distance of a white image from a black one, so that the same number means the same
for any data set: 0.18 is the paper's. As there, perturbed images are not clipped to what images can be: with clipping, in five rounds and with a
radius of 0.1, the search finds other perturbations than the trigger, and a patch on digits that was trained beside squares of noise keeps 68 to
96 %. The paper goes three to five times through thousands of images. Thieves have hundreds: 20 rounds of a few steps (Adam at 1e-3, 64 images a
step) meet more perturbations than 5 long ones, and leave 0 to 15 % of that patch for 0 to 6 points of accuracy (four seeds). With hundreds of
harder images it costs more: 9 points on Fashion-MNIST. Half of the loss is on clean images, which keeps accuracy. ``remember`` is ours: half of the
perturbed images get a perturbation of an earlier round. Without it small networks forget in each round what they unlearnt in the one before, and
accuracy goes up and down (0.81 and 0.93 at the end). ``False`` is the paper's algorithm.

**Modes.** The inner problem sees the network in eval mode: with batch statistics or dropout it would be another problem in every call,
and there would be nothing to differentiate implicitly. The loss ``H`` is that of training mode, as in any tuning.

**Pitfalls.** Leaving the implicit part out gives plain alternating updates, which published re-implementations under this name do. By the
envelope theorem it vanishes where ``δ`` is exactly the best perturbation for the very loss that is minimised; it counts because ``δ`` is
found on other images than the batch, and not exactly. On digits it is a few per cent of the gradient, and leaving it out (``iterations:
0`` leaves one term) changes little. The series converges only at a strict maximum, where the iteration contracts; with long steps,
elsewhere, its five terms can outgrow everything else, so the step here is a tenth of the radius. Accuracy falls in the first round and
comes back (:attr:`~meadef_lightning.removal.base.Removal.from_scratch`). A perturbation in a small ball need not be the trigger: look at
the watermark after the last round, and not after the first, where it is often gone together with the accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, train_path

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""Maps parameters and perturbation to a scalar."""


def project(delta: Tensor, radius: Tensor | float) -> Tensor:
    """Scales a perturbation down to an L2 norm of ``radius``; shorter ones stay. Differentiable off the border.

    Args:
        delta: Any shape; the norm is over all of it.
        radius: Largest norm, above 0.
    """
    projected: Tensor = delta * (radius / delta.norm().clamp_min(radius))
    return projected


def hypergradient(
    inner: Loss,
    outer: Loss,
    theta: Sequence[Tensor],
    delta: Tensor,
    steps: int,
    step_size: Tensor | float = 0.1,
    radius: Tensor | float | None = None,
) -> tuple[Tensor, ...]:
    """Gradient of ``θ ↦ outer(θ, δ*(θ))``, where ``δ*`` minimises ``inner(θ, ·)``, in the ball of ``radius`` if one is given.

    ``δ*`` is a fixed point of ``Φ(θ, δ) = project(δ − step_size · ∂inner/∂δ)``, whatever the step size, so the implicit function theorem gives
    ``∂outer/∂θ + (∂Φ/∂θ)ᵀ (I − (∂Φ/∂δ)ᵀ)⁻¹ ∂outer/∂δ``. The inverse is replaced by ``steps`` terms of its Neumann series after the
    first, by products with the Jacobian that autograd makes: no matrix is ever built.

    Args:
        inner: Loss that the perturbation minimises (to maximise, negate it); twice differentiable.
        outer: Loss that the parameters minimise.
        theta: Parameters, any number of tensors.
        delta: The solution ``δ*`` for these, any shape.
        steps: Terms, at least 0; they converge where ``Φ`` contracts.
        step_size: Step of ``Φ``: a constant.
        radius: Largest L2 norm of ``delta``; ``None`` for no limit.

    Returns:
        One tensor for each of ``theta``, of its shape.

    Raises:
        ValueError: If ``steps`` is below 0.
    """
    if steps < 0:
        raise ValueError(f"steps={steps} counts terms of a series and must be 0 or more.")
    with torch.enable_grad():
        parameters = [tensor.detach().requires_grad_() for tensor in theta]
        delta = delta.detach().requires_grad_()
        *direct, vector = torch.autograd.grad(outer(parameters, delta), [*parameters, delta], materialize_grads=True)
        (slope,) = torch.autograd.grad(inner(parameters, delta), delta, create_graph=True, materialize_grads=True)
        moved = delta - step_size * slope
        if radius is not None:
            moved = project(moved, radius)
    total = vector
    for _ in range(steps):
        (vector,) = torch.autograd.grad(moved, delta, vector, retain_graph=True)
        total = total + vector
    implicit = torch.autograd.grad(moved, parameters, total, materialize_grads=True)
    return tuple(a + b for a, b in zip(direct, implicit, strict=True))


def worst_perturbation(loss: Callable[[Tensor], Tensor], start: Tensor, radius: float, steps: int) -> Tensor:
    """Maximises a loss over perturbations by projected ascent along normalised gradients, with steps of ``2.5 · radius / steps``.

    Args:
        loss: Maps a perturbation to a scalar.
        start: Where to start, any shape.
        radius: Largest L2 norm.
        steps: Number of steps, at least 1.

    Returns:
        The best perturbation that was met, of the shape of ``start``.
    """
    delta = best = project(start.detach(), radius)
    highest = torch.full((), -torch.inf, device=start.device)
    for step in range(steps + 1):
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            value = loss(delta)
            (gradient,) = torch.autograd.grad(value, delta)
        better = value.detach() > highest
        best, highest = torch.where(better, delta.detach(), best), torch.where(better, value.detach(), highest)
        if step < steps:
            length = 2.5 * radius / steps
            delta = project(delta.detach() + length * gradient / gradient.norm().clamp_min(1e-12), radius)
    return best


class _Unlearning(LightningModule):
    """One epoch is one round: the perturbation is found at its start, and each batch is a step along the hypergradient."""

    def __init__(self, model: nn.Module, method: IBAU, data: ThiefData, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.method, self.data = model, method, data
        self.generator = torch.Generator().manual_seed(seed)
        self.names = [name for name, _ in model.named_parameters()]
        span = (data.high - data.low).expand(data.x.shape[1:])
        self.radius, self.step_size = method.radius * float(span.norm()), 0.0
        self.found = torch.empty(0, *span.shape)  # one perturbation for every round so far

    def logits(self, theta: Sequence[Tensor], x: Tensor, training: bool) -> Tensor:
        """Answers of the model with other parameters."""
        self.model.train(training)
        answers: Tensor = functional_call(self.model, dict(zip(self.names, theta, strict=True)), (x,))
        return answers

    def harm(self, theta: Sequence[Tensor], delta: Tensor) -> Tensor:
        """Loss on the round's images, which the perturbation maximises."""
        return F.cross_entropy(self.logits(theta, self.x + delta, training=False), self.y)

    @override
    def on_train_epoch_start(self) -> None:
        """Draws the round's images and finds the perturbation that is worst for them."""
        rows = torch.randperm(len(self.data.x), generator=self.generator)[: self.method.inner_size]
        self.x, self.y = self.data.x[rows].to(self.device), self.data.y[rows].to(self.device)
        theta = [parameter.detach() for parameter in self.model.parameters()]
        # a random start, so that rounds find different maxima
        start = torch.randn(self.found.shape[1:], generator=self.generator).to(self.device)
        start *= 0.1 * self.radius / start.norm()
        delta = worst_perturbation(lambda delta: self.harm(theta, delta), start, self.radius, self.method.ascent)
        with torch.enable_grad():
            variable = delta.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.harm(theta, variable), variable)
        # a tenth of the radius: the fixed point is the same for any step, and this one suits losses of any scale
        self.step_size = 0.1 * self.radius / float(slope.norm().clamp_min(1e-12))
        earlier = self.found.to(self.device) if self.method.remember else delta.new_empty(0, *delta.shape)
        self.found = torch.cat([earlier, delta[None]])

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """One step of the outer problem."""
        x, y = batch
        earlier, delta = self.found[:-1], self.found[-1]
        # half of the images get the round's own perturbation, the others an earlier one
        chosen = torch.randint(max(1, 2 * len(earlier)), (len(x),), generator=self.generator).clamp_max(len(earlier))

        def outer(theta: Sequence[Tensor], variable: Tensor) -> Tensor:
            both = torch.cat([x, x + torch.cat([earlier, variable[None]])[chosen.to(x.device)]])
            return F.cross_entropy(self.logits(theta, both, training=True), torch.cat([y, y]))

        parameters = list(self.model.parameters())
        gradients = hypergradient(
            lambda theta, variable: -self.harm(theta, variable),
            outer,
            parameters,
            delta,
            self.method.iterations,
            self.step_size,
            self.radius,
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        cast(LightningOptimizer, self.optimizers()).step()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.model.parameters(), lr=self.method.lr)


class IBAU(Removal):
    """Adversarial unlearning of a universal perturbation by implicit hypergradients; see the module's description.

    Args:
        rounds: Rounds; observed after each.
        lr: Learning rate of Adam.
        radius: Norm of the perturbation as a share of the distance of a white image from a black one, above 0.
        iterations: Terms of the series for the implicit part after the first (the paper's K), 0 or more.
        ascent: Steps of the inner maximisation.
        inner_size: Images on which the perturbation is found.
        batch_size: Images of a step.
        remember: Whether perturbations of earlier rounds stay in the loss.

    Raises:
        ValueError: If a number is out of range.
    """

    unit = "rounds"
    from_scratch = True  # accuracy falls in the first round, and comes back in the others

    def __init__(
        self,
        rounds: int = 20,
        lr: float = 1e-3,
        radius: float = 0.18,
        iterations: int = 5,
        ascent: int = 10,
        inner_size: int = 64,
        batch_size: int = 64,
        remember: bool = True,
    ) -> None:
        if min(rounds, ascent, inner_size, batch_size) < 1 or iterations < 0:
            raise ValueError(
                f"{rounds=}, {ascent=}, {inner_size=} and {batch_size=} must be at least 1, and {iterations=} at least 0."
            )
        if lr <= 0 or radius <= 0:
            raise ValueError(f"{lr=} and {radius=} must be above 0.")
        self.rounds, self.lr, self.radius, self.iterations = rounds, lr, radius, iterations
        self.ascent, self.inner_size, self.batch_size, self.remember = ascent, inner_size, batch_size, remember

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        model = copy.deepcopy(model).requires_grad_(True)
        module = _Unlearning(model, self, data, seed)
        train_path(module, model, (data.x, data.y), observe, epochs=self.rounds, batch_size=self.batch_size, seed=seed)
