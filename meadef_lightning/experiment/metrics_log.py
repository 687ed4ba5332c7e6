"""The metrics of a stage that was interrupted: what all attempts at it logged, as one log."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meadef_lightning.experiment.artifacts import csv_text


def row_identity(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """Returns what a row of metrics tells: its step and its columns. An epoch that is repeated after an interruption tells it again."""
    return int(row["step"]), frozenset(row) - {"step"}


def logged_rows(logs: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of metrics that all attempts at a stage logged, in order, empty columns left out."""
    attempts = {int(path.parent.name.partition("_")[2]): path for path in logs.glob("attempt_*/metrics.csv")}
    for number in sorted(attempts):
        with attempts[number].open(newline="") as file:
            for line in csv.DictReader(file):
                row = {name: value for name, value in line.items() if value}
                if "step" in row:
                    yield row


def join_metrics(logs: Path) -> str:
    """Joins the metrics of all attempts at a stage, in order, into one CSV text with all their columns; none is told twice."""
    rows = list({row_identity(row): row for row in logged_rows(logs)}.values())
    columns = sorted({name for row in rows for name in row}, key=lambda name: (name not in ("epoch", "step"), name))
    return csv_text(columns, rows)


def last_metrics(logs: Path) -> dict[str, float]:
    """The last finite value of every metric that all attempts at a stage logged."""
    told = ((k, float(v)) for row in logged_rows(logs) for k, v in row.items() if k not in ("epoch", "step"))
    return {name: value for name, value in told if math.isfinite(value)}
