"""What the cells of a grid found, joined: CSV files with the axes as columns, one table, one figure with intervals."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meadef_lightning.experiment import figure_style
from meadef_lightning.experiment.aggregate import Estimate
from meadef_lightning.experiment.artifacts import csv_text, make_directory, write_text_atomic
from meadef_lightning.experiment.grid import Cell, Grid
from meadef_lightning.experiment.grid_views import COLUMNS, TITLES, FigureView, Of, TableView, View
from meadef_lightning.experiment.render import NOT_ASKED
from meadef_lightning.experiment.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
"""One line of results: the axes' entries and the columns of its kind."""

_SEED = re.compile(r"/seed-\d+$")
_NUMBERED = re.compile(r"-\d+$")
_COLOURS = (
    figure_style.BLUE,
    figure_style.VERMILION,
    figure_style.GREEN,
    figure_style.ORANGE,
    figure_style.PURPLE,
    figure_style.GREY,
)
_MARKERS = "osD^vP"


def records_of(cell: Cell, report: Report) -> dict[Of, list[Record]]:
    """The results of one cell.

    Args:
        cell: The cell.
        report: What it found.

    Returns:
        Records by kind. ``seed`` is empty where a search has joined several; ``group`` is the suspect's name without a number at its
        end, which joins several independent models, and one theft's budgets.
    """
    alone = report.seeds[0] if len(report.seeds) == 1 else None
    base = {"cell": cell.name, **cell.labels}
    suspects, removal = [], []
    for row in report.suspects:
        values = dataclasses.asdict(row)
        low, high = values.pop("wsr_ci")
        told = {
            "seed": alone if row.seed is None else row.seed,
            "suspect": row.base_name,
            "group": _NUMBERED.sub("", row.base_name),
            "wsr_low": low,
            "wsr_high": high,
            "supported": float(row.verdict == "supported"),
        }
        suspects.append({**base, **values, **told})
    for path in report.removal:
        name = _SEED.sub("", path.name)
        seed = int(path.name.rpartition("-")[2]) if name != path.name else alone
        common = {
            **base,
            "seed": seed,
            "removal": name.removeprefix(f"{path.target}."),
            **{field: getattr(path, field) for field in ("target", "attack", "unit", "points", "chosen")},
        }
        removal += [{**common, **dataclasses.asdict(point)} for point in path.curve]
    detection = [
        {**base, "seed": alone, **dataclasses.asdict(row), "detector": row.attack, "decision": float(row.decision)}
        for row in report.detection
    ]
    return {"suspects": suspects, "detection": detection, "removal": removal}


def to_csv(records: Sequence[Record], axes: Sequence[str], of: Of) -> str:
    """Records as CSV, axes first; rates are fractions."""
    columns = ["cell", *axes, *(name for name in COLUMNS[of] if name not in ("cell", "supported"))]
    return csv_text(columns, records)


@dataclass(frozen=True)
class Group:
    """Records that a view takes for repetitions of the same.

    Args:
        key: The values of the view's grouping columns.
        records: The records, at least one.
    """

    key: tuple[str, ...]
    records: tuple[Record, ...]

    def estimate(self, metric: str, over: Sequence[str]) -> Estimate | None:
        """Mean over repetitions with its 95 % t-interval; ``None`` where no record has the metric.

        Values of one repetition (equal in the columns of ``over``) are averaged first: three models of one seed are not three seeds.
        """
        units: dict[tuple[Any, ...], list[float]] = {}
        for record in self.records:
            if record[metric] is not None:
                units.setdefault(tuple(record[name] for name in over), []).append(float(record[metric]))
        means = [math.fsum(values) / len(values) for values in units.values()]
        return Estimate.of(means) if means else None

    def mean(self, number: str) -> float:
        """Plain mean of a number."""
        return math.fsum(float(record[number]) for record in self.records) / len(self.records)

    def repetitions(self, over: Sequence[str]) -> int:
        """How many repetitions there are."""
        return len({tuple(record[name] for name in over) for record in self.records})


def groups_of(view: View, records: Sequence[Record]) -> list[Group]:
    """Selects by ``where`` and groups by the view's columns, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if all(str(record[column]) in values for column, values in view.where.items()):
            groups.setdefault(tuple(str(record[column]) for column in view.grouping), []).append(record)
    return [Group(key, tuple(members)) for key, members in groups.items()]


def to_markdown(view: TableView, records: Sequence[Record]) -> str:
    """Draws a table of means with 95 % t-intervals, in percent.

    Args:
        view: What to show.
        records: Results of the kind that it shows.

    Returns:
        A Markdown table and a line that says what the intervals are over; empty if there is nothing to show.
    """
    groups = groups_of(view, records)
    if not groups:
        return ""
    cut = len(view.rows)
    rows = list(dict.fromkeys(group.key[:cut] for group in groups))
    columns = list(dict.fromkeys(group.key[cut:] for group in groups))
    found = {group.key: group for group in groups}
    heads = [" ".join([*column, TITLES[metric]]) for column in columns for metric in view.metrics]
    lines = [[*view.rows, *heads], ["---"] * cut + ["---:"] * len(heads)]
    for row in rows:
        line = list(row)
        for column in columns:
            group = found.get((*row, *column))
            for metric in view.metrics:
                estimate = None if group is None else group.estimate(metric, view.over)
                line.append(NOT_ASKED if estimate is None else str(estimate))
        lines.append(line)
    counts = sorted({group.repetitions(view.over) for group in groups})
    shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = f"mean ± 95 % t-interval over n = {shown} ({', '.join(view.over)})" if counts[-1] > 1 else "single values"
    table = "\n".join("| " + " | ".join(part.replace("|", "\\|") for part in line) + " |" for line in lines)
    return f"{table}\n\nRates in percent, {spread}.\n"


@figure_style.house_style()
def grid_figure(view: FigureView, records: Sequence[Record], title: str = "") -> Figure:
    """Draws means with 95 % t-intervals: lines over a number, or points at named places.

    Args:
        view: What to show.
        records: Results of the kind that it shows.
        title: Above the figure.

    Returns:
        The figure: one panel a rate, with a shared axis.

    Raises:
        ValueError: If there is nothing to draw.
    """
    groups = groups_of(view, records)
    if not groups:
        raise ValueError("None of the results that are done is what the figure shows.")
    cut = len(view.series)
    series: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        series.setdefault(group.key[:cut], []).append(group)
    places = list(dict.fromkeys(group.key[cut:] for group in groups))
    figure = figure_style.new_figure(3.5 * len(view.y) + 0.4, 3.4)
    panels: Sequence[Axes] = figure.subplots(1, len(view.y), sharex=True, sharey=True, squeeze=False)[0]
    for i, (name, members) in enumerate(series.items()):
        shift = 0.6 * ((i + 0.5) / len(series) - 0.5)
        for panel, metric in zip(panels, view.y, strict=True):
            drawn = []
            for group in members:
                estimate = group.estimate(metric, view.over)
                x = group.mean(view.x) if view.numeric else places.index(group.key[cut:]) + shift
                if estimate is not None:
                    drawn.append((x, estimate))
            if not drawn:
                continue
            drawn.sort(key=lambda point: point[0])
            x_values, estimates = zip(*drawn, strict=True)
            mean = [100 * estimate.mean for estimate in estimates]
            # an interval that leaves [0, 1] says no more than one that ends there
            half = [100 * (estimate.half_width or 0) for estimate in estimates]
            low = [min(width, value) for width, value in zip(half, mean, strict=True)]
            high = [min(width, 100 - value) for width, value in zip(half, mean, strict=True)]
            panel.errorbar(
                x_values, mean, yerr=[low, high], color=_COLOURS[i % len(_COLOURS)],
                marker=_MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)], markersize=5, capsize=2,
                linestyle="-" if view.numeric else "", label=", ".join(name),
            )  # fmt: skip
    for panel, metric in zip(panels, view.y, strict=True):
        panel.set(ylim=(-2, 102), title=TITLES[metric], xlabel=TITLES.get(view.x, view.x))
        panel.yaxis.grid(visible=True)
        if not view.numeric:
            panel.set_xticks(range(len(places)), labels=[", ".join(place) for place in places])
            panel.set_xlim(-0.5, len(places) - 0.5)
            if max(len(", ".join(place)) for place in places) * len(places) > 30:
                panel.tick_params(axis="x", rotation=30)
        elif view.x == "queries":
            panel.set_xscale("log")
        elif view.x != "strength":
            panel.set_xlim(-0.02, 1.02)
    panels[0].set_ylabel("per cent")
    figure.suptitle(title, fontsize=10, fontweight="bold")
    if cut:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def merge(grid: Grid, reports: Sequence[tuple[Cell, Report]], output: Path) -> list[Path]:
    """Writes ``grid.csv`` (and ``grid-detection.csv``, ``grid-removal.csv``), ``grid.md`` and ``grid.png`` of the cells that are done.

    Args:
        grid: The grid.
        reports: The finished cells with their reports.
        output: Where to.

    Returns:
        The files written; those of an earlier merge that have nothing to show any more are removed.
    """
    found: dict[Of, list[Record]] = {"suspects": [], "detection": [], "removal": []}
    for cell, report in reports:
        for of, records in records_of(cell, report).items():
            found[of] += records
    make_directory(output)
    written = []
    for of, records in found.items():
        file = output / ("grid.csv" if of == "suspects" else f"grid-{of}.csv")
        if records or of == "suspects":
            written.append(write_text_atomic(file, to_csv(records, list(grid.axes), of)))
        else:
            file.unlink(missing_ok=True)
    table = to_markdown(grid.table, found[grid.table.of]) if grid.table else ""
    total = len(grid.cells())
    state = f"All {total} cells are done." if len(reports) == total else f"{len(reports)} of {total} cells are done."
    written.append(write_text_atomic(output / "grid.md", f"# {grid.name}\n\n{table}{state}\n"))
    picture = output / "grid.png"
    if grid.figure and groups_of(grid.figure, found[grid.figure.of]):
        written.append(figure_style.save(grid_figure(grid.figure, found[grid.figure.of], grid.name), picture))
    else:
        picture.unlink(missing_ok=True)
    return written
