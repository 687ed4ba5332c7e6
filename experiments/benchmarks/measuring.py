"""What the benchmarks share: the machine, measuring in turns, peak memory of a fresh process, and sections of a page.

A busy machine slows everything that runs on it. So things are measured in turns within one process, ratios are taken within a round,
and the median over rounds is told with the range; on a CPU with one thread, seconds are the processor's and not the clock's
(:func:`clock`). Peak memory is that of a process of its own which keeps nothing that it has freed (:func:`peak_memory`).
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

BARE_TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "limit_val_batches": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Trainer whose steps are timed: nothing but the steps."""

# not ru_maxrss, which a child inherits from its parent on Linux
_RESIDENT = (
    "import sys, torch; from pathlib import Path\n"
    "def resident(): return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) / 2**10\n"
)


# glibc keeps freed tensors for later, more or fewer of them from run to run; with a fixed threshold it gives them back at once
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


@dataclass(frozen=True)
class Section:
    """One table of the page.

    Args:
        title: What was measured.
        command: What makes it again.
        columns: Heads of the columns.
        rows: Cells, as they are shown.
        text: How to read it.
    """

    title: str
    command: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""

    def markdown(self) -> str:
        """Returns the section as markdown."""
        lines = [f"### {self.title}", "", *([self.text, ""] if self.text else []), f"```bash\n{self.command}\n```", ""]
        lines += [f"| {' | '.join(self.columns)} |", f"|{'---|' * len(self.columns)}"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows), ""])


def machine() -> str:
    """Names the processor, the cores that this process may use, its threads, the accelerator and the versions."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{names[0] if names else platform.processor() or platform.machine()}, {cores} of {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}{device}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def clock() -> float:
    """Returns seconds: with one thread on a CPU those that the processor spent on this process, which other processes do not lengthen.

    Waiting for a disk is not in these. With several threads, or an accelerator, it is the wall clock.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    """Returns how long ``work`` takes, by :func:`clock`."""
    start = clock()
    work()
    return clock() - start


def show(section: Section) -> None:
    """Writes a section to the terminal, and what it was measured on."""
    Console().print(section.markdown(), f"{machine()}\n", sep="\n", markup=False, highlight=False, soft_wrap=True)


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures everything once a round, in turns.

    Args:
        measures: What to measure; each returns seconds, and is called once before the first round, which does not count.
        rounds: Rounds, at least 1.

    Returns:
        The values of each, in the order of the rounds.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if number:
                values[name].append(value)
    return values


def compared(values: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Compares what :func:`in_turns` measured.

    Args:
        values: Seconds of each, by round.
        base: What the others are divided by.

    Returns:
        For each ``median`` seconds, and ``ratio``, ``ratio_min`` and ``ratio_max`` of its seconds to the base's within a round.
    """
    result = {}
    for name, mine in values.items():
        ratios = sorted(value / other for value, other in zip(mine, values[base], strict=True))
        result[name] = {
            "median": statistics.median(mine),
            "ratio": statistics.median(ratios),
            "ratio_min": ratios[0],
            "ratio_max": ratios[-1],
        }
    return result


def spread(row: Mapping[str, float]) -> tuple[str, str]:
    """Returns a ratio and its range as text."""
    return f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"


def peak_memory(setup: str, work: str) -> float:
    """Runs Python code in a fresh process and returns its peak memory, in MiB.

    Args:
        setup: What is not counted: imports.
        work: What is counted.

    Returns:
        Peak resident set above that after ``setup``; the allocator's peak where there is a CUDA device. Both are of tensors that are
        in use: what an allocator keeps besides, for later, is not counted (on CPU with glibc; elsewhere it is).

    Raises:
        RuntimeError: If the process fails; the message ends in what it wrote.
    """
    code = (
        f"{_RESIDENT}{setup}\nbase = resident()\n{work}\n"
        "cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0\n"
        "sys.stdout.write(f'\\nPEAK {cuda or resident() - base}')"
    )
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **_GIVE_BACK}
    )
    if done.returncode:
        raise RuntimeError(f"The process whose memory is measured failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.rpartition("PEAK ")[2])
