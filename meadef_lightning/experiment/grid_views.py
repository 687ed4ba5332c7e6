"""What a grid's table and figure show: which results, how they are grouped, and over what the intervals are taken.

Results come in three kinds (``of``), each with columns of its own beside the axes: judged models (``suspects``), searches for a watermark
(``detection``) and the points on the paths of removals (``removal``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Of = Literal["suspects", "detection", "removal"]

SUSPECT_COLUMNS = (
    *("cell", "seed", "suspect", "group", "kind", "attack", "labels", "queries", "accuracy", "fidelity"),
    *("wsr", "wsr_low", "wsr_high", "wfpr", "p_value", "verdict", "supported"),
)
DETECTION_COLUMNS = (
    *(
        "cell",
        "seed",
        "detector",
        "target",
        "level",
        "score",
        "threshold",
        "decision",
        "auc",
        "true_rate",
        "false_rate",
        "named_target",
        "key_rank",
    ),
)
REMOVAL_COLUMNS = (
    *("cell", "seed", "removal", "target", "attack", "unit", "points", "chosen", "strength", "accuracy", "wsr", "wfpr"),
)
COLUMNS: dict[Of, tuple[str, ...]] = {
    "suspects": SUSPECT_COLUMNS,
    "detection": DETECTION_COLUMNS,
    "removal": REMOVAL_COLUMNS,
}
RESERVED_COLUMNS = tuple(dict.fromkeys(column for columns in COLUMNS.values() for column in columns))
"""Columns of the results, which no axis may be called after."""

RATES: dict[Of, tuple[str, ...]] = {
    "suspects": ("accuracy", "fidelity", "wsr", "wfpr", "supported"),
    "detection": ("auc", "true_rate", "false_rate", "named_target", "decision"),
    "removal": ("accuracy", "wsr", "wfpr"),
}
"""What can be averaged: rates in [0, 1]. ``supported`` and ``decision`` are shares of verdicts."""

NUMBERS = ("queries", "strength", "accuracy", "fidelity", "wsr", "wfpr", "auc", "true_rate", "false_rate")
"""What can be the x axis of a line."""

_TELLING: dict[Of, tuple[tuple[str, ...], ...]] = {
    "suspects": (("suspect", "group", "kind", "attack"),),
    "detection": (("detector",), ("target",)),
    "removal": (("removal", "attack"), ("target",)),
}
"""Of each tuple a view must name one column: otherwise victims and thieves, or different attacks, would be averaged."""

TITLES = {
    "accuracy": "accuracy",
    "fidelity": "fidelity",
    "wsr": "WSR",
    "wfpr": "WFPR",
    "supported": "verdicts that support the claim",
    "auc": "AUC",
    "true_rate": "found",
    "false_rate": "false alarms",
    "named_target": "named target",
    "decision": "called marked",
    "queries": "distinct queries",
}


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Reads one string, or a list of them; raises ``ValueError`` on anything else."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{name} must be a name or a list of names, not {value!r}.")
    return tuple(items)


@dataclass(frozen=True)
class View:
    """What tables and figures share.

    Args:
        of: Which results.
        where: Values that a column must have, by column; names of axes count as columns, numbers as their text.
        over: Columns that tell repetitions apart: values of one repetition are averaged first, the interval is over repetitions.
    """

    of: Of = "suspects"
    where: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    over: tuple[str, ...] = ()

    @classmethod
    def read(cls, value: Mapping[str, Any], lists: Sequence[str]) -> dict[str, Any]:
        """Reads a view's YAML; ``lists`` are the arguments that are one name or several. Raises ``ValueError``."""
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(value) - known))
        if unknown:
            raise ValueError(f"{cls.kind()} has unknown {unknown}; there are {sorted(known)}.")
        arguments = dict(value)
        if arguments.get("of", "suspects") not in get_args(Of):
            raise ValueError(f"{cls.kind()}: of={arguments['of']!r} must be one of {get_args(Of)}.")
        for name in {*lists, "over"} & set(arguments):
            arguments[name] = strings(f"{cls.kind()}.{name}", arguments[name])
        where = arguments.get("where") or {}
        if not isinstance(where, Mapping):
            raise ValueError(f"{cls.kind()}.where must be a mapping from columns to values, not {where!r}.")
        arguments["where"] = {
            str(column): tuple(map(str, values if isinstance(values, list) else [values]))
            for column, values in where.items()
        }
        return arguments

    @classmethod
    def kind(cls) -> str:
        """``table`` or ``figure``."""
        return cls.__name__.removesuffix("View").lower()

    @property
    def metrics_shown(self) -> tuple[str, ...]:
        """The rates that are averaged."""
        raise NotImplementedError

    @property
    def grouping(self) -> tuple[str, ...]:
        """The columns whose values make groups."""
        raise NotImplementedError

    def check(self, axes: Sequence[str], several: Sequence[str]) -> None:
        """Checks the view against a grid's axes.

        Args:
            axes: All axes.
            several: Those of more than one entry: a view must say what it does with them.

        Raises:
            ValueError: If a column is unknown, a metric is no rate, or a view would average what is not alike.
        """
        kind, columns = self.kind(), (*axes, *COLUMNS[self.of])
        named = (*self.grouping, *self.where, *self.over)
        unknown = sorted(set(named) - set(columns))
        if unknown:
            raise ValueError(f"{kind} names {unknown}, which is neither an axis nor a column of {self.of}: {columns}.")
        bad = [metric for metric in self.metrics_shown if metric not in RATES[self.of]]
        if bad or not self.metrics_shown:
            raise ValueError(f"{kind} shows {bad or 'nothing'}; rates of {self.of} are {RATES[self.of]}.")
        open_axes = [axis for axis in several if axis not in named]
        if open_axes:
            raise ValueError(
                f"{kind} does not say what to do with {open_axes}: group by it, choose a value in `where`, or name it in `over` if its "
                "entries are repetitions."
            )
        for telling in _TELLING[self.of]:
            if not set(telling) & set(named):
                raise ValueError(
                    f"{kind} would average different {telling[0]}s; group by one of {telling}, or choose a value in `where`."
                )


@dataclass(frozen=True)
class TableView(View):
    """The table in ``grid.md``.

    Args:
        rows: Columns whose values make the rows.
        columns: Columns whose values make the columns; none for one column a metric.
        metrics: The rates in every cell.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy", "wsr")

    @classmethod
    def of_yaml(cls, value: Mapping[str, Any]) -> TableView:
        """Reads it; raises ``ValueError``."""
        arguments = cls.read(value, ("rows", "columns", "metrics"))
        if not arguments.get("rows"):
            raise ValueError("table needs rows: one axis or column, or a list of them.")
        return cls(**arguments)

    @property
    def metrics_shown(self) -> tuple[str, ...]:
        """The rates in every cell."""
        return self.metrics

    @property
    def grouping(self) -> tuple[str, ...]:
        """Rows and columns."""
        return (*self.rows, *self.columns)


@dataclass(frozen=True)
class FigureView(View):
    """The figure in ``grid.png``: one panel a rate, one colour a series.

    Args:
        x: A number (``queries``, ``strength``, a rate), which gives lines, or an axis or column of names, which gives places.
        y: The rates, one panel each.
        series: Columns whose values make the series.
        points: What makes a point of a line where its numbers differ a little between repetitions; by default equal numbers do.
    """

    x: str = ""
    y: tuple[str, ...] = ("accuracy", "wsr")
    series: tuple[str, ...] = ()
    points: tuple[str, ...] = ()

    @classmethod
    def of_yaml(cls, value: Mapping[str, Any]) -> FigureView:
        """Reads it; raises ``ValueError``."""
        arguments = cls.read(value, ("y", "series", "points"))
        if not isinstance(arguments.get("x"), str) or not arguments["x"]:
            raise ValueError("figure needs x: the name of a number, an axis or a column.")
        return cls(**arguments)

    @property
    def numeric(self) -> bool:
        """Whether x is a number."""
        return self.x in NUMBERS

    @property
    def metrics_shown(self) -> tuple[str, ...]:
        """The rates, one panel each."""
        return self.y

    @property
    def grouping(self) -> tuple[str, ...]:
        """What makes a point: series and x, or what stands for x."""
        return (*self.series, *(self.points or (self.x,)))
