"""Budget curves: what a theft gains, and what it carries along, over the number of queries."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from meadef_lightning.experiment.aggregate import AggregateRow, aggregate
from meadef_lightning.experiment.figure_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    house_style,
    new_figure,
)
from meadef_lightning.experiment.rows import SuspectRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZED = re.compile(r"(?P<attack>.+)-(?P<budget>\d+)")
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, GREY)
_MARKERS = "osD^vP"


def budget_series(rows: Sequence[SuspectRow]) -> dict[str, list[AggregateRow]]:
    """Finds the thefts that were run at several budgets.

    Args:
        rows: Suspects of one report; those of ``budgets: [...]`` are named ``ATTACK-BUDGET``.

    Returns:
        For each attack of at least two budgets its rows, seeds joined, by rising number of queries.
    """
    found: dict[str, list[AggregateRow]] = defaultdict(list)
    for row in aggregate([row for row in rows if row.kind == "extracted" and _SIZED.fullmatch(row.base_name)]):
        match = _SIZED.fullmatch(row.first.base_name)
        found[match["attack"] if match else row.name].append(row)
    return {name: sorted(series, key=lambda row: row.queries) for name, series in found.items() if len(series) > 1}


@house_style()
def budget_curves(series: dict[str, list[AggregateRow]]) -> Figure:
    """Draws accuracy and watermark success rate over the number of queries.

    Args:
        series: What :func:`budget_series` returned; not empty.

    Returns:
        Two panels with a shared logarithmic axis; bars are 95 % intervals over seeds, where there are several.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not series:
        raise ValueError("No attack was run at several budgets; give one `budgets: [...]`.")
    figure = new_figure(7.0, 3.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    metrics: tuple[Literal["accuracy", "wsr"], ...] = ("accuracy", "wsr")
    for i, (name, cells) in enumerate(series.items()):
        queries = [cell.queries for cell in cells]
        for panel, metric in zip(panels, metrics, strict=True):
            estimates = [cell.estimate(metric) for cell in cells]
            panel.errorbar(
                queries,
                [100 * estimate.mean for estimate in estimates],
                yerr=[100 * (estimate.half_width or 0) for estimate in estimates],
                color=_COLOURS[i % len(_COLOURS)],
                marker=_MARKERS[i % len(_MARKERS)],
                capsize=2,
                label=name,
            )
    for panel, title in zip(panels, ("accuracy", "watermark success rate"), strict=True):
        panel.set(xscale="log", xlabel="distinct queries", title=title, ylim=(0, 102))
        panel.grid(True)
    panels[0].set_ylabel("per cent")
    panels[1].legend()
    return figure
