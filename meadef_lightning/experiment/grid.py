"""Grids: the product of several axes (victims, thefts, keys, seeds), every cell of which is one experiment of its own.

A grid is a YAML file::

    grid: digits/keys                      # name; results go to runs/digits/keys
    experiment: [supervised.yaml]          # files as `meadef run` takes them: beside this file, or of those that ship with the package
    overrides: {verification: {samples: 200}}                # for every cell
    axes:
      key:
        - {name: k1, overrides: {watermark: {key: {public_secret: k1}}}}
        - {name: k2, overrides: {watermark: {key: {public_secret: k2}}}}
      seed_of_run:                         # an entry may have files besides, or instead
        - {name: 0, overrides: {seeds: [0]}}
        - {name: 1, overrides: {seeds: [1]}}
    exclude: [{key: k2, seed_of_run: [1]}]
    table: {rows: key, columns: suspect, metrics: [accuracy, wsr], over: seed_of_run}
    figure: {x: key, y: [wsr], series: suspect, over: seed_of_run}

Later files and overrides override earlier ones by the very rules of ``meadef run A.yaml B.yaml``, because its parser does it: the grid's
``overrides`` come after its files, then the axes in their order. Mappings merge, and lists replace lists, but mind: where both have the
same length, an entry keeps what the entry in its place leaves out. This file only expands; it knows nothing of running, costs or results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.experiment.grid_views import RESERVED_COLUMNS, FigureView, TableView, strings
from meadef_lightning.experiment.load import Experiment, load_experiment

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*(-[A-Za-z0-9_.+]+)*")
_MEMBERS = {"grid", "experiment", "overrides", "axes", "exclude", "table", "figure"}


@dataclass(frozen=True)
class Choice:
    """One entry of an axis.

    Args:
        name: Its name; letters, digits, ``-``, ``_``, ``.`` and ``+``.
        files: Experiment files that it adds.
        overrides: What it changes after them, in the form of an experiment file.
    """

    name: str
    files: tuple[Path, ...]
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid.

    Args:
        number: Its number, from 1, in the order of the product.
        choices: Its entry on every axis, by axis.
    """

    number: int
    choices: Mapping[str, Choice]

    @property
    def name(self) -> str:
        """The names of its entries, joined by ``-``; the name of its directory."""
        return "-".join(choice.name for choice in self.choices.values())

    @property
    def labels(self) -> dict[str, str]:
        """The name of its entry on every axis."""
        return {axis: choice.name for axis, choice in self.choices.items()}


@dataclass(frozen=True)
class Grid:
    """A grid, checked.

    Args:
        name: Its name.
        files: The experiment files of every cell.
        overrides: What every cell changes after them.
        axes: Entries by axis.
        exclude: Combinations that are left out: names of entries by axis.
        table: What ``grid.md`` shows; ``None`` for no table.
        figure: What ``grid.png`` shows; ``None`` for no figure.

    Raises:
        ValueError: If nothing is left, names of cells repeat, or a view does not fit the axes.
    """

    name: str
    files: tuple[Path, ...]
    overrides: Mapping[str, Any]
    axes: Mapping[str, tuple[Choice, ...]]
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    table: TableView | None = None
    figure: FigureView | None = None

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise ValueError(
                f"several cells are named {twice}; rename entries." if twice else "exclude leaves no cell of the grid."
            )
        several = [axis for axis, choices in self.axes.items() if len(choices) > 1]
        for view in (self.table, self.figure):
            if view is not None:
                view.check(list(self.axes), several)

    def cells(self) -> list[Cell]:
        """The cells in the order of the product, the last axis running fastest, numbered without the excluded ones."""
        kept = []
        for choices in product(*self.axes.values()):
            chosen = dict(zip(self.axes, choices, strict=True))
            if not any(all(chosen[axis].name in names for axis, names in rule.items()) for rule in self.exclude):
                kept.append(chosen)
        return [Cell(number, chosen) for number, chosen in enumerate(kept, 1)]

    def select(self, wanted: Sequence[str]) -> list[Cell]:
        """Finds cells.

        Args:
            wanted: Names of cells, patterns like ``cifar10-*``, or numbers; none for all.

        Returns:
            The cells that at least one of them means, in the grid's order.

        Raises:
            MisconfigurationException: If one means no cell.
        """
        cells = self.cells()
        if not wanted:
            return cells
        found = set()
        for what in wanted:
            numbers = {cell.number for cell in cells if fnmatchcase(cell.name, what)}
            numbers = numbers or {cell.number for cell in cells if str(cell.number) == what}
            if not numbers:
                raise MisconfigurationException(
                    f"The grid {self.name!r} has no cell {what!r}. Its {len(cells)} cells are {', '.join(c.name for c in cells[:20])}"
                    + (" and so on." if len(cells) > 20 else ".")
                )
            found |= numbers
        return [cell for cell in cells if cell.number in found]

    def experiment(self, cell: Cell, options: Sequence[str] = ()) -> Experiment:
        """Makes a cell's experiment, named ``GRID/CELL``.

        Args:
            cell: The cell.
            options: Options of `meadef run`, which override what the cell says.

        Raises:
            MisconfigurationException: If the cell is not a valid experiment; names it.
        """
        arguments = [str(file) for file in self.files] + [_text(self.overrides)]
        for choice in cell.choices.values():
            arguments += [*map(str, choice.files), _text(choice.overrides)]
        # texts as well as files go through --config: what merges is the parser of `meadef run` and nothing else
        parts = [part for argument in arguments if argument for part in ("--config", argument)]
        try:
            return load_experiment([], [*parts, "--experiment", f"{self.name}/{cell.name}", *options])
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise MisconfigurationException(
                f"Cell {cell.name!r} of the grid {self.name!r} is no experiment. {error}"
            ) from error


def _text(overrides: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(overrides), sort_keys=False) if overrides else ""


def read_grid(path: str | Path) -> Grid:
    """Reads a grid file.

    Args:
        path: The YAML file.

    Raises:
        MisconfigurationException: If it is missing, no YAML, or says something that a grid does not have.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MisconfigurationException(f"The grid file {path} cannot be read: {error}") from error
    try:
        return grid_of(content, path.parent)
    except ValueError as error:
        raise MisconfigurationException(f"The grid file {path} is not valid: {error}") from error


def grid_of(content: Any, folder: Path) -> Grid:
    """Makes a grid of what a YAML file holds; see the module's description.

    Args:
        content: The file's content.
        folder: What its files are relative to.

    Raises:
        ValueError: If something is missing, unknown or of the wrong type.
    """
    _check("it", content, _MEMBERS, {"grid", "axes"})
    if not isinstance(content["grid"], str) or not all(map(_NAME.fullmatch, content["grid"].split("/"))):
        raise ValueError(
            f"grid={content['grid']!r} must be a name of letters, digits, '-', '_' and '.', with '/' in between."
        )
    _check("axes", content["axes"])
    if not content["axes"]:
        raise ValueError("axes is empty; give one, with one entry at least. A single experiment needs no grid.")
    axes = {}
    for axis, entries in content["axes"].items():
        if not isinstance(axis, str) or not axis.isidentifier() or axis in RESERVED_COLUMNS:
            raise ValueError(
                f"the axis {axis!r} needs a name of letters, digits and '_' that is no column of the results ({', '.join(RESERVED_COLUMNS)})."
            )
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"the axis {axis!r} must be a list of entries, at least one.")
        axes[axis] = tuple(_choice(axis, entry, folder) for entry in entries)
        names = [choice.name for choice in axes[axis]]
        if len(set(names)) < len(names):
            raise ValueError(f"the axis {axis!r} has entries of the same name: {names}.")
    rules = content.get("exclude") or []
    if not isinstance(rules, list):
        raise ValueError("exclude must be a list of combinations, each a mapping from axes to names.")
    views = {name: content.get(name) for name in ("table", "figure")}
    for name, view in views.items():
        if view is not None:
            _check(name, view)
    overrides = content.get("overrides") or {}
    _check("overrides", overrides)
    return Grid(
        name=content["grid"],
        files=_files("experiment", content.get("experiment") or [], folder),
        overrides=overrides,
        axes=axes,
        exclude=tuple(_rule(rule, axes) for rule in rules),
        table=None if views["table"] is None else TableView.of_yaml(views["table"]),
        figure=None if views["figure"] is None else FigureView.of_yaml(views["figure"]),
    )


def _check(where: str, value: Any, allowed: Iterable[str] | None = None, needed: Iterable[str] = ()) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, not {value!r}.")
    missing = sorted(set(needed) - set(value))
    unknown = sorted(map(str, set(value) - set(allowed))) if allowed is not None else []
    if missing or unknown:
        raise ValueError(
            f"{where} "
            + " and ".join(
                part for part in (f"lacks {missing}" * bool(missing), f"has unknown {unknown}" * bool(unknown)) if part
            )
            + (f"; there are {sorted(allowed)}." if allowed is not None else ".")
        )


def _choice(axis: str, entry: Any, folder: Path) -> Choice:
    _check(f"an entry of {axis!r}", entry, {"name", "overrides", "files"}, {"name"})
    # numbers are natural names of seeds and budgets; a bool is what YAML makes of an unquoted `no`
    name = entry["name"] if isinstance(entry["name"], bool) else str(entry["name"])
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"an entry of {axis!r} is named {entry['name']!r}; names consist of letters, digits, '-', '_', '.' and '+' (quote them)."
        )
    overrides = entry.get("overrides") or {}
    _check(f"overrides of {axis}={name}", overrides)
    return Choice(name, _files(f"files of {axis}={name}", entry.get("files") or [], folder), overrides)


def _files(where: str, names: Any, folder: Path) -> tuple[Path, ...]:
    """Finds experiment files: beside the grid first, then among those that ship with the package."""
    found = []
    for name in strings(where, names):
        shipped = Path(str(resources.files("meadef_lightning.experiments"))) / name
        file = next((file for file in (folder / name, shipped) if file.is_file()), None)
        if file is None:
            raise ValueError(
                f"{where}: there is no file {name} in {folder}, and none of that name in {shipped.parent}."
            )
        found.append(file)
    return tuple(found)


def _rule(rule: Any, axes: Mapping[str, tuple[Choice, ...]]) -> dict[str, tuple[str, ...]]:
    _check("exclude", rule, axes)
    result = {}
    for axis, value in rule.items():
        names = tuple(map(str, value)) if isinstance(value, list) else (str(value),)
        known = [choice.name for choice in axes[axis]]
        if not names or set(names) - set(known):
            raise ValueError(f"exclude: {axis}={value!r} is not among {known}.")
        result[axis] = names
    if not result:
        raise ValueError("exclude has an empty combination, which would exclude everything.")
    return result
