"""Figures of samples: what the watermark looks like, to the eye and in the victim's features."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from meadef_lightning.experiment.figure_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    finite,
    house_style,
    new_figure,
    pictures,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from torch import Tensor


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

    features = {name: finite(f"features of {name!r}", values, 2) for name, values in groups.items()}
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
