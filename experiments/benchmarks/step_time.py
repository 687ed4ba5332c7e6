"""What a watermarked training step costs: plain against watermarked, in turns, in one process.

    python -m meadef_lightning.experiments.benchmarks.step_time [--help]

Each round runs a few steps of Lightning's real training loop for each variant, so that a busy machine slows all of them alike;
the ratio is taken within a round, and the median over rounds is reported with the range. Peak memory comes from one fresh process
per variant (resident set on CPU, allocator peak on CUDA). Writes ``step_time.json`` and prints a table.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from meadef_lightning.experiments.benchmarks.measuring import BARE_TRAINER, clock
from meadef_lightning.experiments.benchmarks.measuring import peak_memory as peak_of
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.quiet import quiet
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import VGGLike
from meadef_lightning.watermark import MGDA, CombinerSpec, Fixed, LastLayerMGDA, WatermarkCallback, WatermarkKey

VARIANTS = ("plain", "default", "no tilt", "with L_com", "last-layer MGDA", "MGDA", "MGDA every 10", "published loop")
_POOL = 600
"""Samples of each of the three groups (two sources, watermark) that the published loop forwards again in every step."""


class Stopwatch(Callback):
    """Times every step but the first two of a fit."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the watch, after what the device still had to do."""
        self._synchronize(pl_module)
        self._start = clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops it."""
        self._synchronize(pl_module)
        if batch_idx >= 2:
            self.seconds.append(clock() - self._start)

    @staticmethod
    def _synchronize(pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()


class PublishedLoop(SupervisedVictim):
    """The cost model of the public reference training, in our own words: fixed pools and a gradient for each loss, in every step.

    The two source pools are forwarded without gradients and the watermark pool with them; the gradients of the task, the verification
    and the combination loss are taken one by one to weigh the losses, before the backward pass of their sum.
    """

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """One step on a batch of samples and classes."""
        x, y = batch
        a, b = x[y == 0], x[y == 1]
        rows = torch.arange(_POOL, device=x.device)
        a, b = a[rows % len(a)], b[rows % len(b)]
        task = super().training_step(batch)
        with torch.no_grad():
            sources = [self(a).softmax(1), self(b).softmax(1)]
        out = self((a + b) / 2)
        losses = [
            task,
            F.cross_entropy(out, torch.full_like(rows, 2)),
            sum(F.kl_div(out.log_softmax(1), source, reduction="batchmean") for source in sources),
        ]
        parameters = list(self.parameters())
        for loss in losses:
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.stack(losses).sum()


def watermark(variant: str) -> WatermarkCallback | None:
    """Returns the variant's callback, active from the first step."""
    if variant in ("plain", "published loop"):
        return None
    key = WatermarkKey(
        (0, 1), 2, num_classes=10, combiner=CombinerSpec("meadef_lightning.watermark.combiners.CropPaste")
    )
    if variant == "default":
        return WatermarkCallback(key, start=0.0)
    balancing = {
        "no tilt": None,
        "with L_com": Fixed(com=0.1),
        "last-layer MGDA": LastLayerMGDA(),
        "MGDA": MGDA(),
        "MGDA every 10": MGDA(every_n_steps=10),
    }[variant]
    return WatermarkCallback(key, start=0.0, balancing=balancing, tilt=0.0)


def measure(variant: str, batch_size: int, image_size: int, steps: int) -> list[float]:
    """Runs ``steps + 2`` training steps of the paper's VGG-like network and returns the seconds of the last ``steps``."""
    seed_everything(0, verbose=False)
    count = batch_size * (steps + 2)
    labels = torch.arange(count) % 10
    data = DataLoader(TensorDataset(torch.randn(count, 3, image_size, image_size), labels), batch_size)
    watch, embed = Stopwatch(), watermark(variant)
    trainer = Trainer(
        **BARE_TRAINER,
        callbacks=[embed, watch] if embed else [watch],
    )
    with quiet():
        kind = PublishedLoop if variant == "published loop" else SupervisedVictim
        trainer.fit(kind(VGGLike, num_classes=10, in_channels=3), data)
    return watch.seconds


def peak_memory(variant: str, batch_size: int, image_size: int) -> float:
    """Returns the peak memory of a fresh process that trains this variant, in MiB above a process that only imports."""
    return peak_of(
        "from meadef_lightning.experiments.benchmarks import step_time as s",
        f"s.measure({variant!r}, {batch_size}, {image_size}, 3)",
    )


def main(
    batch_size: int = 128,
    image_size: int = 32,
    rounds: int = 7,
    steps: int = 3,
    variants: tuple[str, ...] = VARIANTS,
    memory: bool = True,
    output: str = "runs/benchmarks",
) -> dict[str, dict[str, float]]:
    """Measures step time and peak memory of watermarked training.

    Args:
        batch_size: Samples per step.
        image_size: Height and width.
        rounds: Rounds over all variants.
        steps: Timed steps per variant and round.
        variants: What to measure; the first is what the others are divided by.
        memory: Whether to measure peak memory, too.
        output: Directory of ``step_time.json``.
    """
    directory = make_directory(Path(output))
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    console = Console()
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}")
        for variant in variants:
            times[variant].append(statistics.median(measure(variant, batch_size, image_size, steps)))
    peaks = {variant: peak_memory(variant, batch_size, image_size) for variant in variants} if memory else {}
    base = variants[0]
    table = Table("variant", "ms per step", "ratio", "range", "peak MiB", "memory ratio")
    result: dict[str, dict[str, float]] = {}
    for variant in variants:
        ratios = sorted(mine / plain for mine, plain in zip(times[variant], times[base], strict=True))
        row = {
            "ms": 1e3 * statistics.median(times[variant]),
            "ratio": statistics.median(ratios),
            "ratio_min": ratios[0],
            "ratio_max": ratios[-1],
        }
        if memory:
            row |= {"peak_mib": peaks[variant], "memory_ratio": peaks[variant] / peaks[base]}
        result[variant] = row
        table.add_row(
            variant, f"{row['ms']:.0f}", f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
            *(f"{row['peak_mib']:.0f}", f"{row['memory_ratio']:.2f}") if memory else ("-", "-"),
        )  # fmt: skip
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    console.print(table)
    console.print(
        f"{hardware}, torch {torch.__version__}, batch {batch_size} of 3x{image_size}x{image_size} images, VGGLike"
    )
    write_json_atomic(
        directory / "step_time.json", {"hardware": hardware, "torch": torch.__version__, "variants": result}
    )
    return result


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
