"""The recipe study: what each knob of the watermark costs and what survives, over drawn keys and seeds.

    python experiments/benchmarks/pareto.py experiments/fashion_mnist/supervised.yaml --output runs/pareto

Each cell is one ``meadef run`` of the experiment (recipe x key x seed) in a directory of its own: an interrupted study goes on where
it stopped, and finished cells are read. What does not depend on recipe and key (clean twin, references, independent models) is
trained once a seed and shared. Written: ``pareto.csv`` (every suspect of every cell), ``pareto.md`` (means and 95 % intervals over
cells, and each recipe's difference from the first, cell by cell), ``pareto.png`` (the fronts). The knee is the recipe on the front whose
stolen WSR, soft and hard together, is highest at a mean accuracy cost of at most one point.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from meadef_lightning.experiment.aggregate import Estimate
from meadef_lightning.experiment.artifacts import csv_text, make_directory, read_json, write_text_atomic
from meadef_lightning.experiment.figure_style import BLUE, DASHED, VERMILION, house_style, new_figure, save
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run
from meadef_lightning.experiment.spec import ExperimentSpec

_CALLBACK = "--watermark.callback.init_args"


def _weights(tilt: float | None = None, **terms: float) -> list[str]:
    """Command-line overrides for the tilt and for weights of the terms; the others are the library's."""
    tilted = [] if tilt is None else [f"{_CALLBACK}.tilt", str(tilt)]
    given = ", ".join(f"{name}: {weight}" for name, weight in terms.items())
    fixed = f"{{class_path: meadef_lightning.watermark.Fixed, init_args: {{{given}}}}}"
    return [*tilted, f"{_CALLBACK}.balancing", fixed]


RECIPES: dict[str, list[str]] = {
    "default": [],
    "no tilt": [f"{_CALLBACK}.tilt", "0.0"],
    "tilt .25": [f"{_CALLBACK}.tilt", "0.25"],
    "tilt .75": [f"{_CALLBACK}.tilt", "0.75"],
    "tilt .9": [f"{_CALLBACK}.tilt", "0.9"],
    "tilt from .3": [f"{_CALLBACK}.tilt_from", "0.3"],
    "BatchNorm running": [f"{_CALLBACK}.batchnorm", "running"],
    "start .3": [f"{_CALLBACK}.start", "0.3"],
    "start .5": [f"{_CALLBACK}.start", "0.5"],
    "start .75": [f"{_CALLBACK}.start", "0.75"],
    "no smoothing": ["--victim.model.init_args.label_smoothing", "0.0"],
    "samples 16": [f"{_CALLBACK}.samples", "16"],
    "eva 0": _weights(eva=0.0),
    "eva .3": _weights(eva=0.3),
    "ver 1 eva .3": _weights(ver=1.0, eva=0.3),
    "ver .1 tilt .3": _weights(0.3, ver=0.1),
    "ver .2 tilt .5": _weights(0.5, ver=0.2),
    "ver .3 tilt .6": _weights(0.6, ver=0.3),
    "com .1": _weights(com=0.1),
    "com 1": _weights(com=1.0),
    "com 1 T 4": [*_weights(com=1.0), f"{_CALLBACK}.temperature", "4.0"],
    "com 1 coupled": [*_weights(com=1.0), f"{_CALLBACK}.detach_sources", "false"],
    "every 2": [f"{_CALLBACK}.every_n_steps", "2"],
    # an untrained network has no statistics to keep
    "from scratch": [f"{_CALLBACK}.start", "0.0", f"{_CALLBACK}.batchnorm", "running"],
    "last-layer MGDA": [f"{_CALLBACK}.balancing", "meadef_lightning.watermark.LastLayerMGDA"],
}
COLUMNS = ("recipe", "key", "seed", "cost", "suspect", "labels", "accuracy", "wsr", "wfpr", "p_value", "verdict")


def shared_stages(spec: ExperimentSpec) -> list[str]:
    """Names the stages that depend on neither recipe nor key."""
    return ["clean", *spec.reference_names, *(name for control in spec.independent for name in control.names)]


def copy_stage(source: Path, target: Path) -> None:
    """Copies a stage in one step: a copy that was interrupted is never taken for a whole stage."""
    aside = target.with_name(f".{target.name}.new")
    shutil.rmtree(aside, ignore_errors=True)  # of a study that was killed here
    shutil.copytree(source, aside)
    aside.rename(target)


def cell(arguments: argparse.Namespace, recipe: str, key: str, seed: int, shared: Path) -> list[dict[str, Any]]:
    """Runs one cell, or reads it, and returns one row a suspect."""
    # the rest of the experiment's key, what it is drawn from, stays
    drawn = ["--watermark.key.file", "null", "--watermark.key.secret_env", "null", "--watermark.key.public_secret", key]
    overrides = [*RECIPES[recipe], "--seeds", f"[{seed}]", *drawn]
    experiment = load_experiment(arguments.experiment, overrides)
    stages = shared_stages(experiment.build())
    output = make_directory(arguments.output / recipe.replace(" ", "-") / f"{key.replace(' ', '-')}-seed-{seed}")
    if any(override.startswith("--victim") for override in RECIPES[recipe]):
        shared = shared.with_name(recipe.replace(" ", "-"))  # another training has another clean twin
    for name in stages:
        if (shared / name).exists() and not (output / name).exists():
            copy_stage(shared / name, output / name)
    report = output / "report.json"
    if not report.exists() or (output / "config.yaml").read_text(encoding="utf-8") != experiment.yaml():
        run(experiment, output)  # refuses what was trained with other options
    make_directory(shared)
    for name in stages:
        if (output / name).exists() and not (shared / name).exists():
            copy_stage(output / name, shared / name)
    content = read_json(report)
    cost = 100 * (content["victim"]["clean_accuracy"] - content["victim"]["accuracy"])
    keep = ("labels", "accuracy", "wsr", "wfpr", "p_value", "verdict")
    return [
        {"recipe": recipe, "key": key, "seed": seed, "cost": cost, "suspect": row["name"], **{c: row[c] for c in keep}}
        for row in content["suspects"]
    ]


def estimate(rows: list[dict[str, Any]], column: str) -> Estimate:
    """Mean and 95 % t-interval of a column over cells."""
    return Estimate.of([float(row[column]) for row in rows])


def summary(rows: list[dict[str, Any]]) -> tuple[str, dict[str, tuple[float, float, float]]]:
    """Returns the table as Markdown, and each recipe's mean cost, soft and hard stolen WSR (first theft of either kind)."""
    suspects = [name for name in dict.fromkeys(row["suspect"] for row in rows) if not name.startswith("independent")]
    lines = [
        "| recipe | cells | accuracy cost | "
        + " | ".join(f"{name} WSR / WFPR / supported" for name in suspects)
        + " |",
        "|---" * (3 + len(suspects)) + "|",
    ]
    points = {}
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = {name: [r for r in rows if r["recipe"] == recipe and r["suspect"] == name] for name in suspects}
        cost = estimate([{"cost": row["cost"] / 100} for row in mine["victim"]], "cost")
        texts = []
        for group in mine.values():
            supported = sum(row["verdict"] == "supported" for row in group)
            texts.append(f"{estimate(group, 'wsr')} / {estimate(group, 'wfpr')} / {supported}/{len(group)}")
        lines.append(f"| {recipe} | {len(mine['victim'])} | {cost} | " + " | ".join(texts) + " |")
        stolen = {
            kind: next(
                (g for n, g in mine.items() if n not in ("victim", "clean") and g and g[0]["labels"] == kind), []
            )
            for kind in ("soft", "hard")
        }
        if all(stolen.values()):
            points[recipe] = (
                100 * cost.mean,
                estimate(stolen["soft"], "wsr").mean,
                estimate(stolen["hard"], "wsr").mean,
            )
    return "\n".join(lines) + "\n", points


def differences(rows: list[dict[str, Any]]) -> str:
    """Returns, as Markdown, how each recipe differs from the first in the cells that both have; nothing for a single recipe.

    Keys differ more than recipes do, and here they drop out. In points, mean and 95 % t-interval over the cells' differences.
    """
    base, *others = dict.fromkeys(row["recipe"] for row in rows)
    if not others:
        return ""
    of = {
        recipe: {(row["suspect"], row["key"], row["seed"]): row for row in rows if row["recipe"] == recipe}
        for recipe in (base, *others)
    }
    suspects = [name for name in dict.fromkeys(row["suspect"] for row in rows) if not name.startswith("independent")]
    suspects = [name for name in suspects if name != "clean"]

    def change(recipe: str, suspect: str, column: str, unit: float = 1.0) -> str:
        both = [place for place in of[recipe].keys() & of[base].keys() if place[0] == suspect]
        gains = [unit * (float(of[recipe][place][column]) - float(of[base][place][column])) for place in sorted(both)]
        return f"{Estimate.of(gains):+}" if gains else "-"

    lines = [
        f"| against {base} | accuracy cost | " + " | ".join(f"{name} WSR / WFPR" for name in suspects) + " |",
        "|---" * (2 + len(suspects)) + "|",
    ]
    for recipe in others:
        texts = [f"{change(recipe, name, 'wsr')} / {change(recipe, name, 'wfpr')}" for name in suspects]
        lines.append(f"| {recipe} | {change(recipe, 'victim', 'cost', 0.01)} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def front(points: dict[str, tuple[float, float, float]]) -> list[str]:
    """Returns the recipes that no other one beats in both cost and stolen WSR (soft and hard together)."""
    score = {name: (cost, soft + hard) for name, (cost, soft, hard) in points.items()}
    return [
        name
        for name, (cost, kept) in score.items()
        if not any(c <= cost and k >= kept and (c, k) != (cost, kept) for c, k in score.values())
    ]


def draw(points: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Draws accuracy cost against what survives soft and hard labels, with the front of each, and the recipes by number."""
    with house_style():
        figure = new_figure(9.0, 1.5 + max(2.7, 0.17 * len(points)))
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        costs = [point[0] for point in points.values()]
        width = max(costs) - min(costs)
        for index, (axes, kind, colour, marker) in enumerate(
            zip(panels, ("soft labels", "hard labels"), (BLUE, VERMILION), "os", strict=True), 1
        ):
            places = [(point[0], 100 * point[index]) for point in points.values()]
            best = sorted(p for p in places if not any(c <= p[0] and k >= p[1] and (c, k) != p for c, k in places))
            axes.step(*zip(*best, strict=True), where="post", color=colour, linewidth=1, alpha=0.5)
            axes.scatter(*zip(*places, strict=True), c=colour, marker=marker, s=14)
            for number, (x, y) in enumerate(places, 1):
                # below its place where a smaller number's stands at the same
                crowded = any(
                    abs(x - other) < 0.02 * width and abs(y - kept) < 4 for other, kept in places[: number - 1]
                )
                axes.annotate(
                    str(number), (x, y), xytext=(3, -9 if crowded else 3), textcoords="offset points", fontsize=7
                )
            axes.axvline(1.0, **DASHED)
            axes.grid(visible=True)
            axes.set(xlabel="accuracy cost (points)", ylim=(0, 104), title=f"Thefts by {kind}")
        panels[0].set_ylabel("stolen WSR (%)")
        names = "\n".join(f"{number:\u2007>2}  {name}" for number, name in enumerate(points, 1))
        figure.legend([Line2D([], [], linestyle="none")], [names], loc="outside right upper", handlelength=0)
    save(figure, path)


def main() -> None:
    """Runs the study that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="+", help="Experiment YAMLs, later ones override.")
    parser.add_argument("--output", type=Path, default=Path("runs/pareto"))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument(
        "--keys", nargs="+", default=["study 0", "study 1", "study 2"], help="Secrets to draw keys from."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    make_directory(arguments.output)
    for recipe, key, seed in itertools.product(arguments.recipes, arguments.keys, arguments.seeds):
        rows += cell(arguments, recipe, key, seed, arguments.output / "shared" / f"seed-{seed}" / "as-it-is")
        write_text_atomic(arguments.output / "pareto.csv", csv_text(COLUMNS, rows))
        table, points = summary(rows)
        table = "\n".join(filter(None, (table, differences(rows))))
        write_text_atomic(arguments.output / "pareto.md", table)
    if points:
        draw(points, arguments.output / "pareto.png")
        affordable = [name for name in front(points) if points[name][0] <= 1.0]
        knee = max(affordable, key=lambda name: sum(points[name][1:]), default=None)
        print(table)
        print(f"On the front: {', '.join(front(points))}. Knee (cost <= 1 point): {knee or 'none'}.")


if __name__ == "__main__":
    main()
