"""Magnitude pruning: the smallest weights become 0, in the hope that a watermark lives in what the task does not need.

**Source.** Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NeurIPS 2015), §3; as an attack on
watermarks, Uchida et al., "Embedding Watermarks into Deep Neural Networks" (ICMR 2017).

**Algorithm.** For each sparsity, from the untouched weights: 1. order the weights of all convolutions and linear layers by ``|w|``,
within each layer (``scope="layer"``) or over all of them (``"global"``); 2. set the least of them to 0. Biases and normalisation stay.

**Cost.** One sort of the weights a point, no training and no data.

**Defaults.** Sparsities .1 to .9, the range of the paper on this watermark, each layer by itself. A sparsity is exact: ``round(sparsity · n)`` of a
layer's ``n`` weights (of all weights, for ``"global"``) are 0. Nothing is trained afterwards; `FinePruning` and fine-tuning do that.

**Pitfalls.** One threshold over all layers spares the narrow ones and can empty a wide one, the first linear layer usually, long before the
share suggests it. Pruning again and again by a share takes that share of what is *left*, so that 9 times 10 % are 61 %, not 90 %:
every point here is pruned from the untouched weights. Statistics of batch normalisation are kept although the signal has shrunk, which costs
accuracy that a thief could win back with a few clean batches.

**The same while training.** An owner who wants to know beforehand, or to ship a pruned model whose watermark was embedded around the pruning,
gives Lightning's own callback to the Trainer, beside the watermark's::

    from lightning.pytorch.callbacks import ModelPruning

    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(layer, "weight") for layer in weighted_layers(module)],
        amount=0.5,
        apply_pruning=lambda epoch: epoch == 20,  # otherwise half of what is left goes in every epoch
        use_global_unstructured=True,  # scope="global"; False for "layer"
        use_lottery_ticket_hypothesis=False,  # otherwise the remaining weights go back to what they were before training
    )
    Trainer(callbacks=[pruning, watermark], max_epochs=30)

From epoch 20 on the pruned weights stay 0 while the others are trained, and at the end of the training the masks are made permanent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, growing

Scope = Literal["layer", "global"]


def weighted_layers(model: nn.Module) -> list[nn.Linear | _ConvNd]:
    """Returns a model's convolutions and linear layers; of several that share a weight, one.

    Args:
        model: Any module.

    Raises:
        ValueError: If there is none, or if a weight is computed from other tensors, as under a pruning mask that is not permanent yet.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no convolution and no linear layer, so there are no weights to change."
        )
    if any("weight" not in layer._parameters for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has layers whose weight is computed (pruned or parametrised). Make it permanent first, with "
            "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations."
        )
    return list({id(layer.weight): layer for layer in layers}.values())


@torch.no_grad()
def magnitude_prune(model: nn.Module, sparsity: float, scope: Scope = "layer") -> nn.Module:
    """Returns a copy whose smallest weights are 0.

    Args:
        model: Has convolutions or linear layers; not changed.
        sparsity: Share of their weights that become 0, in ``[0, 1]``.
        scope: ``"layer"``: this share of each layer; ``"global"``: of all layers together.

    Raises:
        ValueError: If ``sparsity`` or ``scope`` is unknown, or the model has no such layers.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} is a share of the weights and must lie in [0, 1].")
    if scope not in ("layer", "global"):
        raise ValueError(
            f'scope="{scope}" must be "layer" (a share of each layer) or "global" (of all layers together).'
        )
    pruned = copy.deepcopy(model)
    weights: list[Tensor] = [layer.weight for layer in weighted_layers(pruned)]
    rule: Any = prune.L1Unstructured(float(sparsity))  # torch does not type it; an integer 1 would mean a single weight
    if scope == "layer":
        kept = [rule.prune(weight.contiguous()) for weight in weights]  # torch cannot rank another memory format
    else:
        together = rule.prune(torch.cat([weight.flatten() for weight in weights]))
        kept = list(torch.split(together, [weight.numel() for weight in weights]))
    # values only: masks beside the weights would change the model's parameters and their order
    for weight, values in zip(weights, kept, strict=True):
        weight.copy_(values.view_as(weight))
    return pruned


class MagnitudePruning(Removal):
    """Prunes more and more of the untouched model's smallest weights.

    Args:
        sparsities: Shares of weights that become 0, in ``(0, 1)``, growing.
        scope: ``"layer"`` or ``"global"``, see `magnitude_prune`.

    Raises:
        ValueError: If the sparsities are out of range or do not grow.
    """

    unit = "pruned share"

    def __init__(
        self, sparsities: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), scope: Scope = "layer"
    ) -> None:
        self.sparsities = growing("sparsities", sparsities, below=1)
        self.scope: Scope = scope

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        """Shows a pruned copy for every sparsity; nothing is random, and no data are used."""
        for sparsity in self.sparsities:
            if not observe(sparsity, magnitude_prune(model, sparsity, self.scope).eval()):
                return
