"""Weight noise: random numbers on all parameters, to blur a watermark that sits in fine tuning of the weights.

**Source.** The plainest of the attacks that move weights at random, without a paper of its own; compare weight shifting in Lukas et al., "SoK:
How Robust is Image Classification Deep Neural Network Watermarking?" (S&P 2022).

**Algorithm.** 1. Draw one standard normal number for every parameter. 2. For each scale, add to every tensor of the untouched model
``scale · std(tensor) ·`` its numbers. All points lie on one ray: the same direction, farther and farther.

**Cost.** One pass over the parameters a point, no training and no data.

**Defaults.** Scales .05 to 1 of each tensor's own standard deviation, so that one number fits layers of any width.

**Pitfalls.** Noise of one size for all layers destroys the narrow-ranged ones first. A tensor whose entries are all equal, such as a normalisation's
fresh scale, has deviation 0 and stays. Running statistics, which are no parameters, stay too, although they no longer fit the
noisy weights; a few clean batches in training mode would win accuracy back. One direction is one draw: repeat with other seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, growing


@torch.no_grad()
def add_weight_noise(model: nn.Module, scale: float, generator: torch.Generator) -> nn.Module:
    """Returns a copy with Gaussian noise on its floating-point parameters.

    Args:
        model: Any module; not changed.
        scale: Standard deviation of the noise, in standard deviations of the tensor that it is added to.
        generator: Source of randomness, on the CPU, so that all devices see the same noise.

    Raises:
        ValueError: If ``scale`` is negative.
    """
    if scale < 0:
        raise ValueError(f"scale={scale} is a standard deviation and must be 0 or more.")
    noisy = copy.deepcopy(model)
    for parameter in noisy.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(scale * parameter.std(correction=0) * noise)
    return noisy


class WeightNoise(Removal):
    """Adds more and more noise to the untouched model's parameters.

    Args:
        scales: Standard deviations of the noise in those of each tensor, above 0, growing.

    Raises:
        ValueError: If the scales are out of range or do not grow.
    """

    unit = "noise in standard deviations of the weights"

    def __init__(self, scales: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)) -> None:
        self.scales = growing("scales", scales)

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        """Shows a noisy copy for every scale, all in the direction that the seed draws; no data are used."""
        for scale in self.scales:
            if not observe(scale, add_weight_noise(model, scale, torch.Generator().manual_seed(seed)).eval()):
                return
