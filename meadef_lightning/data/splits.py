"""One way to cut a labelled data set into parts that share no sample: pure functions on indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Split: TypeAlias = Literal["victim", "validation", "attacker", "verification", "test"]
"""Who uses a split: the victim's training, its validation, the thief's queries, the owner's verification, testing."""

SHARES: dict[Split, int] = {"test": 4, "validation": 1, "verification": 1, "victim": 8, "attacker": 6}
"""Relative sizes of splits whose size is not given, in the order in which splits are cut.

The attacker comes last: asking for more or fewer queries then changes no other split, and the smaller query set is
contained in the larger one.
"""


def split_sizes(n: int, sizes: Mapping[Split, int | None]) -> dict[Split, int]:
    """Resolves open sizes: splits without a size share what the others leave, in proportion to ``SHARES``.

    Args:
        n: number of samples to divide, at least 1.
        sizes: wanted size of each split; ``None`` for a share of what remains, ``0`` to leave a split out.

    Returns:
        The size of each split, in the order of ``SHARES``. The sizes sum to ``n`` when any of them was open.

    Raises:
        ValueError: a split is unknown, a size is negative, the sizes do not fit, or nothing remains for an open one.
    """
    if unknown := set(sizes) - set(SHARES):
        raise ValueError(f"Unknown split(s) {sorted(unknown)}; choose from {list(SHARES)}.")
    ordered: dict[Split, int | None] = {name: sizes[name] for name in SHARES if name in sizes}
    wanted = ", ".join(f"{name}={'open' if size is None else size}" for name, size in ordered.items())
    if n < 1:
        raise ValueError(f"There are no samples to split (n={n}; {wanted}).")
    if negative := [name for name, size in ordered.items() if size is not None and size < 0]:
        raise ValueError(f"Split sizes must be 0 or more, got {wanted}. Correct {negative}.")
    remaining = n - sum(size for size in ordered.values() if size is not None)
    open_splits = [name for name, size in ordered.items() if size is None]
    if remaining < 0:
        raise ValueError(f"The splits ask for {n - remaining} samples ({wanted}) but there are {n}. Lower some sizes.")
    if remaining < len(open_splits):
        raise ValueError(
            f"Only {remaining} of {n} samples remain for the open split(s) {open_splits} ({wanted}). "
            "Lower the given sizes, or set the open ones to 0 to leave them out."
        )
    total = sum(SHARES[name] for name in open_splits)
    shares = {name: max(1, remaining * SHARES[name] // total) for name in open_splits}
    if open_splits:  # the largest share takes what rounding leaves
        largest = max(open_splits, key=SHARES.__getitem__)
        shares[largest] += remaining - sum(shares.values())
    return {name: shares[name] if size is None else size for name, size in ordered.items()}


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffles samples so that any run of consecutive positions holds the classes in nearly their overall proportion.

    The samples of a class, in random order, are placed at equal distances in [0, 1), from a random offset; sorting by
    place interleaves the classes. An interval then holds every class in exact proportion but for one sample, and of
    equally frequent classes any ``k · C`` consecutive positions hold ``k`` samples each.

    Args:
        labels: class of each sample, int64 (N,).
        generator: CPU generator, the only source of randomness.

    Returns:
        A permutation of ``range(N)``, int64 (N,).
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts
    of_class = labels[by_class]
    rank = torch.arange(len(labels)) - first[of_class]
    offset = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    return by_class[torch.argsort((rank + offset[of_class]) / counts[of_class], stable=True)]


def split_indices(
    n: int, sizes: Mapping[Split, int | None], seed: int, labels: Tensor | None = None
) -> dict[Split, Tensor]:
    """Draws disjoint index sets.

    Args:
        n: number of samples to divide, at least 1.
        sizes: wanted size of each split, as for ``split_sizes``.
        seed: seed of the draw; the same arguments always give the same splits.
        labels: class of each sample, int64 (n,). When given, every split holds the classes in nearly their overall
            proportion, and so does any prefix of it.

    Returns:
        For each split its indices in ``range(n)``, int64, in random order; no index occurs twice.

    Raises:
        ValueError: the sizes do not fit (see ``split_sizes``), or there is not one label for each sample.
    """
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one for each sample, got {tuple(labels.shape)}.")
    resolved = split_sizes(n, sizes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator) if labels is None else stratified_order(labels, generator)
    return dict(zip(resolved, torch.split(order[: sum(resolved.values())], list(resolved.values())), strict=True))
