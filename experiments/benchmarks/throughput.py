"""What a theft and a verification cost beside the network's own forward passes, in turns, in one process.

    python -m meadef_lightning.experiments.benchmarks.throughput [--help]

**Extraction**: new queries through the :class:`~meadef_lightning.oracle.Oracle`, with soft and hard answers, its ledger in memory and
in a file, against plain forward passes of the same network; and the steps of the student against those of supervised training.
**Verification**: whole verdicts of tasks of 10, 100 and 1,000 classes against plain forward passes of as many samples, and the
statistic alone, over all 5,760 keys of ten classes and over 999 decoys of more. Images and weights are random: neither changes the
cost. Writes ``throughput.json`` and prints tables.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from meadef_lightning.experiments.benchmarks.measuring import (
    BARE_TRAINER,
    Section,
    compared,
    in_turns,
    machine,
    seconds,
    show,
    spread,
)
from meadef_lightning.experiments.benchmarks.step_time import Stopwatch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.extraction import Student
from meadef_lightning.oracle import HardLabel, Oracle, QueryLedger, Soft
from meadef_lightning.quiet import quiet
from meadef_lightning.verification import judge, verify
from meadef_lightning.victims import SupervisedVictim, networks
from meadef_lightning.watermark import KeySpace, WatermarkKey

COMMAND = "python -m meadef_lightning.experiments.benchmarks.throughput"
_BATCH = 512


class SyntheticTask:
    """Random images of as many classes as one likes, in the form that verification asks for.

    Args:
        num_classes: Number of classes.
        per_class: Images of each class that sources come from.
        image_shape: Channels, height and width.
        test: Test images.
    """

    def __init__(self, num_classes: int, per_class: int, image_shape: tuple[int, int, int], test: int = 1000) -> None:
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(0)
        self._splits = {
            split: (torch.randn(count, *image_shape, generator=generator), torch.arange(count) % num_classes)
            for split, count in (("verification", num_classes * per_class), ("test", test))
        }

    def prepare_data(self) -> None:
        """Has nothing to download."""

    def setup(self, stage: str) -> None:
        """Has nothing to split."""

    def tensors(self, split: Literal["verification", "test"]) -> tuple[Tensor, Tensor]:
        """Returns images and labels."""
        return self._splits[split]


def untrained(network: str, num_classes: int, channels: int) -> nn.Module:
    """Returns a network of :mod:`meadef_lightning.victims.networks`, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = getattr(networks, network)(num_classes, channels)
    return made.eval()


def forward(network: nn.Module, x: Tensor) -> None:
    """Plain forward passes of all rows."""
    with torch.no_grad():
        for batch in torch.split(x, _BATCH):
            network(batch)


def extraction(network: str, image_size: int, queries: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measures queries through the oracle against plain forward passes.

    Args:
        network: Name of the network in :mod:`meadef_lightning.victims.networks`.
        image_size: Height and width of the images, of three channels.
        queries: New queries a round.
        rounds: Rounds, after one that is not counted.

    Returns:
        What :func:`~.measuring.compared` does, and ``per_second``; the answers from the cache are those of the oracle before.
    """
    model, generator = untrained(network, 10, 3), torch.Generator().manual_seed(0)

    def new() -> Tensor:
        return torch.randn(queries, 3, image_size, image_size, generator=generator)

    with tempfile.TemporaryDirectory() as folder:
        oracles = {
            "soft, ledger in memory": Oracle(model, Soft()),
            "soft, ledger in a file": Oracle(model, Soft(), QueryLedger(f"{folder}/soft.sqlite")),
            "hard, ledger in memory": Oracle(model, HardLabel()),
            "hard, ledger in a file": Oracle(model, HardLabel(), QueryLedger(f"{folder}/hard.sqlite")),
        }
        known: list[Tensor] = []

        def ask(oracle: Oracle) -> float:
            known[:] = [new()]
            return seconds(lambda: oracle.query(known[0]))

        measures: dict[str, Callable[[], float]] = {
            "plain forward passes": lambda: seconds(partial(forward, model, new()))
        }
        measures |= {name: partial(ask, oracle) for name, oracle in oracles.items()}
        again = oracles["hard, ledger in a file"]
        measures["the last ones again, from the file"] = lambda: seconds(lambda: again.query(known[0]))
        result = compared(in_turns(measures, rounds), "plain forward passes")
    return {name: {**row, "per_second": queries / row["median"]} for name, row in result.items()}


def training_step(module: Callable[[], LightningModule], x: Tensor, y: Tensor, batch_size: int) -> float:
    """Returns the median seconds of a step of Lightning's real loop, the first two left out."""
    seed_everything(0, verbose=False)
    watch = Stopwatch()
    with quiet():
        trainer = Trainer(
            **BARE_TRAINER,
            callbacks=[watch],
        )
        loader = DataLoader(TensorDataset(x, y), batch_size)
        trainer.fit(module(), loader, loader)
    return statistics.median(watch.seconds)


def student_steps(
    network: str, image_size: int, steps: int, rounds: int, batch_size: int = 128
) -> dict[str, dict[str, float]]:
    """Measures the student's training steps against those of supervised training of the same network.

    Args:
        network: Name of the network in :mod:`meadef_lightning.victims.networks`.
        image_size: Height and width of the images, of three channels.
        steps: Steps timed a round.
        rounds: Rounds, after one that is not counted.
        batch_size: Images a step.

    Returns:
        What :func:`~.measuring.compared` does, and ``per_second``.
    """
    count = batch_size * (steps + 2)
    x, y = torch.randn(count, 3, image_size, image_size), torch.arange(count) % 10
    soft = torch.randn(count, 10).softmax(dim=1)
    factory = getattr(networks, network)
    supervised = partial(SupervisedVictim, factory, num_classes=10, in_channels=3)
    student = partial(Student, factory, num_classes=10, in_channels=3)
    result = compared(
        in_turns(
            {
                "supervised training": lambda: training_step(supervised, x, y, batch_size),
                "student, soft answers": lambda: training_step(student, x, soft, batch_size),
                "student, hard answers": lambda: training_step(student, x, y, batch_size),
            },
            rounds,
        ),
        "supervised training",
    )
    return {name: {**row, "per_second": 1 / row["median"]} for name, row in result.items()}


def verdicts(
    network: str, num_classes: int, image_size: int, decoys: int, samples: int, rounds: int
) -> dict[str, float]:
    """Measures whole verdicts against plain forward passes of as many samples, and the statistic alone.

    Args:
        network: Name of the network in :mod:`meadef_lightning.victims.networks`.
        num_classes: Classes of the task.
        image_size: Height and width of the images, of three channels.
        decoys: Keys to compare with; from the size of the key space on, all.
        samples: Triggers.
        rounds: Rounds, after one that is not counted.

    Returns:
        ``keys`` compared, ``queries`` of a verdict, ``verdict`` seconds, ``statistic`` seconds (judging alone, nothing asked),
        ``per_second`` queries, and the verdict's ``ratio``, ``ratio_min`` and ``ratio_max`` to plain forward passes.
    """
    task = SyntheticTask(num_classes, 6 if num_classes > 100 else 20, (3, image_size, image_size))
    model, key = untrained(network, num_classes, 3), WatermarkKey.draw(num_classes, "only for this benchmark")
    options = {"samples": samples, "decoys": decoys, "accelerator": "cpu"}
    _, responses = verify(model, key, task, **options)  # type: ignore[arg-type]
    queries = 2 * len(responses.trigger) + int(responses.counts.sum()) + len(responses.natural)
    x = task.tensors("verification")[0][torch.arange(_BATCH) % len(task.tensors("verification")[0])]

    batches = max(1, queries // _BATCH)

    def ask_plainly() -> None:
        # the same batch again and again, since images do not change the cost
        for _ in range(batches):
            forward(model, x)

    def plain() -> float:
        return seconds(ask_plainly) * queries / (batches * _BATCH)

    values = in_turns(
        {
            "plain": plain,
            "verdict": lambda: seconds(lambda: verify(model, key, task, **options)),  # type: ignore[arg-type]
            "statistic": lambda: seconds(lambda: judge(responses, key)),
        },
        rounds,
    )
    verdict = compared(values, "plain")["verdict"]
    return {
        "keys": judge(responses, key).decoys + 1,
        "queries": queries,
        "verdict": verdict["median"],
        "statistic": statistics.median(values["statistic"]),
        "per_second": queries / verdict["median"],
        **{name: verdict[name] for name in ("ratio", "ratio_min", "ratio_max")},
    }


def main(
    queries: int = 4096,
    rounds: int = 5,
    steps: int = 5,
    sizes: Sequence[tuple[str, int]] = (("DigitsCNN", 16), ("VGGLike", 32)),
    classes: Sequence[int] = (10, 100, 1000),
    output: str = "runs/benchmarks",
) -> list[Section]:
    """Measures the throughput of extraction and verification.

    Args:
        queries: New queries per round of extraction; an eighth of them for every network but the first.
        rounds: Rounds of extraction, after one that is not counted; verification takes a third of them.
        steps: Timed training steps per round.
        sizes: Networks, and the height and width of their images; verification asks the first.
        classes: Classes of the tasks to be verified.
        output: Directory of ``throughput.json``.
    """
    directory = make_directory(Path(output))
    asked: dict[str, dict[str, dict[str, float]]] = {}
    trained: dict[str, dict[str, dict[str, float]]] = {}
    rows, steps_rows, verdict_rows = [], [], []
    for number, (network, size) in enumerate(sizes):
        asked[network] = extraction(network, size, queries // 8 if number else queries, rounds)
        rows += [[network, name, f"{row['per_second']:,.0f}", *spread(row)] for name, row in asked[network].items()]
        trained[network] = student_steps(network, size, steps, rounds)
        steps_rows += [[network, name, f"{row['per_second']:.1f}", *spread(row)] for name, row in trained[network].items()]  # fmt: skip
    network, size = sizes[0]
    judged = {}
    for count in classes:
        row = judged[count] = verdicts(network, count, size, 9999 if count <= 10 else 999, 200 if count <= 100 else 32, max(1, rounds // 3))  # fmt: skip
        compares = (
            f"all {row['keys']:,.0f}" if row["keys"] == KeySpace(count).size else f"{row['keys'] - 1:,.0f} decoys"
        )
        verdict_rows.append(
            [f"{count:,}", compares, f"{row['queries']:,.0f}", f"{row['verdict']:.1f}", f"{row['per_second']:,.0f}", *spread(row), f"{1e3 * row['statistic']:.0f}"]
        )  # fmt: skip
    images = " and ".join(f"{name} on 3x{size}x{size}" for name, size in sizes)
    sections = [
        Section(
            "Queries of a theft",
            COMMAND,
            ("victim", "asked through", "queries a second", "ratio of seconds", "range"),
            rows,
            f"New queries in batches of {_BATCH}; {images}; {rounds} rounds.",
        ),
        Section(
            "Steps of a thief's student",
            COMMAND,
            ("network", "training", "steps a second", "ratio of seconds", "range"),
            steps_rows,
            "Batches of 128 images, Lightning's real loop.",
        ),
        Section(
            "Verdicts",
            COMMAND,
            ("classes", "keys compared", "queries", "seconds", "queries a second", "ratio to forward passes", "range", "statistic alone, ms"),
            verdict_rows,
            f"{network} on 3x{size}x{size}; a verdict asks 32 composites of every cell.",
        ),
    ]  # fmt: skip
    for section in sections:
        show(section)
    write_json_atomic(
        directory / "throughput.json",
        {"machine": machine(), "extraction": asked, "student": trained, "verification": {str(n): row for n, row in judged.items()}},
    )  # fmt: skip
    return sections


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
