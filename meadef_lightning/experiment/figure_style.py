"""How our figures look and how they are saved.

They use ``matplotlib.figure.Figure`` and no pyplot, so that nothing global is left behind and threads, notebooks and
headless machines all work. A reader's own matplotlibrc changes nothing, and ``$`` in a class name is a dollar sign.
Colours are Okabe and Ito's, which people with any colour vision tell apart; shape or position repeats what they say.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from meadef_lightning.experiment.artifacts import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

DPI = 150
BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
INK, GREY = "#222222", "#767676"
DASHED: Any = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1}
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


def finite(name: str, values: ArrayLike, ndim: int) -> NDArray[np.float64]:
    """Returns values, a tensor's too, as a float64 array; raises a ``ValueError`` if they are empty, infinite or of other dimensions."""
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
    raw = np.moveaxis(finite("images", images, 4), 1, -1) * np.asarray(std) + np.asarray(mean)
    return np.asarray(np.clip(raw, 0, 1), dtype=np.float64)
