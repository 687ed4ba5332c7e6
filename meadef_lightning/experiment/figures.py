"""Figures of the report: pure functions from results to matplotlib figures, and one function that saves them.

They use ``matplotlib.figure.Figure`` and no pyplot, so that nothing global is left behind and threads, notebooks and
headless machines all work. A reader's own matplotlibrc changes nothing, and ``$`` in a class name is a dollar sign.
Colours are Okabe and Ito's, which people with any colour vision tell apart; shape or position repeats what they say.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from meadef_lightning.experiment.aggregate import aggregate
from meadef_lightning.experiment.artifacts import write_bytes_atomic
from meadef_lightning.experiment.render import format_p
from meadef_lightning.experiment.rows import PAPER_THRESHOLD, SuspectRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

DPI = 150
BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
INK, GREY = "#222222", "#767676"
KIND_COLOURS = {"extracted": BLUE, "removed": SKY, "victim": GREY, "independent": ORANGE}
KIND_LABELS = {
    "extracted": "extracted",
    "removed": "extracted, then scrubbed",
    "victim": "victim itself",
    "independent": "independent (negative control)",
}
_DASHED: Any = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1}
_STYLE: Any = {
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E3E6EA",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's defaults plus `_STYLE`, whatever the reader's settings, which return afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure of that size in inches; draw on it inside `house_style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finite(name: str, values: ArrayLike, ndim: int) -> NDArray[np.float64]:
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    if array.ndim != ndim or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a non-empty, finite array of {ndim} dimension(s), not of shape {array.shape}")
    return array


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = DPI) -> Path:
    """Writes a figure as PNG, atomically and without a time stamp: the same figure gives the same bytes.

    Args:
        figure: what to write.
        path: the file; its directory must exist; raises `OutputError` where it cannot be written.
        dpi: dots an inch.
    """
    png = io.BytesIO()
    with house_style():
        figure.savefig(png, format="png", dpi=dpi, facecolor="white")
    return write_bytes_atomic(path, png.getvalue())


def pictures(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float64]:
    """Normalised ``(B, C, H, W)`` -> what ``imshow`` takes: ``(B, H, W, C)`` in [0, 1]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (B, 1 or 3, H, W), not {tuple(images.shape)}")
    if len(mean) != images.shape[1] or len(std) != images.shape[1]:
        raise ValueError(f"mean and std must hold {images.shape[1]} value(s), one a channel, not {mean!r} and {std!r}")
    raw = np.moveaxis(_finite("images", images, 4), 1, -1) * np.asarray(std) + np.asarray(mean)
    return np.asarray(np.clip(raw, 0, 1), dtype=np.float64)


@house_style()
def watermark_grid(
    images: Mapping[str, Tensor],
    answers: Mapping[str, Tensor],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    title: str = "What the victim answers",
    max_rows: int = 4,
) -> Figure:
    """Draws sources and the watermark samples made of them, with the victim's answer under each.

    Args:
        images: per column (in order, for example "source A", "source B", "watermark") images ``(B, C, H, W)`` in the
            model's input space, C = 1 or 3; the same row belongs together.
        answers: per column the victim's answers: probabilities ``(B, K)``, or labels ``(B,)`` (int64).
        class_names: K names.
        mean: per channel, what normalisation subtracted.
        std: per channel, what normalisation divided by.
        title: above the figure.
        max_rows: rows drawn at most, the first ones.

    Returns:
        The figure, one row a sample; without the confidence where the victim gave labels only.

    Raises:
        ValueError: if columns, shapes or class names do not match.
    """
    if not images or set(images) != set(answers):
        raise ValueError(f"images and answers must have the same columns, not {list(images)} and {list(answers)}")
    counts = {len(batch) for batch in (*images.values(), *answers.values())}
    if len(counts) != 1 or not max(counts):
        raise ValueError(f"all columns must hold equally many samples and answers, at least one, not {sorted(counts)}")
    rows, size = min(max_rows, counts.pop()), 1.25
    figure = new_figure(size * len(images) + 0.4, (size + 0.32) * rows + 0.6)
    axes = figure.subplots(rows, len(images), squeeze=False)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    for column, name in enumerate(images):
        shown = pictures(images[name][:rows], mean, std)
        answer = answers[name][:rows].detach().cpu()
        if answer.ndim == 2 and answer.shape[1] != len(class_names):
            raise ValueError(f"answers have {answer.shape[1]} classes, but there are {len(class_names)} class names")
        labels = answer.argmax(1) if answer.ndim == 2 else answer.long()
        if answer.ndim not in (1, 2) or not ((labels >= 0) & (labels < len(class_names))).all():
            raise ValueError(f"answers must be probabilities (B, K) or labels below {len(class_names)}")
        for row, label in enumerate(labels.tolist()):
            ax: Axes = axes[row, column]
            ax.imshow(shown[row], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
            ax.spines[:].set_color("#C4C9CF")
            confidence = f" ({100 * float(answer[row, label]):.0f} %)" if answer.ndim == 2 else ""
            ax.set_xlabel(textwrap.fill(f"{class_names[label]}{confidence}", 18), fontsize=8, labelpad=3)
            if row == 0:
                ax.set_title(name, fontsize=9)
    return figure


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
    ax.axvline(100 * threshold, **_DASHED)
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
        Line2D([], [], **_DASHED, label=f"{100 * threshold:.0f} % criterion of the paper"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@house_style()
def feature_pca(
    groups: Mapping[str, ArrayLike],
    overlay: Collection[str] = ("watermark",),
    title: str = "Penultimate features of the victim",
) -> Figure:
    """Projects features on the two principal components of the natural classes (the paper's Fig. 6).

    Args:
        groups: per group (source A, source B, target, watermark) features ``(N, D)``, D ≥ 2.
        overlay: groups that are projected but do not shape the projection: the watermark must not choose the view.
        title: above the figure.

    Returns:
        The figure, one marker shape and colour a group.

    Raises:
        ValueError: if features have different widths, fewer than two of them, or no natural group is left.
    """
    from sklearn.decomposition import PCA

    features = {name: _finite(f"features of {name!r}", values, 2) for name, values in groups.items()}
    natural = [values for name, values in features.items() if name not in overlay]
    widths = {values.shape[1] for values in features.values()}
    if not natural or len(widths) != 1 or min(widths) < 2 or sum(map(len, natural)) < 3:
        raise ValueError(
            "the projection needs at least three natural samples whose features all have one width of two or more; "
            f"got { {name: values.shape for name, values in features.items()} }, of which {list(overlay)} do not count"
        )
    pca = PCA(n_components=2, svd_solver="full").fit(np.concatenate(natural))
    figure = new_figure(5.2, 4.2)
    ax = figure.subplots()
    looks = iter([(BLUE, "o"), (SKY, "s"), (GREEN, "^"), (ORANGE, "v"), (PURPLE, "P"), (GREY, "d")] * len(features))
    for name, values in features.items():
        colour, shape = (VERMILION, "X") if name in overlay else next(looks)
        x, y = pca.transform(values).T
        ax.scatter(
            x, y, s=22 if name in overlay else 16, c=colour, marker=shape, alpha=0.75, linewidths=0.3,
            edgecolors="white", label=f"{name} ({len(values):,})", zorder=3 if name in overlay else 2,
        )  # fmt: skip
    shares = 100 * np.nan_to_num(pca.explained_variance_ratio_)
    ax.set_xlabel(f"component 1 ({shares[0]:.1f} % of the natural variance)")
    ax.set_ylabel(f"component 2 ({shares[1]:.1f} %)")
    ax.set_aspect("equal", adjustable="datalim")  # distances mean the same in both directions
    ax.grid(visible=True)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    legend = figure.legend(loc="outside lower center", ncols=2, markerscale=1.4)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
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
    xlabel: str = "test statistic (watermark success minus control)",
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

    decoys = _finite("statistics", statistics, 1)
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
        ax.axvline(critical, **_DASHED, label=f"p ≤ {alpha:g} to the right")
    ax.set(xlabel=xlabel, ylabel="decoy keys")
    ax.yaxis.grid(visible=True)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
