"""``meadef grid``: lists a grid's cells with their commands and costs, runs what is left of it, merges what is done.

Every cell is one ``meadef run`` on a file of its own, ``OUTPUT/CELL/cell.yaml``, in a process of its own: a crash, or a cell that fills
the memory, takes nothing else down, and any scheduler can run the same commands (``OUTPUT/commands.txt``) in any order and place.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console
from rich.progress import track
from rich.text import Text

from meadef_lightning.experiment.artifacts import make_directory, write_text_atomic
from meadef_lightning.experiment.grid import Cell, Grid, read_grid
from meadef_lightning.experiment.grid_cost import duration, seconds_per_operation, work_of
from meadef_lightning.experiment.grid_results import merge
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.stage_directory import INTERRUPTED, STAGE_FILE, StageRecord

if TYPE_CHECKING:
    from rich.table import Table

CELL_FILE = "cell.yaml"
LOG_FILE = "run.log"
COMMANDS_FILE = "commands.txt"
_PATIENCE = 30.0
"""Seconds that an interrupted cell gets to put its stage in order."""


@dataclass
class Plan:
    """A grid with the place of its results.

    Args:
        grid: The grid.
        output: Directory of the results.
        options: Options for every ``meadef run``.
        work: Operations of a cell's stages by the cell's number, as far as they were estimated.
    """

    grid: Grid
    output: Path
    options: Sequence[str] = ()
    work: dict[int, Mapping[str, float | None]] = field(default_factory=dict)
    seeds: dict[int, int] = field(default_factory=dict)

    def directory(self, cell: Cell) -> Path:
        """Where a cell's files are."""
        return self.output / cell.name

    def command(self, cell: Cell) -> list[str]:
        """The command that runs a cell."""
        directory = self.directory(cell)
        return ["meadef", "run", str(directory / CELL_FILE), "--output", str(directory), *self.options]

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Checks cells with the options, writes their ``cell.yaml``, and all commands; counts the operations of their trainings.

        Raises:
            MisconfigurationException: If one is no valid experiment; before anything is trained.
            OutputError: If a file cannot be written.
        """
        for cell in track(cells, "Reading cells", console=Console(stderr=True), transient=True):
            experiment = self.grid.experiment(cell, of_experiment(self.options))
            write_text_atomic(make_directory(self.directory(cell)) / CELL_FILE, experiment.yaml())
            self.work[cell.number] = work_of(experiment)
            self.seeds[cell.number] = len(experiment.seeds)
        commands = [shlex.join(self.command(cell)) for cell in self.grid.cells()]
        write_text_atomic(self.output / COMMANDS_FILE, "\n".join(commands) + "\n")

    def done(self, cell: Cell) -> bool:
        """Whether a cell's report is there, and of the configuration in its ``cell.yaml``."""
        directory = self.directory(cell)
        if not (directory / "report.json").is_file():
            return False
        try:
            return (directory / CELL_FILE).read_bytes() == (directory / "config.yaml").read_bytes()
        except OSError:
            return False

    def stages(self, cell: Cell) -> Iterator[StageRecord]:
        """Yields the records of a cell's stages, of all seeds."""
        for path in sorted(self.directory(cell).rglob(STAGE_FILE)):
            record = StageRecord.load(path.parent)
            if record is not None:
                yield record

    def state(self, cell: Cell) -> str:
        """``done``, ``failed: CAUSE``, how many stages are done, or ``open``."""
        if self.done(cell):
            return "done"
        records = list(self.stages(cell))
        failed = [record for record in records if record.status == "failed" and record.error != INTERRUPTED]
        if failed:
            return f"failed in {failed[0].name}: {failed[0].error}"
        finished = sum(record.status == "done" for record in records)
        return f"{finished} stages done" if records else "open"

    def operations(self, cell: Cell) -> float | None:
        """Operations of all trainings of a cell; ``None`` if one of them could not be estimated."""
        work = [value for value in self.work[cell.number].values() if value is not None]
        return _total(work) * self.seeds[cell.number] if len(work) == len(self.work[cell.number]) else None

    def rate(self) -> float | None:
        """Seconds an operation, from the stages that are done; ``None`` before the first."""
        return seconds_per_operation(
            (record.seconds, self.work[cell.number].get(record.name))
            for cell in self.grid.cells()
            if cell.number in self.work
            for record in self.stages(cell)
            if record.status == "done"
        )

    def table(self, cells: Sequence[Cell]) -> Table:
        """The cells with state, estimated cost and command, for a terminal."""
        from rich import box
        from rich.table import Table

        rate = self.rate()
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title_justify="left")
        table.title = Text(f"{self.grid.name}: {len(cells)} of {len(self.grid.cells())} cells", style="bold")
        table.add_column("#", justify="right")
        table.add_column("cell", overflow="fold")
        table.add_column("state", overflow="fold", max_width=30)
        table.add_column("PFLOP", justify="right", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("command", overflow="fold")
        total_work, total_time = 0.0, 0.0
        for cell in cells:
            operations, done = self.operations(cell), self.done(cell)
            spent = _total(record.seconds for record in self.stages(cell))
            estimate = None if rate is None or operations is None else rate * operations
            total_work += operations or 0.0
            total_time += spent if done else max(estimate or 0.0, spent)
            table.add_row(
                str(cell.number),
                Text(cell.name),
                Text(self.state(cell)),
                "?" if operations is None else f"{operations / 1e15:.3g}",
                duration(spent) if done else "?" if estimate is None else f"~{duration(estimate)}",
                Text(shlex.join(self.command(cell))),
            )
        known = all(self.operations(cell) is not None for cell in cells)
        caption = f"In all {'' if known else 'more than '}{total_work / 1e15:.3g} PFLOP of training"
        caption += "" if rate is None else f", {'' if known else 'more than '}~{duration(total_time)} on this machine"
        caption += ". This is an estimate from epochs, images and networks; "
        caption += "times follow the stages that are done." if rate else "times appear once a first stage is done."
        table.caption, table.caption_justify = Text(caption), "left"
        return table

    def reports(self) -> list[tuple[Cell, Report]]:
        """The finished cells with their reports."""
        return [
            (cell, Report.load(self.directory(cell) / "report.json")) for cell in self.grid.cells() if self.done(cell)
        ]

    def run(self, cell: Cell) -> str | None:
        """Runs a cell in a process of its own, whose output goes to ``run.log``.

        Returns:
            ``None``, or the cause of its failure.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the cell has stopped.
            SIGTERMException: After SIGTERM, which the cell is told, too.
        """
        log = self.directory(cell) / LOG_FILE
        with log.open("ab") as file, _sigterm_raises() as begin_to_raise:
            begin = file.tell()
            # the interpreter that runs the grid, whatever `meadef` is on the PATH
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "meadef_lightning", *self.command(cell)[1:]],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                begin_to_raise()
                code = process.wait()
            except (KeyboardInterrupt, SIGTERMException) as stop:
                # a terminal tells the cell of Ctrl-C itself; either way it needs a moment to mark its stage as interrupted
                if isinstance(stop, SIGTERMException):
                    process.terminate()
                try:
                    process.wait(_PATIENCE)
                except (KeyboardInterrupt, SIGTERMException, subprocess.TimeoutExpired):
                    process.kill()
                    process.wait()
                raise
        if code == 130:
            raise KeyboardInterrupt
        if code == 0:
            return None
        with log.open("rb") as file:
            file.seek(begin)
            lines = file.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        if code < 0:
            last = f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        return f"{last.removeprefix('meadef run: ')} (see {log})"


@contextmanager
def _sigterm_raises() -> Iterator[Callable[[], None]]:
    """Within, SIGTERM is an exception, as Ctrl-C is: schedulers send it to the grid alone, and its cell would go on without it.

    Only from the call of what it gives: an exception while the cell is being started would leave it behind unknown.
    """
    came = armed = False

    def stop(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        if armed:
            raise SIGTERMException

    def arm() -> None:
        nonlocal armed
        armed = True
        if came:
            raise SIGTERMException

    if threading.current_thread() is not threading.main_thread():  # where Python lets no handler be set
        yield arm
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield arm
    finally:
        signal.signal(signal.SIGTERM, before)


def of_experiment(options: Sequence[str]) -> list[str]:
    """Returns those options of ``meadef run`` that say what is run, and not whether W&B is told of it."""
    kept: list[str] = []
    told = False
    for word in options:
        if word.startswith("--"):
            told = word.startswith("--wandb")
        if not told:
            kept.append(word)
    return kept


def _total(values: Iterable[float]) -> float:
    """Sum of floats, 0 for none."""
    return float(sum(values, 0.0))


def grid_command(options: argparse.Namespace) -> None:
    """Runs ``meadef grid``.

    Args:
        options: What `grid_options.parse` made of the command line.

    Raises:
        SystemExit: With 1 if a cell failed.
        MisconfigurationException: If the grid or a cell is not valid.
    """
    grid = read_grid(options.grid)
    plan = Plan(grid, options.output or Path("runs") / grid.name, options.run_options)
    cells = grid.select(options.only)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.merge:
        _merge(plan, console)
        return
    plan.prepare(cells)
    if options.dry_run:
        console.print(plan.table(cells))
        again = shlex.join(["meadef", "grid", options.grid, "--merge", "--output", str(plan.output)])
        console.print(
            f"Commands, one a line: {plan.output / COMMANDS_FILE}; when they are done: {again}", soft_wrap=True
        )
        return
    failed = _run_all(plan, cells)
    if not failed or plan.reports():
        _merge(plan, console)
    if failed:
        console.print(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again:", style="red")
        for cell, cause in failed:
            console.print(Text(f"  {cell.name}: {cause}"), soft_wrap=True)
        raise SystemExit(1)


def _run_all(plan: Plan, cells: Sequence[Cell]) -> list[tuple[Cell, str]]:
    console, failed = Console(stderr=True), []
    for position, cell in enumerate(cells, 1):
        where = f"{position}/{len(cells)} {cell.name}"
        if plan.done(cell):
            console.print(Text(f"{where}: done before"))
            continue
        rate, operations = plan.rate(), plan.operations(cell)
        guess = f", about {duration(rate * operations)}" if rate and operations else ""
        console.print(Text(f"{where}: running{guess}; output in {plan.directory(cell) / LOG_FILE}"), soft_wrap=True)
        start = time.perf_counter()
        cause = plan.run(cell)
        spent = duration(time.perf_counter() - start)
        console.print(Text(f"{where}: {'done' if cause is None else f'FAILED, {cause}'} after {spent}"), soft_wrap=True)
        if cause is not None:
            failed.append((cell, cause))
    return failed


def _merge(plan: Plan, console: Console) -> None:
    reports = plan.reports()
    if not reports:
        raise MisconfigurationException(
            f"No cell of {plan.grid.name} in {plan.output} is done, so there is nothing to merge. Run it first, or name its directory "
            "with --output."
        )
    written = merge(plan.grid, reports, plan.output)
    console.print((plan.output / "grid.md").read_text("utf-8"), markup=False, soft_wrap=True)
    console.print(f"Merged: {', '.join(map(str, written))}", soft_wrap=True)
