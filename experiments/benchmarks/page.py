"""All benchmarks of cost from one run, as one markdown page: step ratios, throughput, verification, HTTP, memory, scaling.

    python -m meadef_lightning.experiments.benchmarks.page [--help]

Each section is a benchmark of this folder, run with its defaults or with ``settings``, and carries the command that makes it alone.
The page begins with the machine, and is written anew after each section, so that an interrupted run leaves what it has.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from meadef_lightning.experiments.benchmarks.measuring import Section, machine, spread
from rich.console import Console

from meadef_lightning.experiment.artifacts import make_directory, write_bytes_atomic

_PACKAGE = "meadef_lightning.experiments.benchmarks"
BENCHMARKS = ("step_time", "ssl_step", "throughput", "http_throughput", "memory", "scaling")
"""Modules of this folder, in the order of the page."""


def command(benchmark: str, settings: Mapping[str, Any]) -> str:
    """Returns the command that runs one benchmark alone."""
    options = [
        text
        for name, value in settings.items()
        for text in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    return shlex.join(["python", "-m", f"{_PACKAGE}.{benchmark}", *options])


def _step_time(result: Mapping[str, Mapping[str, float]]) -> Section:
    rows = []
    for name, row in result.items():
        peak = [f"{row['peak_mib']:.0f}", f"{row['memory_ratio']:.2f}"] if "peak_mib" in row else ["-", "-"]
        rows.append([name, f"{row['ms']:.0f}", *spread(row), *peak])
    columns = ("variant", "ms per step", "ratio", "range", "peak MiB", "memory ratio")
    return Section("A step of supervised training", "", columns, rows, "The paper's VGG-like network, batches of 128.")


def _http_throughput(result: Mapping[str, float]) -> Section:
    rows = [
        ["in process", f"{result['in_process']:,.0f}", "1.00", "1.00 to 1.00"],
        ["over HTTP", f"{result['over_http']:,.0f}", *spread(result)],
    ]
    columns = ("oracle", "queries a second", "ratio", "range")
    return Section("Queries over HTTP", "", columns, rows, "DigitsCNN on 1x16x16 through the loopback interface, by the clock.")  # fmt: skip


def sections_of(benchmark: str, result: Any) -> list[Section]:
    """Turns what a benchmark's ``main`` returns into sections.

    Args:
        benchmark: Which one.
        result: Sections, or the mapping of numbers of ``step_time`` or ``http_throughput``.

    Raises:
        TypeError: If it is something else.
    """
    known = {"step_time": _step_time, "http_throughput": _http_throughput}
    if benchmark in known:
        return [known[benchmark](result)]
    found = [result] if isinstance(result, Section) else list(result)
    if not all(isinstance(section, Section) for section in found):
        raise TypeError(
            f"The main of the benchmark {benchmark} returned {type(result).__name__}; it must return sections."
        )
    return found


def main(
    benchmarks: Sequence[str] = BENCHMARKS,
    settings: dict[str, dict[str, Any]] | None = None,
    output: str = "runs/benchmarks",
) -> str:
    """Runs benchmarks one after the other and writes ``page.md``.

    Args:
        benchmarks: Which ones; those that this installation does not have are left out.
        settings: Options of some of them, by name: ``{"ssl_step": {"rounds": 3}}``.
        output: Directory of ``page.md`` and of each benchmark's JSON file.
    """
    options = settings or {}
    if unknown := sorted({*benchmarks, *options} - set(BENCHMARKS)):
        raise ValueError(f"There is no benchmark {', '.join(map(repr, unknown))}; choose from {', '.join(BENCHMARKS)}.")
    directory, console = make_directory(Path(output)), Console()
    parts = [f"Measured on: {machine()}.\n"]
    for benchmark in benchmarks:
        name = f"{_PACKAGE}.{benchmark}"
        if importlib.util.find_spec(name) is None:
            continue
        console.print(f"Running {benchmark} …")
        chosen = options.get(benchmark, {})
        result = importlib.import_module(name).main(**chosen, output=output)
        for section in sections_of(benchmark, result):
            parts.append(replace(section, command=command(benchmark, chosen)).markdown())
        write_bytes_atomic(directory / "page.md", "\n".join(parts).encode())
    console.print(f"The page is {directory / 'page.md'}.")
    return "\n".join(parts)


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
