"""Figures of the attacks on a watermark: what is left of it along a removal's path, and the triggers that detectors invert."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from meadef_lightning.experiment.artifacts import make_directory
from meadef_lightning.experiment.figure_style import BLUE, GREY, VERMILION, house_style, new_figure, pictures, save
from meadef_lightning.experiment.rows import RemovalRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4


@house_style()
def removal_curves(rows: Sequence[RemovalRow], title: str = "") -> Figure:
    """Draws, for every removal of one model, accuracy and watermark success along the path.

    Args:
        rows: The paths; not empty. The point that the thief takes home is ringed.
        title: Title of the figure.

    Returns:
        A grid of small panels with a common vertical axis in per cent.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not rows:
        raise ValueError("There is no removal to draw; give the experiment a `removal` list.")
    columns = min(_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(2.2 * columns + 0.6, 2.1 * lines + 0.4)
    panels = np.atleast_1d(figure.subplots(lines, columns, sharey=True, squeeze=False)).ravel()
    for panel, row in zip(panels, rows, strict=False):
        strengths = [point.strength for point in row.curve]
        for name, colour, marker in (("accuracy", GREY, "s"), ("wsr", VERMILION, "o"), ("wfpr", BLUE, None)):
            values = [100 * getattr(point, name) for point in row.curve]
            label = {"accuracy": "accuracy", "wsr": "WSR", "wfpr": "WFPR"}[name]
            panel.plot(
                strengths, values, color=colour, marker=marker, markersize=3, linewidth=1.2, label=label,
                linestyle=":" if name == "wfpr" else "-",
            )  # fmt: skip
        taken = [point for point in row.curve if point.strength == row.chosen]
        if taken:
            panel.plot(row.chosen, 100 * taken[0].wsr, "o", markersize=8, fillstyle="none", color=VERMILION)
        panel.set_title(row.name.partition("/")[0].partition(".")[2], fontsize=8)
        panel.set_xlabel(textwrap.fill(row.unit, 28), fontsize=7)
        panel.set_ylim(-3, 103)
        panel.grid(True)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    panels[0].set_ylabel("per cent")
    panels[0].legend(fontsize=6)
    figure.suptitle(title)
    return figure


@house_style()
def _trigger_grid(
    images: Tensor,
    scores: Tensor,
    flagged: Sequence[int],
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Figure:
    shown = pictures(images.cpu(), mean, std)
    columns = min(5, len(shown))
    lines = -(-len(shown) // columns)
    figure = new_figure(1.35 * columns, 1.6 * lines + 0.2)
    for i, panel in enumerate(figure.subplots(lines, columns, squeeze=False).ravel()):
        panel.set_axis_off()
        if i < len(shown):
            panel.imshow(shown[i], cmap="gray", vmin=0, vmax=1)
            marked = i in flagged
            panel.set_title(
                f"{names[i]}: {float(scores[i]):.2g}", fontsize=7, color=VERMILION if marked else "black",
                fontweight="bold" if marked else "normal",
            )  # fmt: skip
    return figure


def trigger_pictures(
    images: Tensor,
    scores: Tensor,
    flagged: Sequence[int],
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
) -> Path:
    """Draws the inverted trigger of every class with the class's score; flagged classes stand out.

    Args:
        images: ``(K, C, H, W)`` in the model's input space.
        scores: Score of each class, ``(K,)``.
        flagged: Classes that are called targets.
        names: Names of the classes.
        mean: Mean of each channel, with which images were normalised.
        std: Standard deviation of each channel.
        path: The PNG file.

    Returns:
        The path.
    """
    make_directory(path.parent)
    return save(_trigger_grid(images, scores, flagged, names, mean, std), path)
