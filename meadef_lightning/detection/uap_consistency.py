"""Consistency under universal perturbations: does an answer survive what changes those to clean images?

**Source.** "Detecting Backdoor in Deep Neural Networks via Intentional Adversarial Perturbations" (Xue et al., Information Sciences 2023), of
which the abstract is the part that was available: an image is marked if its answer is unchanged after an adversarial
perturbation of about 3 in Euclidean norm. The rest is a reconstruction.

**Algorithm.**

1. Make a bank of perturbations, each the same for all images: for every class one that moves clean images there, and one that moves
   them anywhere else. Each takes ``steps`` normalised gradient steps on ``images`` clean images, all at once, and stays within
   ``epsilon`` in Euclidean norm.
2. A query's score is the share of the bank that leaves its class as it is: a trigger decides alone, a clean image gives way.
3. The threshold is the score that a share ``false_alarms`` of clean images exceeds.

**Cost.** ``(K + 1) · steps · images`` forward and backward passes once, ``K + 1`` forward passes a query.

**Defaults.** 50 images, 80 steps of ``epsilon / 10``, and the 98th percentile, measured as enough on small images. ``epsilon`` is 3, in pixels from 0 to 1
over the whole image: the abstract's perturbations of images of 28×28 and 32×32 have norms from 2.4 to 3.1. Gradients are taken as if
pixels were not clipped, or one at its limit would never come back.

**Pitfalls.** Perturbations made for each image alone change all answers, those to marked images included, and tell nothing. Norms must be measured in
pixels, not in normalised values. Scores take only ``K + 2`` values, so that ties are common.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.inputs import CalibratedDetector, device_of

_TINY = 1e-12


def universal_perturbations(
    model: nn.Module, x: Tensor, targets: Tensor, epsilon: float, steps: int, low: Tensor, high: Tensor
) -> Tensor:
    """Perturbations that move all images to a class, or all away from the class that they are answered with.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``; in eval mode, its parameters asking for no gradient.
        x: Clean images, ``(N, C, H, W)``, on the model's device.
        targets: The class that each perturbation moves to, or −1 for away from the answer; int64 ``(P,)``.
        epsilon: Largest Euclidean norm, in pixels from 0 to 1.
        steps: Gradient steps, each of a tenth of ``epsilon``.
        low: What black is, ``(C, 1, 1)``.
        high: What white is, same shape.

    Returns:
        Perturbations in pixels from 0 to 1, ``(P, C, H, W)``.
    """
    count, scale = len(targets), high - low
    targets = targets.to(x.device)
    with torch.no_grad():
        answers = model(x).argmax(dim=-1)
    away = (targets < 0)[:, None]
    labels = torch.where(away, answers, targets[:, None])  # (P, N)
    sign = torch.where(away, -1.0, 1.0)
    delta = torch.zeros(count, *x.shape[1:], device=x.device, dtype=x.dtype)
    for _ in range(steps):
        with torch.enable_grad():
            moved = delta.detach().requires_grad_()
            # clipped in the forward pass only
            inputs = x + moved[:, None] * scale
            inputs = inputs + (inputs.clamp(low, high) - inputs).detach()
            logits = model(inputs.flatten(0, 1))
            losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)
            (gradient,) = torch.autograd.grad((sign * losses).sum(), moved)
        delta = delta - 0.1 * epsilon * gradient / _norms(gradient).clamp_min(_TINY)
        delta = delta * (epsilon / _norms(delta).clamp_min(_TINY)).clamp_max(1)
    return delta


def _norms(delta: Tensor) -> Tensor:
    """Euclidean norms of images, ``(P, 1, 1, 1)``."""
    norms: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return norms


class UAPConsistency(CalibratedDetector):
    """Share of a bank of universal perturbations that leaves a query's class as it is.

    Args:
        epsilon: Largest Euclidean norm of a perturbation, in pixels from 0 to 1.
        steps: Gradient steps.
        images: Clean images that the perturbations are made from; as many as there are if there are fewer.
        false_alarms: Share of clean images that may be called watermark samples.
        batch_size: Images a forward pass, about; more fit no CPU's cache, and take up to twice the time for small networks.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        epsilon: float = 3.0,
        steps: int = 80,
        images: int = 50,
        false_alarms: float = 0.02,
        batch_size: int = 256,
    ) -> None:
        super().__init__(false_alarms)
        if min(steps, images, batch_size) < 1 or epsilon <= 0:
            raise ValueError(f"{steps=}, {images=} and {batch_size=} must be at least 1, and {epsilon=} above 0.")
        self.epsilon, self.steps, self.images, self.batch_size = epsilon, steps, images, batch_size

    @override
    def learn(self, model: nn.Module, data: ThiefData, seed: int) -> None:
        """Makes the bank."""
        device = device_of(model)
        rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))[: self.images]
        x, self._low, self._high = (part.to(device) for part in (data.x[rows], data.low, data.high))
        targets = torch.arange(-1, data.num_classes)
        parts = torch.split(targets, max(1, self.batch_size // len(x)))
        bank = [
            universal_perturbations(model, x, part, self.epsilon, self.steps, self._low, self._high) for part in parts
        ]
        self.bank = torch.cat(bank)
        """The perturbations in pixels from 0 to 1, ``(1 + K, C, H, W)``: away from the answer, then to each class."""

    @override
    @torch.no_grad()
    def suspicion(self, model: nn.Module, x: Tensor) -> Tensor:
        """Share of the bank that changes nothing, ``(N,)`` in ``[0, 1]``."""
        shift, shares = self.bank * (self._high - self._low), []
        for part in torch.split(x, max(1, self.batch_size // len(shift))):
            queries = part.to(shift.device)
            moved = (queries[:, None] + shift).clamp(self._low, self._high)
            answers = model(moved.flatten(0, 1)).argmax(dim=-1).unflatten(0, moved.shape[:2])
            shares.append((answers == model(queries).argmax(dim=-1)[:, None]).float().mean(dim=1))
        return torch.cat(shares)
