"""The page and the figure of the calibration study (:mod:`~meadef_lightning.experiments.benchmarks.calibration`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from meadef_lightning.experiment.figure_style import BLUE, GREY, VERMILION, house_style, new_figure, save
from meadef_lightning.verification.verdict import PAPER_THRESHOLD


def markdown(result: dict[str, Any], architectures: int) -> str:
    """Writes the study as a page.

    Args:
        result: What is in ``calibration.json``.
        architectures: How many the models are of.
    """
    lines = [
        f"{result['models']} independent models of {architectures} architectures, accuracy {result['accuracy']['mean']:.1%} on "
        f"average and {result['accuracy']['smallest']:.1%} at least; alpha = {result['alpha']:g}, {result['samples']} triggers, {result['keys']} shared keys.",
        "",
        "| decoy test | own keys: false claims | 95 % bound | shared keys: false claims | all keys: mean rate | worst model | worst key accuses | KS D | KS p |",
        "|---" * 9 + "|",
    ]
    for mode, row in result["tests"].items():
        own, shared, every = row["own"], row.get("shared"), row.get("every")
        lines.append(
            f"| {mode} | {own['supported']}/{own['trials']} | {own['upper']:.2%} | "
            + (f"{shared['supported']}/{shared['trials']} | " if shared else "- | ")
            + (
                f"{every['mean_rate']:.5f} | {every['largest_rate_of_a_model']:.5f} | {every['largest_share_one_key_accuses']:.1%} of models"
                if every
                else "- | - | -"
            )
            + f" | {row['uniformity']['ks']:.3f} | {row['uniformity']['ks_p']:.2f} |"
        )
    wsr = result["wsr"]
    lines += [
        "",
        f"WSR of independent models over all keys: mean {wsr['mean']:.1%}, 99 % quantile {wsr['q99']:.1%}, largest {wsr['largest']:.1%}. Above "
        f"{PAPER_THRESHOLD:.0%}: {wsr['above_paper_threshold']:.2%} of models x keys; {wsr['keys_above_in_a_model']:.1%} of the keys in at least "
        f"one model, {wsr['keys_above_in_half']:.1%} in half of the models.",
    ]
    if result["power"]:
        lines += ["", "| thefts | supported | 95 % interval | mean WSR |", "|---" * 4 + "|"]
        for name, row in result["power"].items():
            low, high = row["ci"]
            lines.append(
                f"| {name} | {row['supported']}/{row['thefts']} | {low:.2f} to {high:.2f} | {row['mean_wsr']:.1%} |"
            )
    return "\n".join(lines) + "\n"


def draw_figure(result: dict[str, Any], rates: Tensor, stolen: Sequence[float], path: Path) -> None:
    """Draws the p-values against the uniform distribution, and the WSR of independent models and of thefts.

    Args:
        result: What is in ``calibration.json``.
        rates: WSR of every model under every key, shape ``(models, keys)``.
        stolen: WSR of the thefts.
        path: The PNG.
    """
    with house_style():
        figure = new_figure(8.0, 3.6)
        left, right = figure.subplots(1, 2)
        models = result["models"]
        grid = np.arange(1, models + 1) / models
        band = float(stats.kstwo.ppf(0.95, models))
        line = np.linspace(0, 1, 50)
        left.fill_between(
            line, np.clip(line - band, 0, 1), np.clip(line + band, 0, 1), color="#E3E6EA", label="95 % band (KS)"
        )
        for (mode, row), colour in zip(result["tests"].items(), (BLUE, VERMILION, GREY), strict=False):
            left.step(
                np.sort(row["uniformity"]["p"]),
                grid,
                color=colour,
                where="post",
                label=f"{mode}, KS p = {row['uniformity']['ks_p']:.2f}",
            )
        left.set(
            xlabel="p-value (ties at random)", ylabel="share of models", title=f"{models} models, a drawn key for each"
        )
        left.legend(loc="upper left", fontsize=7)
        edges = np.linspace(0, 1, 33)  # so that the usual numbers of samples fall evenly
        weights = np.full(rates.numel(), 1 / rates.numel())
        right.hist(
            rates.flatten().numpy(),
            edges,
            weights=weights,
            color=BLUE,
            label=f"{models} models x {rates.shape[1]} keys",
        )
        if stolen:
            right.hist(
                stolen, edges, weights=np.full(len(stolen), 1 / len(stolen)), histtype="step", color=VERMILION,
                label=f"{len(stolen)} thefts",
            )  # fmt: skip
        right.axvline(
            PAPER_THRESHOLD, color="#222222", linestyle=(0, (4, 3)), linewidth=1, label="the paper's fixed 30 %"
        )
        right.set(
            yscale="log", xlabel="WSR", ylabel="share", title="WSR of independent models" + " and thefts" * bool(stolen)
        )
        right.yaxis.set_major_formatter("{x:g}")
        right.legend(loc="upper right", fontsize=7)
    save(figure, path)
