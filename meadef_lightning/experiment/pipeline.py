"""The whole story from one specification: train, watermark, steal, judge, report. Every step is a stage on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor

from meadef_lightning.experiment.artifacts import (
    Stage,
    is_rank_zero,
    make_directory,
    read_json,
    write_json_atomic,
    write_text_atomic,
)
from meadef_lightning.experiment.gallery import experiment_figures, verdict_figure
from meadef_lightning.experiment.render import ReportExtras, write_report
from meadef_lightning.experiment.report import KeyInfo, Kind, Labels, Report, SuspectRow, VictimRow
from meadef_lightning.experiment.spec import Experiment, ExperimentSpec, TrainerOptions
from meadef_lightning.experiment.stages import (
    MODEL,
    RESULT,
    derived_seed,
    extraction_stage,
    load_weights,
    train_stage,
)
from meadef_lightning.quiet import quiet
from meadef_lightning.verification import Fidelity, Responses, verify
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.watermark import WatermarkKey

KEY_FILE = "watermark.key.json"


@dataclass(frozen=True)
class Suspect:
    """A trained model that is to be judged.

    Args:
        name: Its name in directories and report.
        kind: As in ``report.json``.
        attack: How it was made, for the report.
        labels: What it was trained on.
        queries: Distinct inputs the oracle was asked.
        directory: Its stage.
        sha256: Digest of its checkpoint.
        build: Makes the model, weights not loaded.
    """

    name: str
    kind: Kind
    attack: str
    labels: Labels
    queries: int
    directory: Path
    sha256: str
    build: Callable[[], Classifier]


class SeedRun:
    """The chain for one seed: all stages below one directory.

    Args:
        experiment: The experiment.
        root: Where the stages' directories go.
        seed: The seed: of splits, trainings and thefts.
    """

    def __init__(self, experiment: Experiment, root: Path, seed: int) -> None:
        self.experiment, self.root, self.seed = experiment, root, seed
        self.spec = self.fresh()
        self.data = self.spec.data
        self.data.prepare_data()
        self.data.setup()
        self.key = self._key()
        self.base = {
            "data": experiment.hash_of(experiment.config("data"), self.data.split_summary()),
            "seed": experiment.hash_of(seed),
        }

    def fresh(self) -> ExperimentSpec:
        """Returns newly built objects; the data's splits follow the seed."""
        spec = self.experiment.build()
        spec.data.seed += self.seed
        return spec

    def _key(self) -> WatermarkKey:
        key = self.spec.watermark.key.resolve(self.data.num_classes)
        path = self.root / KEY_FILE
        if self.spec.watermark.key.file is None and not path.exists() and is_rank_zero():
            key.save(path)
        return key

    # ---- models

    def victim(self, name: Literal["victim", "clean", "reference"]) -> dict[str, Any]:
        """Trains the victim, or without the watermark its clean twin from the same seed, or the reference from another one."""
        watermarked = name == "victim"
        config = self.experiment.config("victim")
        inputs = {**self.base, "config": self.experiment.hash_of(config)}
        if watermarked:
            callback = self.experiment.config("watermark.callback")
            inputs |= {"watermark": self.experiment.hash_of(callback), "key": self.key.commitment()}

        def build() -> tuple[Classifier, LightningDataModule, TrainerOptions]:
            spec = self.fresh()
            if watermarked:
                spec.victim.model.watermark = spec.watermark.callback(self.key)
            return spec.victim.model, spec.data, spec.victim.trainer

        seed = derived_seed(self.seed, "reference" if name == "reference" else "victim")
        return train_stage(self.root / name, name, inputs, build, seed, config["model"])

    def load_victim(self) -> Classifier:
        """Loads the trained victim."""
        return load_weights(self.fresh().victim.model, self.data, self.root / "victim" / MODEL)

    def suspects(self) -> list[tuple[str, Callable[[], Suspect]]]:
        """Returns each suspect's name and what makes it, in the order of the report."""
        todo: list[tuple[str, Callable[[], Suspect]]] = [
            ("victim", self._victim_suspect),
            ("clean", self._clean_suspect),
        ]
        for i, attack in enumerate(self.spec.extraction):
            todo.append((attack.name, lambda i=i: self._steal(i)))  # type: ignore[misc]
        for i, control in enumerate(self.spec.independent):
            for j in range(control.count):
                name = control.name if control.count == 1 else f"{control.name}-{j}"
                todo.append((name, lambda i=i, j=j, name=name: self._independent(i, j, name)))  # type: ignore[misc]
        return todo

    def _victim_suspect(self) -> Suspect:
        result = self.victim("victim")
        return Suspect(
            "victim",
            "victim",
            "none",
            "hard",
            0,
            self.root / "victim",
            result["sha256"],
            lambda: self.fresh().victim.model,
        )

    def _clean_suspect(self) -> Suspect:
        result = self.victim("clean")
        return Suspect(
            "clean",
            "independent",
            "none: the victim's training without watermark",
            "hard",
            0,
            self.root / "clean",
            result["sha256"],
            lambda: self.fresh().victim.model,
        )

    def _steal(self, index: int) -> Suspect:
        spec = self.fresh()
        attack, config = spec.extraction[index], self.experiment.config("extraction")[index]
        inputs = {
            **self.base,
            "config": self.experiment.hash_of(config),
            "victim": read_json(self.root / "victim" / RESULT)["sha256"],
        }
        directory = self.root / attack.name
        seed = derived_seed(self.seed, attack.name)
        result = extraction_stage(directory, attack, inputs, self.load_victim, spec.data, seed, config["student"])
        return Suspect(
            attack.name, "extracted", _class_name(config["queries"]).removesuffix("DataModule"), result["labels"], result["queries"], directory, result["sha256"],
            lambda: self.fresh().extraction[index].student,
        )  # fmt: skip

    def _independent(self, index: int, number: int, name: str) -> Suspect:
        config = self.experiment.config("independent")[index]
        inputs = {**self.base, "config": self.experiment.hash_of(config, number)}

        def build() -> tuple[Classifier, LightningDataModule, TrainerOptions]:
            spec = self.fresh()
            spec.data.train_split = "attacker"
            control = spec.independent[index]
            return control.model, spec.data, control.trainer

        result = train_stage(self.root / name, name, inputs, build, derived_seed(self.seed, name), config["model"])
        return Suspect(
            name, "independent", "none: trained on true labels", "hard", 0, self.root / name, result["sha256"],
            lambda: self.fresh().independent[index].model,
        )  # fmt: skip

    # ---- judgement

    @cached_property
    def victim_answers(self) -> Tensor:
        """The victim's classes for the test split, int64, shape ``(N,)``."""
        victim = self.load_victim()
        x, _ = self.data.tensors("test")
        with torch.no_grad():
            return torch.cat(
                [victim(part).argmax(dim=-1) for part in torch.split(x, self.spec.verification.batch_size)]
            )

    @cached_property
    def reference_answers(self) -> Responses:
        """The reference model's answers to the verifier's questions: what composites look like to a model without the key."""
        model = load_weights(self.fresh().victim.model, self.data, self.root / "reference" / MODEL)
        return verify(model, self.key, self.data, **asdict(self.spec.verification))[1]

    def judge(self, suspect: Suspect) -> SuspectRow:
        """Verifies one suspect in a stage of its own, with evidence and a figure of the decoys."""
        directory = self.root / f"verify-{suspect.name}"
        options = self.spec.verification
        inputs = {
            **self.base,
            "config": self.experiment.hash_of(self.experiment.config("verification")),
            "key": self.key.commitment(),
            "suspect": suspect.sha256,
            "victim": read_json(self.root / "victim" / RESULT)["sha256"],
            "reference": read_json(self.root / "reference" / RESULT)["sha256"],
        }
        with Stage(directory, f"verify-{suspect.name}", inputs) as stage:
            if not stage.done:
                model = load_weights(suspect.build(), self.data, suspect.directory / MODEL)
                with quiet():
                    verdict, responses = verify(
                        model,
                        self.key,
                        self.data,
                        reference=self.reference_answers,
                        evidence_path=directory / "evidence.json",
                        **asdict(options),
                    )
                fidelity = Fidelity()(responses.natural, self.victim_answers)
                if is_rank_zero():
                    verdict_figure(responses, verdict, self.key, suspect.name, directory / "figures")
                    write_json_atomic(directory / RESULT, {"verdict": verdict.to_dict(), "fidelity": float(fidelity)})
        result = read_json(directory / RESULT)
        verdict_dict = result["verdict"]
        return SuspectRow(
            name=suspect.name,
            kind=suspect.kind,
            attack=suspect.attack,
            labels=suspect.labels,
            queries=suspect.queries,
            accuracy=verdict_dict["natural_accuracy"],
            fidelity=result["fidelity"],
            wsr=verdict_dict["wsr"],
            wsr_ci=tuple(verdict_dict["wsr_ci"]),
            wfpr=verdict_dict["wfpr"],
            p_value=verdict_dict["decoy_p"],
            verdict=verdict_dict["verdict"],
        )


def run(experiment: Experiment, output: Path, command: str = "") -> Report:
    """Runs an experiment, or what is left of it, and writes its report.

    Args:
        experiment: What to run.
        output: The experiment's directory, e.g. ``runs/digits``.
        command: The command that reproduces it, for the report.

    Returns:
        The report, as written to ``report.json``, ``report.html`` and ``summary.csv``.

    Raises:
        MisconfigurationException: If the directory holds results of another configuration, or the specification does not
            fit the data; nothing that is there is overwritten.
    """
    output = make_directory(output)
    console = Console(stderr=True)
    rows: list[SuspectRow] = []
    many = len(experiment.seeds) > 1
    runs = [SeedRun(experiment, output / f"seed-{seed}" if many else output, seed) for seed in experiment.seeds]
    total = sum(1 + len(seed_run.suspects()) for seed_run in runs)
    steps = count(1)

    def announce(name: str, seed: int) -> None:
        if is_rank_zero():
            console.rule(f"{next(steps)}/{total} {name}" + (f", seed {seed}" if many else ""), align="left")

    for seed_run in runs:
        announce("reference", seed_run.seed)
        seed_run.victim("reference")
        for name, make in seed_run.suspects():
            announce(name, seed_run.seed)
            row = seed_run.judge(make())
            rows.append(replace(row, name=f"{name}/seed-{seed_run.seed}") if many else row)
    report = _report(experiment, runs, rows)
    if is_rank_zero():
        write_text_atomic(output / "config.yaml", experiment.yaml())
        figures = experiment_figures(runs[0], rows, output / "figures")
        write_report(report, output, figures, _extras(experiment, runs, output, command))
    return report


def _report(experiment: Experiment, runs: list[SeedRun], rows: list[SuspectRow]) -> Report:
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


def _class_name(config: Any) -> str:
    """Returns the class name in a configuration of a class, which may be a mapping or just the path."""
    path: str = config["class_path"] if isinstance(config, dict) else str(config)
    return path.rpartition(".")[2]
