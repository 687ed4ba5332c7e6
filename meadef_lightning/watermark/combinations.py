"""Combinations of whole batches: in all the ways that are not the key's, and as they are measured on validation data."""

from __future__ import annotations

import torch
from torch import Tensor

from meadef_lightning.watermark.combiners import Combiner
from meadef_lightning.watermark.key import WatermarkKey


def combine_in_turn(combiners: list[Combiner], a: Tensor, b: Tensor, first: int, generator: torch.Generator) -> Tensor:
    """Combines pair ``i`` in way ``(first + i) mod n``: every way gets its share of the batch, in one pass each.

    Args:
        combiners: The ``n`` ways.
        a: Samples of the first source class, shape ``(B, C, *spatial)``.
        b: Samples of the second source class, same shape.
        first: Way of pair 0, so that small batches go round all ways over the steps.
        generator: For ways that draw.

    Returns:
        The combinations, grouped by way, same shape as ``a`` (each loss term averages, so order does not matter).
    """
    n = len(combiners)
    parts = [combiners[(first + i) % n](a[i::n], b[i::n], generator) for i in range(min(n, len(a)))]
    return torch.cat(parts)


def measured_groups(key: WatermarkKey, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Combines what there is of both source classes, each sample of the more frequent one once.

    Args:
        key: The key.
        a: Samples of its first source class, shape ``(N, C, *spatial)``.
        b: Samples of its second source class, shape ``(M, C, *spatial)``.

    Returns:
        ``max(N, M)`` samples each: under ``"wsr"`` those of the key's own way and, if its space has others, under ``"wfpr"`` those of
        the others in turn.

    Raises:
        ValueError: If a way does not fit samples of this shape.
    """
    index = torch.arange(max(len(a), len(b)), device=a.device)
    a, b = a[index % len(a)], b[index % len(b)]
    groups = {"wsr": key.combiner.build()(a, b)}
    others = [spec.build() for spec in key.control_combiners()]
    if others:
        groups["wfpr"] = combine_in_turn(others, a, b, 0, torch.Generator())
    return groups
