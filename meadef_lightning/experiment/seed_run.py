"""The chain for one seed: every model of an experiment is trained or stolen in a stage of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from meadef_lightning import processes
from meadef_lightning.experiment.artifacts import is_rank_zero, read_json
from meadef_lightning.experiment.load import Experiment
from meadef_lightning.experiment.rows import Kind, Labels
from meadef_lightning.experiment.spec import ExperimentSpec, Model, TrainedSpec, TrainerOptions
from meadef_lightning.experiment.stages import RESULT, extraction_stage, train_stage
from meadef_lightning.experiment.tracking import StageKind, Track, Tracker
from meadef_lightning.experiment.training import derived_seed
from meadef_lightning.experiment.weights import MODEL, load_weights
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.downstream import DownstreamClassifier
from meadef_lightning.victims.encoder import Encoder
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
    build: Callable[[], Model]


class SeedRun:
    """The chain for one seed: all stages below one directory.

    Args:
        experiment: The experiment.
        root: Where the stages' directories go.
        seed: The seed: of splits, trainings and thefts.
        tracker: What follows the stages; nothing by default.
    """

    def __init__(self, experiment: Experiment, root: Path, seed: int, tracker: Tracker | None = None) -> None:
        self.experiment, self.root, self.seed, self.tracker = experiment, root, seed, tracker or Tracker()
        self.spec = self.fresh()
        self.data = self.spec.data
        processes.on_each_node(self.data.prepare_data)
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

    def track(self, kind: StageKind) -> Track:
        """Returns what follows a stage of this seed."""
        return self.tracker.stage(kind, self.seed, self.key)

    # ---- models

    def victim(self, name: str) -> dict[str, Any]:
        """Trains the victim, or without the watermark ``clean``, from the same seed, or a reference, from one of its own."""
        watermarked = name == "victim"
        config = self.experiment.config("victim")
        inputs = {**self.base, "config": self.experiment.hash_of(config)}
        if watermarked:
            callback = self.experiment.config("watermark.callback")
            inputs |= {"watermark": self.experiment.hash_of(callback), "key": self.key.commitment()}

        def build() -> tuple[Model, LightningDataModule, TrainerOptions]:
            spec = self.fresh()
            if watermarked:
                spec.victim.model.watermark = spec.watermark.callback(self.key)
            return spec.victim.model, spec.data, spec.victim.trainer

        seed = derived_seed(self.seed, "victim" if name in ("victim", "clean") else name)
        return train_stage(self.root / name, name, inputs, build, seed, config["model"], self.track("train"))

    def reference(self, name: str) -> dict[str, Any]:
        """Trains the reference model of that name: like the victim without the watermark, or of another kind, on the same images."""
        index = self._of_another_kind(name)
        if index is None:
            return self.victim(name)
        return self._trained("other_references", index, name)

    def _of_another_kind(self, name: str) -> int | None:
        """Position of the reference model's entry in ``other_references``; ``None`` for one like the victim."""
        return next((i for i, entry in enumerate(self.spec.other_references) if name in entry.names), None)

    def _trained(self, section: Literal["other_references", "independent"], index: int, name: str) -> dict[str, Any]:
        """Trains a model that never sees the victim: on its images, or on those of the attacker."""
        config = self.experiment.config(section)[index]
        number = getattr(self.spec, section)[index].names.index(name)
        inputs = {**self.base, "config": self.experiment.hash_of(config, number)}

        def build() -> tuple[Model, LightningDataModule, TrainerOptions]:
            spec = self.fresh()
            if section == "independent":
                spec.data.train_split = "attacker"
            entry: TrainedSpec = getattr(spec, section)[index]
            return entry.model, spec.data, entry.trainer

        seed = derived_seed(self.seed, name)
        return train_stage(self.root / name, name, inputs, build, seed, config["model"], self.track("train"))

    def patched(self) -> Suspect:
        """Trains the positive control of removals and detections; it is attacked, and not judged."""
        config = self.experiment.config("patched")
        inputs = {**self.base, "config": self.experiment.hash_of(config)}

        def model() -> Classifier:
            patched = self.fresh().patched.model
            if patched is None:
                raise ValueError("The experiment has no positive control; give it patched.model.")
            return patched

        def build() -> tuple[Model, LightningDataModule, TrainerOptions]:
            spec = self.fresh()
            return model(), spec.data, spec.patched.trainer

        directory = self.root / "patched"
        seed = derived_seed(self.seed, "victim")
        result = train_stage(directory, "patched", inputs, build, seed, config["model"], self.track("train"))
        return Suspect("patched", "victim", "none", "hard", 0, directory, result["sha256"], model)

    def load_model(self, suspect: Suspect) -> Model:
        """Loads what a suspect is: a classifier or an encoder, with its weights."""
        return load_weights(suspect.build(), self.data, suspect.directory / MODEL)

    @cached_property
    def device(self) -> torch.device:
        """Where models are asked, attacked and searched: this process's device in the victim's training.

        Raises:
            MisconfigurationException: If there is none such here, which only matters where something is left to do.
        """
        return processes.device_of(self.spec.victim.trainer)

    def load(self, suspect: Suspect) -> Classifier:
        """Loads what is judged of a suspect onto :attr:`device`: a classifier, on top of it if it is an encoder."""
        return self.classifier(self.load_model(suspect).to(self.device))

    def standing(self) -> dict[str, str]:
        """What stages of a classifier on top of an encoder depend on besides; nothing if the victim is a classifier itself."""
        config = self.experiment.config("downstream")
        return {"downstream": self.experiment.hash_of(config)} if isinstance(self.spec.victim.model, Encoder) else {}

    def classifier(self, model: Model) -> Classifier:
        """Returns what is judged of a model: itself, or the classifier that stands on it if it is an encoder."""
        if isinstance(model, Classifier):
            return model
        downstream = self.spec.downstream
        x, y = self.data.tensors(downstream.split)
        return DownstreamClassifier.probe(model, x, y, self.data.num_classes, downstream.weight_decay)

    def load_classifier(self) -> Classifier:
        """Loads the victim, or the classifier that stands on it."""
        return self.classifier(self.load_victim())

    def load_victim(self) -> Model:
        """Loads the trained victim."""
        return load_weights(self.fresh().victim.model, self.data, self.root / "victim" / MODEL)

    def load_reference(self, name: str) -> Model:
        """Loads the reference model of that name."""
        index, spec = self._of_another_kind(name), self.fresh()
        model = spec.victim.model if index is None else spec.other_references[index].model
        return load_weights(model, self.data, self.root / name / MODEL)

    def suspects(self) -> list[tuple[str, Callable[[], Suspect]]]:
        """Returns each suspect's name and what makes it, in the order of the report."""
        todo: list[tuple[str, Callable[[], Suspect]]] = [
            ("victim", self._victim_suspect),
            ("clean", self._clean_suspect),
        ]
        for i, attack in enumerate(self.spec.extraction):
            todo.append((attack.name, lambda i=i: self._steal(i)))  # type: ignore[misc]
        for i, control in enumerate(self.spec.independent):
            for name in control.names:
                todo.append((name, lambda i=i, name=name: self._independent(i, name)))  # type: ignore[misc]
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
            **({} if isinstance(attack.student, Encoder) else self.standing()),
        }
        directory = self.root / attack.name

        def victim() -> Model:
            model = self.load_victim().to(self.device)
            return model if isinstance(attack.student, Encoder) else self.classifier(model)

        seed = derived_seed(self.seed, attack.name)
        track = self.track("extract")
        result = extraction_stage(directory, attack, inputs, victim, spec.data, seed, config["student"], track)
        return Suspect(
            attack.name, "extracted", _class_name(config["queries"]).removesuffix("DataModule"), result["labels"], result["queries"], directory, result["sha256"],
            lambda: self.fresh().extraction[index].student,
        )  # fmt: skip

    def _independent(self, index: int, name: str) -> Suspect:
        result = self._trained("independent", index, name)
        return Suspect(
            name, "independent", "none: trained on images of its own", "hard", 0, self.root / name, result["sha256"],
            lambda: self.fresh().independent[index].model,
        )  # fmt: skip


def _class_name(config: Any) -> str:
    """Returns the class name in a configuration of a class, which may be a mapping or just the path."""
    path: str = config["class_path"] if isinstance(config, dict) else str(config)
    return path.rpartition(".")[2]
