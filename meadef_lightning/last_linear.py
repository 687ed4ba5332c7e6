"""The last linear layer of a network, whatever its architecture: the one that runs last, which need not be registered last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def last_linear_run(
    module: nn.Module, forward: Callable[[Tensor], object], x: Tensor
) -> tuple[nn.Linear, Tensor] | None:
    """Finds the last ``nn.Linear`` that runs in ``forward(x)``, and what it got.

    Args:
        module: The module whose layers ``forward`` runs through; its mode is left as it is, and no hook stays on it.
        forward: Maps samples to anything; called once.
        x: Samples, ``(B, …)``, where ``forward`` takes them.

    Returns:
        The layer itself and its input, through which gradients flow; ``None`` if no ``nn.Linear`` runs.
    """
    last: list[tuple[nn.Linear, Tensor]] = []

    def keep(layer: nn.Linear, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        last[:] = [(layer, (*arguments, *named.values())[0])]

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        forward(x)
    finally:
        for hook in hooks:
            hook.remove()
    return last[0] if last else None
