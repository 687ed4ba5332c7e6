"""Layers that a thief singles out in a model of whatever architecture, and new weights for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meadef_lightning.last_linear import last_linear_run
from meadef_lightning.random_state import kept_random_state
from meadef_lightning.removal.base import device_of
from meadef_lightning.watermark.tilt import evaluating


def last_linear(model: nn.Module, x: Tensor) -> nn.Linear:
    """Finds the last ``nn.Linear`` that runs in a forward.

    Args:
        model: Any module; runs once, in eval mode and without gradients, and is left as it was.
        x: A few samples of its input, ``(B, C, *spatial)``, on any device.

    Returns:
        The layer itself, not a copy.

    Raises:
        ValueError: If no ``nn.Linear`` runs.
    """
    with evaluating(model):
        last = last_linear_run(model, model, x.to(device_of(model, x.device)))
    if last is None:
        raise ValueError(
            f"{type(model).__name__} runs no nn.Linear, so it has no last layer to tune or to reset. Let it end in an nn.Linear, or "
            "take an attack that tunes all layers as they are (FTAL)."
        )
    return last[0]


def reset(module: nn.Module, seed: int) -> None:
    """Gives a module and everything in it new random weights and, where there are any, empty running statistics, in place.

    Every layer draws its weights as it does when it is made (its ``reset_parameters``), except that convolutions get He's normal
    weights and no bias: torch's own default shrinks the signal from layer to layer, so that deep plain networks do not learn.

    Args:
        module: A layer or a network.
        seed: Seed of the weights; torch's global random state is left as it was.

    Raises:
        ValueError: If a part has parameters of its own and cannot draw new ones: they would remain as they are.
    """
    with kept_random_state(device_of(module)), torch.no_grad():
        torch.manual_seed(seed)
        for name, part in module.named_modules():
            # transformers of torch have the underscore
            draw = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(draw):
                draw()
            elif next(part.parameters(recurse=False), None) is not None:
                raise ValueError(
                    f"{type(part).__name__} ({name or 'the model itself'}) has parameters but no reset_parameters(), so they would stay "
                    "as they are. Give the part this method, or name a network to begin anew with (DistilAgain(network=...))."
                )
            if isinstance(part, nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
