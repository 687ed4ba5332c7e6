"""Figures of verdicts: the suspects' watermark success side by side, and the true key among its decoys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meadef_lightning.experiment.aggregate import aggregate
from meadef_lightning.experiment.figure_style import (
    BLUE,
    DASHED,
    GREY,
    INK,
    ORANGE,
    SKY,
    VERMILION,
    finite,
    house_style,
    new_figure,
)
from meadef_lightning.experiment.render import format_p
from meadef_lightning.experiment.rows import PAPER_THRESHOLD, SuspectRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

KIND_COLOURS = {"extracted": BLUE, "removed": SKY, "victim": GREY, "independent": ORANGE}
KIND_LABELS = {
    "extracted": "extracted",
    "removed": "extracted, then scrubbed",
    "victim": "victim itself",
    "independent": "independent (negative control)",
}


@house_style()
def wsr_bars(
    rows: Sequence[SuspectRow], title: str = "Watermark success by suspect", threshold: float = PAPER_THRESHOLD
) -> Figure:
    """Draws the WSR of every suspect with its 95 % interval, its WFPR, p-value and verdict.

    Args:
        rows: the suspects of a report; rows of one suspect over seeds become one bar (mean, t-interval, one dot a seed).
        title: above the figure.
        threshold: where the dashed line of the paper's fixed criterion stands.

    Returns:
        The figure; the first suspect stands on top.

    Raises:
        ValueError: if there are no rows.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not rows:
        raise ValueError("there is no suspect to draw")
    bars = aggregate(rows)
    wsr = np.array([bar.estimate("wsr").mean for bar in bars])
    low, high = np.array([bar.wsr_interval for bar in bars]).T
    places = np.arange(len(bars))
    seeds = any(len(bar.members) > 1 for bar in bars)

    figure = new_figure(7.2, 1.5 + 0.34 * len(bars))
    ax = figure.subplots()
    ax.barh(places, 100 * wsr, height=0.64, color=[KIND_COLOURS[bar.first.kind] for bar in bars])
    whiskers = 100 * np.stack([np.maximum(wsr - low, 0), np.maximum(high - wsr, 0)])
    ax.errorbar(100 * wsr, places, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    wfpr = [100 * bar.estimate("wfpr").mean for bar in bars]
    ax.scatter(wfpr, places, s=26, marker="D", facecolor="white", edgecolor=VERMILION, linewidth=1.2, zorder=4)
    for place, bar in enumerate(bars):
        if len(bar.members) > 1:
            dots, heights = [100 * row.wsr for row in bar.members], [place + 0.2] * len(bar.members)
            ax.scatter(dots, heights, s=10, color=INK, edgecolor="white", linewidth=0.5, zorder=3, clip_on=False)
        note = f"{bar.verdict_text}, p {'≤' if len(bar.members) > 1 else '='} {format_p(bar.p_value)}"
        ax.text(1.02, place, note, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.axvline(100 * threshold, **DASHED)
    ax.set_yticks(places, labels=[bar.name for bar in bars])
    ax.set(xlim=(0, 100), ylim=(len(bars) - 0.4, -0.6), xlabel="answers in the target class (% of samples)")
    ax.tick_params(axis="y", length=0)
    ax.xaxis.grid(visible=True)
    figure.suptitle(title, fontsize=10, fontweight="bold")

    kinds = [kind for kind in KIND_COLOURS if any(bar.first.kind == kind for bar in bars)]
    handles: list[Any] = [Patch(color=KIND_COLOURS[kind], label=f"WSR, {KIND_LABELS[kind]}") for kind in kinds]
    handles += [
        Line2D([], [], color=INK, marker="|", label="95 % interval" + (" (dots: seeds)" if seeds else " (Wilson)")),
        Line2D([], [], color=VERMILION, marker="D", mfc="white", linestyle="", label="WFPR (other composites)"),
        Line2D([], [], **DASHED, label=f"{100 * threshold:.0f} % criterion of the paper"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def critical_statistic(statistics: NDArray[np.float64], alpha: float) -> float | None:
    """The value that a true key's statistic must exceed for ``p = (1 + #{T_b ≥ T}) / (B + 1) ≤ alpha``.

    Args:
        statistics: the B decoys' statistics.
        alpha: significance level in (0, 1).

    Returns:
        The value; None where even the best statistic gives p > alpha, because B + 1 < 1 / alpha.
    """
    # tolerance: 0.05 * 20 is to count as 1, whatever its last bit
    above = int(np.floor(alpha * (len(statistics) + 1) + 1e-9)) - 1
    return None if above < 0 else float(np.sort(statistics)[::-1][min(above, len(statistics) - 1)])


@house_style()
def decoy_distribution(
    statistics: ArrayLike,
    true_statistic: float,
    p_value: float,
    alpha: float,
    title: str = "The true key among decoy keys",
    xlabel: str = "test statistic (how far composites lean to the target)",
) -> Figure:
    """Draws the decoy keys' statistics as a histogram with the true key marked.

    Args:
        statistics: of the B decoy keys, ``(B,)``.
        true_statistic: of the true key.
        p_value: the decoy-key p-value, in [0, 1].
        alpha: the significance level that was fixed before the test, in (0, 1).
        title: above the figure.
        xlabel: what the statistic is.

    Returns:
        The figure; its count axis is logarithmic where one bin would hide the others.

    Raises:
        ValueError: if a value is missing, not finite or out of range.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    decoys = finite("statistics", statistics, 1)
    if not np.isfinite(true_statistic) or not 0 <= p_value <= 1 or not 0 < alpha < 1:
        raise ValueError(
            "true_statistic must be finite, p_value in [0, 1] and alpha in (0, 1), "
            f"not {true_statistic!r}, {p_value!r}, {alpha!r}"
        )
    figure = new_figure(6.4, 3.4)
    ax = figure.subplots()
    edges = np.histogram_bin_edges(np.append(decoys, true_statistic), bins=40)
    ax.hist(decoys, list(edges), color=SKY, edgecolor="white", linewidth=0.4, label=f"{len(decoys):,} decoy keys")
    counts = np.histogram(decoys, edges)[0]
    if counts.max() > 20 * counts[counts > 0].min():
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.7)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    label = f"true key: {true_statistic:.3f}, p = {format_p(p_value)}"
    ax.axvline(true_statistic, color=VERMILION, linewidth=2, label=label)
    critical = critical_statistic(decoys, alpha)
    if critical is None:
        ax.plot([], [], " ", label=f"p ≤ {alpha:g} is out of reach of {len(decoys):,} decoys")
    else:
        ax.axvline(critical, **DASHED, label=f"p ≤ {alpha:g} to the right")
    ax.set(xlabel=xlabel, ylabel="decoy keys")
    ax.yaxis.grid(visible=True)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
