"""The verdicts on the models of one seed: every model is verified in a stage of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch import Tensor

from meadef_lightning import processes
from meadef_lightning.experiment.artifacts import read_json, write_json_atomic
from meadef_lightning.experiment.gallery import verdict_figure
from meadef_lightning.experiment.rows import SuspectRow
from meadef_lightning.experiment.seed_run import SeedRun, Suspect
from meadef_lightning.experiment.spec import Model, TrainerOptions
from meadef_lightning.experiment.stage_directory import Stage
from meadef_lightning.experiment.stages import RESULT
from meadef_lightning.quiet import quiet
from meadef_lightning.removal.base import classes_of
from meadef_lightning.verification import Fidelity, Responses, VerificationDataModule, verify
from meadef_lightning.verification.features import FeatureAnswers, feature_answers, feature_verdict
from meadef_lightning.victims.encoder import Encoder


class Judge:
    """Judges the models of one seed. What all verdicts are compared with, victim and references are asked once.

    Args:
        run: The chain whose models are judged.
    """

    def __init__(self, run: SeedRun) -> None:
        self.run = run

    @cached_property
    def victim_answers(self) -> Tensor:
        """The victim's classes for the test split, int64, shape ``(N,)``."""
        victim = self.run.classifier(self.run.load_victim().to(self.run.device))
        x, _ = self.run.data.tensors("test")
        return classes_of(victim, x, self.run.spec.verification.batch_size)

    @cached_property
    def reference_answers(self) -> list[Responses]:
        """The reference models' answers to the verifier's questions: what composites look like to models without the key."""
        options = {**self._devices(), **asdict(self.run.spec.verification)}
        models = (self.run.classifier(model) for model in self._references())
        return [verify(model, self.run.key, self.run.data, **options)[1] for model in models]

    @cached_property
    def reference_features(self) -> list[FeatureAnswers]:
        """The same in features, where the victim is an encoder."""
        settings = {name: value for name, value in asdict(self.run.spec.verification).items() if name != "alpha"}
        questions = VerificationDataModule(self.run.key, self.run.data, **settings)
        return [feature_answers(model, questions) for model in self._references()]

    def _references(self) -> Iterator[Model]:
        return (self.run.load_reference(name).to(self.run.device) for name in self.run.spec.reference_names)

    def _devices(self) -> TrainerOptions:
        """Where verification runs: on what trained the victim; with several processes, each asks its share of the samples."""
        options = self.run.spec.victim.trainer
        where = {name: options[name] for name in processes.DEVICE_OPTIONS if name in options}
        # nothing is trained, so there is nothing to shard
        return {**where, "strategy": "ddp" if processes.count() > 1 else "auto"}

    def row(self, suspect: Suspect) -> SuspectRow:
        """Verifies one suspect in a stage of its own, with evidence and a figure of the decoys; returns its row of the report."""
        run, options = self.run, self.run.spec.verification
        directory = run.root / f"verify-{suspect.name}"
        inputs = {
            **run.base,
            "config": run.experiment.hash_of(run.experiment.config("verification")),
            "key": run.key.commitment(),
            "suspect": suspect.sha256,
            **{name: read_json(run.root / name / RESULT)["sha256"] for name in ("victim", *run.spec.reference_names)},
            **run.standing(),
        }
        with Stage(directory, f"verify-{suspect.name}", inputs) as stage, run.track("verify")(stage):
            if not stage.done:
                loaded = run.load_model(suspect).to(run.device)
                model = run.classifier(loaded)
                with quiet():
                    verdict, responses = verify(
                        model,
                        run.key,
                        run.data,
                        reference=self.reference_answers,
                        evidence_path=directory / "evidence.json",
                        **self._devices(),
                        **asdict(options),
                    )

                def write() -> None:
                    result: dict[str, Any] = {}
                    if isinstance(loaded, Encoder):
                        # what an owner sees who gets features and no classes
                        result["features"] = feature_verdict(
                            loaded, run.key, run.data, self.reference_features, **asdict(options)
                        ).to_dict()
                    fidelity = Fidelity()(responses.natural, self.victim_answers)
                    verdict_figure(responses, verdict, run.key, suspect.name, directory / "figures")
                    result |= {"verdict": verdict.to_dict(), "fidelity": float(fidelity)}
                    write_json_atomic(directory / RESULT, result)

                processes.first(write)
        result = processes.first(lambda: read_json(directory / RESULT))
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
