"""Which figures an experiment gets, and the model outputs they are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meadef_lightning.experiment.artifacts import make_directory
from meadef_lightning.experiment.curves import budget_curves, budget_series
from meadef_lightning.experiment.figure_style import save
from meadef_lightning.experiment.render import ReportFigure
from meadef_lightning.experiment.robustness_figures import removal_curves
from meadef_lightning.experiment.rows import RemovalRow, SuspectRow
from meadef_lightning.experiment.sample_figures import feature_pca, watermark_grid
from meadef_lightning.experiment.verdict_figures import decoy_distribution, wsr_bars
from meadef_lightning.verification import Responses, Verdict, decoy_statistics
from meadef_lightning.victims.networks import penultimate
from meadef_lightning.watermark import WatermarkKey

if TYPE_CHECKING:
    from meadef_lightning.experiment.robustness import Robustness
    from meadef_lightning.experiment.seed_run import SeedRun

_DRAWN = 120
"""Samples per group in the figure of features."""


def verdict_figure(responses: Responses, verdict: Verdict, key: WatermarkKey, name: str, directory: Path) -> Path:
    """Draws the decoy keys' statistics on one suspect with the true key marked; returns the PNG's path."""
    statistic, decoys = decoy_statistics(responses, key)
    figure = decoy_distribution(
        decoys.numpy(), statistic, verdict.decoy_p, verdict.alpha, title=f"{name}: the true key among the other keys"
    )
    return save(figure, make_directory(directory) / "decoys.png")


def experiment_figures(run: SeedRun, rows: Sequence[SuspectRow], directory: Path) -> list[ReportFigure]:
    """Draws the figures of a report: success by suspect, samples, features, decoys.

    The samples and features show the key's classes: they are for the owner's eyes, as the whole report directory is.

    Args:
        run: The run whose victim, key and data are drawn.
        rows: The suspects.
        directory: Where the PNG files go.

    Returns:
        The figures in the order of the report.
    """
    key, data, victim = run.key, run.data, run.load_classifier()
    a, b = key.source_classes
    names = [data.class_names[label] for label in (a, b, key.target_class)]
    x, y = data.tensors("verification")
    first, second = x[y == a], x[y == b]
    count = min(len(first), len(second), _DRAWN)
    first, second = first[:count], second[:count]
    groups = {f"A: {names[0]}": first, f"B: {names[1]}": second, "watermark": key.combiner.build()(first, second)}
    with torch.no_grad():
        answers = {name: victim(batch).softmax(dim=-1) for name, batch in groups.items()}
        shown = {**groups, f"target: {names[2]}": x[y == key.target_class][:_DRAWN]}
        features = {name: penultimate(victim, batch).flatten(1).numpy() for name, batch in shown.items()}
    make_directory(directory)
    drawn = [
        (
            wsr_bars(rows),
            "wsr.png",
            "Watermark success rate of every suspect",
            "Horizontal bars of the watermark success rate with 95 % intervals; independent models beside stolen ones.",
        ),
        (
            watermark_grid(groups, answers, data.class_names, data.mean, data.std),
            "samples.png",
            "Watermark samples and the victim's answers",
            "Rows of a sample of either source class, the watermark sample made of them, and the victim's answers.",
        ),
        (
            feature_pca(features),
            "features.png",
            "Where the watermark lies among its sources (the paper's Fig. 6)",
            "Scatter plot of penultimate features on two principal components: sources, target and watermark.",
        ),
    ]
    series = budget_series(rows)
    if series:
        drawn.append(
            (
                budget_curves(series),
                "budget.png",
                "What a theft gains over the number of queries",
                "Two panels of lines over the number of queries: the stolen models' accuracy and watermark success rate.",
            )
        )
    result = [ReportFigure(save(figure, directory / file), title, alt) for figure, file, title, alt in drawn]
    for row in rows:
        path = run.root / f"verify-{row.base_name}" / "figures" / "decoys.png"
        if row.kind == "extracted" and row.seed in (None, run.seed):
            result.append(
                ReportFigure(
                    path,
                    f"{row.base_name}: the true key among the other keys",
                    "Histogram of the test statistic of all other keys, with the true key as a line.",
                )
            )
    return result


def robustness_figures(fight: Robustness, rows: Sequence[RemovalRow], directory: Path) -> list[ReportFigure]:
    """Draws the paths of the removals, one figure for every model they act on, and collects the inverted triggers.

    Args:
        fight: The attacks of the seed that is drawn.
        rows: All removals; those of other seeds are left out.
        directory: Where the PNG files go.
    """
    mine = [row for row in rows if "/" not in row.name or row.name.endswith(f"/seed-{fight.run.seed}")]
    result = []
    for target in dict.fromkeys(row.target for row in mine):
        paths = [row for row in mine if row.target == target]
        result.append(
            ReportFigure(
                save(removal_curves(paths, f"Attacks on {target}"), directory / f"removal-{target}.png"),
                f"What is left of {target} and of its watermark along each attack; the ring is what the thief takes home",
                "A panel for every attack: accuracy, watermark success and false-positive rate over its strength.",
            )
        )
    return result + list(fight.trigger_figures())
