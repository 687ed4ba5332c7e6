"""The whole story from one specification: train, watermark, steal, judge, report. Every step is a stage on disk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from meadef_lightning import processes
from meadef_lightning.detection.base import ModelDetector
from meadef_lightning.experiment.artifacts import is_rank_zero, make_directory, read_json, write_text_atomic
from meadef_lightning.experiment.checks import check_stages
from meadef_lightning.experiment.gallery import experiment_figures, robustness_figures
from meadef_lightning.experiment.load import Experiment
from meadef_lightning.experiment.lock import locked
from meadef_lightning.experiment.render import ReportExtras, write_report
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.robustness import Finding, Robustness, detection_rows
from meadef_lightning.experiment.rows import KeyInfo, RemovalRow, SuspectRow, VictimRow
from meadef_lightning.experiment.seed_run import SeedRun
from meadef_lightning.experiment.tracking import Tracking
from meadef_lightning.experiment.verdict_stage import Judge


def run(experiment: Experiment, output: Path, command: str = "", tracking: Tracking | None = None) -> Report:
    """Runs an experiment, or what is left of it, and writes its report.

    Where the victim's Trainer wants several processes, all of them run it: those that ``torchrun`` or a scheduler started, or that
    Lightning starts here by running the program's command again.

    Args:
        experiment: What to run.
        output: The experiment's directory, e.g. ``runs/digits``.
        command: The command that reproduces it, for the report.
        tracking: What is tracked besides the files in ``output``; nothing by default.

    Returns:
        The report, as written to ``report.json``, ``report.html`` and ``summary.csv``.

    Raises:
        MisconfigurationException: If the directory holds results of another configuration, another run is at work in it, processes do
            not share it, or the specification does not fit the data; nothing that is there is overwritten.
        ProcessFailedError: If another process failed, and this one could not go on without it.
    """

    def locally() -> Report:
        if is_rank_zero():
            make_directory(output)
        with locked(output):
            processes.meet()
            if not output.is_dir():
                raise MisconfigurationException(
                    f"{output.absolute()}, where rank zero writes, is not seen by process {processes.rank()}. Choose a directory with "
                    "--output that all machines share."
                )
            return _run(experiment, output, command, tracking or Tracking())

    return processes.launch(experiment.config("victim.trainer"), locally)


def _run(experiment: Experiment, output: Path, command: str, tracking: Tracking) -> Report:
    many = len(experiment.seeds) > 1
    config = yaml.safe_load(experiment.yaml())
    tracker = tracking.tracker(output, experiment.name, config, many)
    runs = [
        SeedRun(experiment, output / f"seed-{seed}" if many else output, seed, tracker) for seed in experiment.seeds
    ]
    for seed_run in runs:
        check_stages(seed_run.fresh(), seed_run.key, seed_run.data)
    progress = Progress(many)
    found = Found()
    fights = [_run_seed(seed_run, found, progress) for seed_run in runs]
    report = _report(experiment, runs, found)

    def write() -> None:
        write_text_atomic(output / "config.yaml", experiment.yaml())
        figures = experiment_figures(runs[0], found.rows, output / "figures")
        figures += robustness_figures(fights[0], found.removal, output / "figures")
        write_report(report, output, figures, _extras(experiment, runs, output, command))
        tracker.report(report, figures, output, runs[0].key)

    processes.first(write)
    return report


@dataclass
class Found:
    """What the seeds have found so far."""

    rows: list[SuspectRow] = field(default_factory=list)
    removal: list[RemovalRow] = field(default_factory=list)
    searches: list[Finding] = field(default_factory=list)
    clean: list[str] = field(default_factory=list)


class Progress:
    """Says which stage of which seed is next."""

    def __init__(self, many: bool) -> None:
        self.many, self.console, self.done = many, Console(stderr=True), 0

    def plan(self, steps: int) -> None:
        """Sets the number of stages of a seed, counting from the next one."""
        self.done, self.total = 0, steps

    def announce(self, name: str, seed: int) -> None:
        """Prints a rule with the stage's number and name."""
        self.done += 1
        if is_rank_zero():
            where = f", seed {seed}" if self.many else ""
            self.console.rule(f"{self.done}/{self.total} {name}{where}", align="left")


def _run_seed(run: SeedRun, found: Found, progress: Progress) -> Robustness:
    """Runs every stage of one seed and adds what it found."""

    def named(name: str) -> str:
        return f"{name}/seed-{run.seed}" if progress.many else name

    todo, made, judge = run.suspects(), {}, Judge(run)
    spec = run.spec
    controls, references = 1 + sum(control.count for control in spec.independent), spec.reference_names
    searches = sum(
        len(item.of) + (controls if isinstance(item.method, ModelDetector) else 0) for item in spec.detection
    )
    progress.plan(len(references) + len(todo) + sum(len(item.of) for item in spec.removal) + searches)
    for name in references:
        progress.announce(name, run.seed)
        run.reference(name)
    for name, make in todo:
        progress.announce(name, run.seed)
        made[name] = make()
        found.rows.append(replace(judge.row(made[name]), name=named(name)))
    fight = Robustness(run, made)
    for name, index, of in fight.removals():
        progress.announce(name, run.seed)
        # made by rank zero, read by all
        path, scrubbed = processes.in_turn(partial(fight.remove, name, index, of))
        found.removal.append(replace(path, name=named(name)))
        if scrubbed is not None:
            found.rows.append(replace(judge.row(scrubbed), name=named(name)))
    for name, index, of in fight.searches():
        progress.announce(name, run.seed)
        found.searches.append(processes.in_turn(partial(fight.search, name, index, of)))
    found.clean = fight.clean
    return fight


def _report(experiment: Experiment, runs: list[SeedRun], found: Found) -> Report:
    rows = found.rows
    victims = [row for row in rows if row.kind == "victim"]
    clean = [row for row in rows if row.base_name == "clean"]
    key = runs[0].key
    return Report(
        experiment=experiment.name,
        seeds=tuple(experiment.seeds),
        key=KeyInfo(key.commitment(), key.drawn_uniformly),
        victim=VictimRow(
            accuracy=fmean(row.accuracy for row in victims),
            clean_accuracy=fmean(row.accuracy for row in clean),
            wsr=fmean(row.wsr for row in victims),
            wfpr=fmean(row.wfpr for row in victims),
        ),
        suspects=tuple(rows),
        removal=tuple(found.removal),
        detection=tuple(detection_rows(found.searches, found.clean)),
    )


def _extras(experiment: Experiment, runs: list[SeedRun], output: Path, command: str) -> ReportExtras:
    seconds = {
        path.parent.relative_to(output).as_posix(): read_json(path)["seconds"]
        for path in sorted(output.rglob("stage.json"))
    }
    return ReportExtras(
        command=command,
        config=experiment.yaml(),
        splits=runs[0].data.split_summary(),
        stage_seconds=seconds,
        alpha=runs[0].spec.verification.alpha,
    )
