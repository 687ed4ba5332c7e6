"""What a second process costs a watermarked training: weak scaling, and the watermark's own communication.

    python -m meadef_lightning.experiments.benchmarks.scaling [--help]

One process, and then two joined by gloo on the CPU, train the same network with the same batch *per process*, in turns, plain and
watermarked; with ideal weak scaling a step takes as long for two as for one. On a machine of two cores both processes share memory
bandwidth and cache, so the plain training is the yardstick: what the watermark loses beyond it is the watermark's. Seconds are those
of the clock, since waiting for the other process counts; measure where nothing else runs.

Collectives, their bytes and their time come from PyTorch's profiler in trainings of their own. The time includes the wait for the slower
process. What a watermarked step communicates more than a plain one is the watermark's own: with fixed weights nothing, once all
processes have their samples; with MGDA the gradient of each loss. Writes ``scaling.json`` and prints two tables.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from meadef_lightning.experiments.benchmarks.measuring import (
    BARE_TRAINER,
    Section,
    compared,
    in_turns,
    machine,
    show,
    spread,
)
from meadef_lightning.experiments.benchmarks.step_time import watermark
from torch.utils.data import DataLoader, TensorDataset

from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.quiet import quiet
from meadef_lightning.victims import SupervisedVictim, networks

VARIANTS = ("plain", "default", "MGDA")
"""Names of `step_time`."""
_WARM_UP = 2
_BYTES = {
    "float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2, "int": 4, "long int": 8, "unsigned char": 1, "signed char": 1,
    "bool": 1,
}  # fmt: skip


class Clock(Callback):
    """Times every step after the first ones; profiles them instead where a file is given.

    Args:
        trace: Where to write the profiler's trace.
    """

    def __init__(self, trace: Path | None = None) -> None:
        self.seconds: list[float] = []
        self.trace = trace
        self._profile: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        if self.trace is not None and batch_idx == _WARM_UP:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
            self._profile.start()
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops it, and after the last step writes the trace: without the metrics, which are reduced once an epoch."""
        if batch_idx >= _WARM_UP:
            self.seconds.append(time.perf_counter() - self._start)
        if self._profile is not None and batch_idx + 1 == trainer.num_training_batches:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self.trace))


def collectives(trace: Mapping[str, Any]) -> dict[str, float]:
    """Adds up what a trace of PyTorch's profiler holds of gloo.

    Returns:
        Number of collectives, ``bytes`` that each process gave to them, and their ``seconds``, wait for others included.
    """
    events = [event for event in trace["traceEvents"] if event.get("name", "").startswith("gloo:")]
    size = 0
    for event in events:
        told = event["args"]
        size += sum(
            _BYTES[kind] * math.prod(shape)
            for kind, shape in zip(told.get("Input type", ()), told.get("Input Dims", ()), strict=True)
        )
    return {
        "collectives": float(len(events)),
        "bytes": float(size),
        "seconds": sum(event["dur"] for event in events) / 1e6,
    }


def train(
    variant: str,
    network: str,
    batch_size: int,
    image_size: int,
    steps: int,
    rank: int = 0,
    size: int = 1,
    trace: Path | None = None,
) -> list[float]:
    """Trains ``steps + 2`` steps as one of ``size`` processes and returns the seconds of the last ``steps``."""
    seed_everything(0, verbose=False)
    count = batch_size * (steps + _WARM_UP)
    generator = torch.Generator().manual_seed(rank)
    data = TensorDataset(torch.randn(count, 3, image_size, image_size, generator=generator), torch.arange(count) % 10)
    clock, embed = Clock(trace), watermark(variant)
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            devices=size,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=10)) if size > 1 else "auto",
            use_distributed_sampler=False,  # each process has made images of its own
            **BARE_TRAINER,
            callbacks=[embed, clock] if embed else [clock],
        )
        trainer.fit(
            SupervisedVictim(getattr(networks, network), num_classes=10, in_channels=3), DataLoader(data, batch_size)
        )
    return clock.seconds


def member(rank: int, size: int, port: int, threads: int, orders: Connection) -> None:
    """One process of a team: trains what it is told to, until it is told nothing, and answers with seconds or traffic."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(threads)
    while (order := orders.recv()) is not None:
        options, profiled = order
        if not profiled:
            orders.send(statistics.median(train(**options, rank=rank, size=size)))
            continue
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            train(**options, rank=rank, size=size, trace=trace)
            orders.send(collectives(json.loads(trace.read_text())))


class Team:
    """Processes that train together; use as a context manager.

    Args:
        size: How many.
        threads: Threads of each.
    """

    def __init__(self, size: int, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=member, args=(rank, size, port, threads, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that the end of the process is the end of its pipe

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
            process.join()

    def ask(self, options: Mapping[str, Any], profiled: bool = False) -> Any:
        """Lets all train and returns what the first one found; raises ``EOFError`` if one of them ended."""
        for pipe in self.pipes:
            pipe.send((dict(options), profiled))
        answers = [pipe.recv() for pipe in self.pipes]
        return answers[0]


def main(
    batch_size: int = 128,
    image_size: int = 32,
    network: str = "VGGLike",
    rounds: int = 5,
    steps: int = 5,
    threads: int = 1,
    variants: Sequence[str] = VARIANTS,
    output: str = "runs/benchmarks",
) -> list[Section]:
    """Measures weak scaling from one process to two, and what they say to each other.

    Args:
        batch_size: Samples per step and process.
        image_size: Height and width.
        network: Name of a network without batch normalisation in ``meadef_lightning.victims.networks``.
        rounds: Rounds over all variants, after one that is not counted.
        steps: Timed steps per variant and round.
        threads: Threads of each process; two processes want twice as many cores.
        variants: What to measure, of ``step_time``'s variants; the first is what communication is compared with.
        output: Directory of ``scaling.json``.
    """
    directory = make_directory(Path(output))
    size = {"network": network, "batch_size": batch_size, "image_size": image_size, "steps": steps}
    with Team(1, threads) as one, Team(2, threads) as two:
        measures = {
            f"{variant} {name}": partial(team.ask, {"variant": variant, **size})
            for variant in variants
            for name, team in (("1", one), ("2", two))
        }
        times = in_turns(measures, rounds)
        traffic = {variant: two.ask({"variant": variant, **size}, profiled=True) for variant in variants}
    result = {}
    for variant in variants:
        scaled = compared({name: times[f"{variant} {name}"] for name in "12"}, "1")
        per_step = {name: value / steps for name, value in traffic[variant].items()}
        result[variant] = {"one": scaled["1"], "two": scaled["2"], "traffic_per_step": per_step}
    plain = result[variants[0]]["traffic_per_step"]
    text = (
        f"{network}, batches of {batch_size} images 3x{image_size}x{image_size} in each process, {threads} thread(s) each, gloo on the CPU, "
        f"{rounds} rounds of {steps} steps."
    )
    command = "python -m meadef_lightning.experiments.benchmarks.scaling"
    sections = [
        Section(
            "Weak scaling, from one process to two",
            command,
            ("variant", "ms per step, 1 process", "2 processes", "ratio", "range"),
            [
                [name, f"{1e3 * row['one']['median']:.0f}", f"{1e3 * row['two']['median']:.0f}", *spread(row["two"])]
                for name, row in result.items()
            ],
            f"{text} By the clock. A ratio of 1 is ideal; on two cores, processes share memory bandwidth, and the plain row says how much "
            "that costs.",
        ),
        Section(
            "Communication of a step, two processes",
            command,
            ("variant", "collectives", "KiB", "ms in them", "the watermark's own: collectives", "KiB"),
            [_traffic_row(name, row["traffic_per_step"], plain) for name, row in result.items()],
            f"{text} What each process gives to collectives, from PyTorch's profiler; their time includes the wait for the slower process.",
        ),
    ]
    for section in sections:
        show(section)
    write_json_atomic(
        directory / "scaling.json", {"machine": machine(), **size, "threads": threads, "variants": result}
    )
    return sections


def _traffic_row(name: str, row: Mapping[str, float], plain: Mapping[str, float]) -> list[str]:
    more = {key: row[key] - plain[key] for key in ("collectives", "bytes")}
    return [
        name, f"{row['collectives']:.1f}", f"{row['bytes'] / 2**10:,.1f}", f"{1e3 * row['seconds']:.1f}",
        f"{more['collectives']:.1f}", f"{more['bytes'] / 2**10:,.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
