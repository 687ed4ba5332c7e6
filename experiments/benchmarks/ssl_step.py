"""What a watermarked step of self-supervised training costs: plain SimCLR against SimCLR with the default recipe, in turns.

    python -m meadef_lightning.experiments.benchmarks.ssl_step [--help]

Each round trains a few steps of Lightning's real loop with and without
:class:`~meadef_lightning.watermark.feature_callback.FeatureWatermarkCallback`, whose embedding begins in the middle of the run, and
times the last ones of both; the ratio is taken within a round, and the median over rounds is told with the range. Peak memory comes
from one fresh process per variant. Writes ``ssl_step.json`` and prints a table. The aim is a ratio of at most 1.35.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from meadef_lightning.experiments.benchmarks.measuring import (
    BARE_TRAINER,
    Section,
    compared,
    in_turns,
    machine,
    peak_memory,
    show,
    spread,
)
from meadef_lightning.experiments.benchmarks.step_time import Stopwatch
from torch.utils.data import DataLoader, TensorDataset

from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.quiet import quiet
from meadef_lightning.victims import SimCLRVictim, networks
from meadef_lightning.watermark import FeatureWatermarkCallback, WatermarkKey

VARIANTS = ("plain", "watermarked")
_WARM_UP = 2


def measure(variant: str, network: str, batch_size: int, image_size: int, steps: int) -> float:
    """Trains ``2 · (steps + 2)`` steps of SimCLR and returns the median seconds of the last ``steps``.

    Args:
        variant: One of ``VARIANTS``.
        network: Name of the encoder's network in :mod:`meadef_lightning.victims.networks`.
        batch_size: Images per step, of which there are two views each.
        image_size: Height and width.
        steps: Steps that are timed.
    """
    seed_everything(0, verbose=False)
    count = batch_size * 2 * (steps + _WARM_UP)
    data = TensorDataset(torch.randn(count, 3, image_size, image_size), torch.arange(count) % 10)
    key = WatermarkKey((0, 1), 2, num_classes=10)
    # the recipe's own start, the middle of the run: nothing is timed before
    callbacks = [] if variant == "plain" else [FeatureWatermarkCallback(key)]
    watch = Stopwatch()
    with quiet():
        trainer = Trainer(
            **BARE_TRAINER,
            callbacks=[*callbacks, watch],
        )
        loader = DataLoader(data, batch_size)
        victim = SimCLRVictim(getattr(networks, network), in_channels=3, feature_dim=128)
        trainer.fit(victim, loader, loader)
    if callbacks and callbacks[0].objective.steps < steps:
        raise RuntimeError(f"Only {callbacks[0].objective.steps} steps were watermarked, fewer than the {steps} timed.")
    return statistics.median(watch.seconds[-steps:])


def main(
    batch_size: int = 128,
    image_size: int = 32,
    network: str = "VGGLike",
    rounds: int = 5,
    steps: int = 3,
    memory: bool = True,
    output: str = "runs/benchmarks",
) -> Section:
    """Measures step time and peak memory of watermarked SimCLR.

    Args:
        batch_size: Images per step.
        image_size: Height and width.
        network: Name of the encoder's network in ``meadef_lightning.victims.networks``.
        rounds: Rounds over both variants, after one that is not counted.
        steps: Timed steps per variant and round.
        memory: Whether to measure peak memory, too.
        output: Directory of ``ssl_step.json``.
    """
    directory = make_directory(Path(output))
    size = (network, batch_size, image_size)
    times = in_turns(
        {variant: lambda variant=variant: measure(variant, *size, steps) for variant in VARIANTS},
        rounds,
    )
    result = compared(times, "plain")
    if memory:
        code = "from meadef_lightning.experiments.benchmarks import ssl_step as s"
        for variant in VARIANTS:
            result[variant]["peak_mib"] = peak_memory(code, f"s.measure({variant!r}, *{size!r}, 2)")
    rows = []
    for variant in VARIANTS:
        row = result[variant]
        peak = [f"{row['peak_mib']:.0f}", f"{row['peak_mib'] / result['plain']['peak_mib']:.2f}"] if memory else ["-", "-"]  # fmt: skip
        rows.append([variant, f"{1e3 * row['median']:.0f}", *spread(row), *peak])
    section = Section(
        "A step of self-supervised training",
        "python -m meadef_lightning.experiments.benchmarks.ssl_step",
        ("SimCLR", "ms per step", "ratio", "range", "peak MiB", "memory ratio"),
        rows,
        f"{network}, batches of {batch_size} images 3x{image_size}x{image_size} in two views each, {rounds} rounds of {steps} steps; "
        "the default recipe.",
    )
    show(section)
    write_json_atomic(
        directory / "ssl_step.json",
        {"machine": machine(), "network": network, "batch_size": batch_size, "image_size": image_size, "variants": result},
    )  # fmt: skip
    return section


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
