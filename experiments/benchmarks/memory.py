"""What must be kept in memory for large tasks: ring buffers, keys and decoys, verification, the cache of a query ledger.

    python -m meadef_lightning.experiments.benchmarks.memory [--help]

Images have ImageNet's shape, 3x224x224, and the tasks a thousand and a million classes. They are synthetic: what is kept depends on
shapes and numbers alone. Each case runs in a fresh process, whose peak resident set above that of the imports is told beside what it
should be by the formula in its documentation. Writes ``memory.json`` and prints a table.

The suspects answer with labels. A model that answers with a score for each of a million classes makes 4 MB a sample by itself:
such a model is asked in small batches, or for labels (:class:`~meadef_lightning.oracle.HardLabel`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from meadef_lightning.experiments.benchmarks.measuring import Section, machine, peak_memory, show
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.images import ImageDataset
from meadef_lightning.data.stored import StoredImages
from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.oracle import HardLabel, Oracle, QueryLedger, Soft
from meadef_lightning.verification import verify
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.watermark import WatermarkKey
from meadef_lightning.watermark.feature_objective import FeatureObjective
from meadef_lightning.watermark.objective import WatermarkObjective

_SLOTS = 128
_SECRET = "only for this benchmark"  # noqa: S105 - of a key that protects nothing
_MIB = 2**20


class GeneratedImages(ImageDataset):
    """As many images as one likes, on no disk: a few random ones, again and again.

    Args:
        labels: Class of each image, int64 ``(N,)``.
        size: Height and width; there are three channels.
    """

    def __init__(self, labels: Tensor, size: int) -> None:
        super().__init__(labels, (0.5,) * 3, (0.25,) * 3)
        generator = torch.Generator().manual_seed(0)
        self.few = torch.randint(256, (16, 3, size, size), dtype=torch.uint8, generator=generator)

    @override
    def pixels(self, rows: Tensor) -> Tensor:
        return self.few[rows % len(self.few)]

    @override
    def fingerprint(self) -> str:
        return f"generated {len(self.labels)}"


class LargeTask:
    """A task of many classes whose splits stay where they are.

    Args:
        num_classes: Number of classes, each with two images that sources come from.
        size: Height and width of the images.
        test: Test images.
    """

    def __init__(self, num_classes: int, size: int, test: int = 1000) -> None:
        self.num_classes = num_classes
        counts = {"verification": 2 * num_classes, "test": test}
        self._splits = {
            split: GeneratedImages(torch.arange(count) % num_classes, size) for split, count in counts.items()
        }
        self._shape = (3, size, size)

    def prepare_data(self) -> None:
        """Has nothing to download."""

    def setup(self, stage: str) -> None:
        """Has nothing to split."""

    def tensors(self, split: Literal["verification", "test"]) -> tuple[StoredImages, Tensor]:
        """Returns a split that is read a batch at a time, and its labels."""
        dataset = self._splits[split]
        return StoredImages(dataset, self._shape), dataset.targets


class AnyLabel(nn.Module):
    """A suspect of any number of classes without weights: the label is a hash of twelve means of the image.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @override
    def forward(self, x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return (1e6 * means.abs().sum(dim=1)).long() % self.num_classes


class TinyNetwork(nn.Module):
    """Twelve means of the image and one linear layer.

    Args:
        num_classes: Number of classes, or of features.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(12, num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return logits


def ring_buffers(num_classes: int, size: int, encoder: bool = False, steps: int = 40, batch_size: int = 32) -> None:
    """Collects source samples of a key from a stream of batches and draws combinations from them.

    Args:
        num_classes: Classes of the task.
        size: Height and width of the images.
        encoder: Whether the watermark is an encoder's.
        steps: Batches; enough to fill the buffers.
        batch_size: Images in a batch, as many of each class that is collected.
    """
    key = WatermarkKey.draw(num_classes, _SECRET)
    objective = FeatureObjective(key) if encoder else WatermarkObjective(key, tilt=0.5)
    network = TinyNetwork(64 if encoder else num_classes)
    labels = torch.tensor(objective.pool.classes)
    for _ in range(steps):
        objective.observe(torch.randn(batch_size, 3, size, size), labels[torch.arange(batch_size) % len(labels)])
        if objective.ready:
            objective.refresh(network, network)
            objective.draw()
            if num_classes <= 1000 or encoder:  # else what grows are the network's own logits
                objective.terms(network, network)


def keys_and_decoys(num_classes: int, decoys: int = 999) -> None:
    """Draws a key and everything that it is compared with."""
    table = DecoyTable(WatermarkKey.draw(num_classes, _SECRET), decoys)
    counts = torch.zeros(len(table.cells), table.width, dtype=torch.int64)
    counts[:, 0] = 32
    shares = table.shares(counts)
    table.statistics(shares, [shares])
    table.correlation(counts)


def verdict(
    num_classes: int, size: int, decoys: int = 999, batch_size: int = 64, evidence: bool = False, soft: bool = False
) -> None:
    """Judges a suspect by labels or probabilities, with two composites of every cell (which decide how long it takes, and not what is kept)."""
    task, key = LargeTask(num_classes, size), WatermarkKey.draw(num_classes, _SECRET)
    with tempfile.TemporaryDirectory() as folder:
        verify(
            TinyNetwork(num_classes) if soft else AnyLabel(num_classes),
            key,
            task,  # type: ignore[arg-type]
            samples=4,
            decoys=decoys,
            decoy_samples=2,
            batch_size=batch_size,
            accelerator="cpu",
            evidence_path=f"{folder}/evidence.json" if evidence else None,
        )


def ledger(num_classes: int, queries: int, soft: bool, file: bool, batch_size: int = 64) -> None:
    """Asks an oracle new questions and keeps none of the answers: what stays is the ledger's."""
    with tempfile.TemporaryDirectory() as folder:
        policy, path = Soft() if soft else HardLabel(), f"{folder}/ledger.sqlite" if file else None
        oracle = Oracle(TinyNetwork(num_classes), policy, QueryLedger(path), batch_size)
        for _ in range(queries // batch_size):
            oracle.query(torch.randn(batch_size, 3, 8, 8))


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        name: What is measured.
        call: The call that is measured, of a function of this file.
        expected: MiB by the documented formula.
        formula: That formula.
    """

    name: str
    call: str
    expected: float
    formula: str


def cases(size: int, classes: Sequence[int], queries: int) -> list[Case]:
    """Lists what is measured.

    Args:
        size: Height and width of the images.
        classes: Classes of the tasks.
        queries: Queries of the ledger's cases.
    """
    image, found = 3 * size * size * 4 / _MIB, []
    first, *_, most = classes
    for count in classes:
        found.append(
            Case(
                f"ring buffers, {count:,} classes",
                f"ring_buffers({count}, {size})",
                (10 * _SLOTS + 1) * image + _SLOTS * count * 4 / _MIB,
                "2·128 + 1 images; the tilt keeps 2·128 more, and every 50 steps takes 6·128 for a moment and asks the model 128 at once",
            )
        )
    found.append(
        Case(
            f"ring buffers of an encoder, {most:,} classes",
            f"ring_buffers({most}, {size}, encoder=True, steps=60)",
            (18 * _SLOTS + 1) * image,
            "10·128 + 1 images: sources, target and 7 others; the tilt as above",
        )
    )
    for count in classes:
        table = 8000 * min(count, 1001) * 8 / _MIB
        found.append(Case(f"key and 999 decoys, {count:,} classes", f"keys_and_decoys({count})", 3 * table, "3 tables of 8,000 cells, at most 1,024 classes, 8 bytes: counts, their shares, and those of references side by side; all is judged in blocks of 128 columns beside"))  # fmt: skip
        found.append(
            Case(
                f"verdict, {count:,} classes, 999 decoys, batches of 64",
                f"verdict({count}, {size})",
                2 * table + 4 * 64 * image + 2 * count * 8 * 4 / _MIB,
                "counts and shares, 4 batches, 4 numbers a source image",
            )
        )
    table = 8000 * min(first, 1001) * 8 / _MIB
    found.append(
        Case(
            f"the same by probabilities, {first:,} classes",
            f"verdict({first}, {size}, soft=True)",
            4 * table + 4 * 64 * image,
            "remaining shares in whole numbers and as such, too, 4 batches",
        )
    )
    found.append(
        Case(
            f"the same by labels with evidence, {first:,} classes",
            f"verdict({first}, {size}, evidence=True)",
            8000 * min(first, 1001) * (8 + 8 + 3 + 3 + 3) / _MIB + 4 * 64 * image,
            "counts, their list and text besides",
        )
    )
    for soft, file in ((True, False), (True, True), (False, False), (False, True)):
        bytes_each = (4 * first if soft else 8) + 100
        found.append(
            Case(
                f"ledger in {'a file' if file else 'memory'}, {queries:,} {'soft' if soft else 'hard'} answers, {first:,} classes",
                f"ledger({first}, {queries}, {soft}, {file})",
                0.0 if file else queries * bytes_each / _MIB,
                "none grows" if file else "4 bytes a class and query" if soft else "about 100 bytes a query",
            )
        )
    found.append(Case(f"ledger in memory, {queries:,} hard answers, {most:,} classes, batches of 16", f"ledger({most}, {queries}, False, False, 16)", queries * 108 / _MIB + 4 * 16 * most * 4 / _MIB, "the same, and the network's own scores"))  # fmt: skip
    return found


def main(
    image_size: int = 224,
    classes: Sequence[int] = (1000, 1_000_000),
    queries: int = 20_000,
    output: str = "runs/benchmarks",
) -> Section:
    """Measures what must be kept in memory for large tasks.

    Args:
        image_size: Height and width of the images.
        classes: Classes of the tasks, ascending, at least 10.
        queries: Queries of the ledger's cases.
        output: Directory of ``memory.json``.
    """
    directory, measured = make_directory(Path(output)), []
    for case in cases(image_size, classes, queries):
        code = "from meadef_lightning.experiments.benchmarks.memory import *"
        measured.append((case, peak_memory(code, case.call)))
    section = Section(
        "Memory of large tasks",
        "python -m meadef_lightning.experiments.benchmarks.memory",
        ("kept", "peak MiB", "by the formula", "formula"),
        [[case.name, f"{peak:,.0f}", f"{case.expected:,.0f}", case.formula] for case, peak in measured],
        f"Synthetic images 3x{image_size}x{image_size}; each case in a process of its own, above what its imports take.",
    )
    show(section)
    write_json_atomic(
        directory / "memory.json",
        {"machine": machine(), "cases": [{"name": case.name, "peak_mib": peak, "expected_mib": case.expected} for case, peak in measured]},
    )  # fmt: skip
    return section


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
