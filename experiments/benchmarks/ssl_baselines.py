"""Watermarks of encoders side by side: ours, SSLGuard's and a plain patch backdoor, under the same thefts and each by its own measure.

    python -m meadef_lightning.experiments.benchmarks.ssl_baselines [EXPERIMENT.yaml ...] [--output DIR] [--help]

For every seed three encoders are marked on the same images, and each is stolen by every feature theft of the experiment, with the
thief's own seeds: MEA-Defender as ``meadef run`` trains it; :class:`~meadef_lightning.protection.PatchEncoder`, SimCLR with the same network and
number of epochs; and :class:`~meadef_lightning.protection.SSLGuard`, which tunes the clean twin for ``guard_epochs``. What is counted:

* *MEA-Defender*: watermark samples that a linear probe on the encoder answers with the target (verification images);
* *patch*: stamped test images of other classes that the probe answers with the target;
* *SSLGuard*: stamped test images whose decoded features lie within a cosine of 0.5 of the secret vector.

The same is counted on the reference, an encoder of the same training that saw none of the marks: what a rate is worth. A dash is a student
with another number of features, which SSLGuard cannot read. Every model is a stage on disk: an interrupted study goes on, and one that is
given the output of a finished ``meadef run`` of several seeds takes its models from there. Written: ``ssl_baselines.csv`` (a row for each
scheme, model and seed) and ``ssl_baselines.md`` (means and 95 % t-intervals over seeds).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks.measuring import Section, show
from torch import Tensor, nn

from meadef_lightning.experiment.aggregate import Estimate
from meadef_lightning.experiment.artifacts import csv_text, make_directory, write_text_atomic
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.seed_run import SeedRun
from meadef_lightning.experiment.stages import extraction_stage, train_stage
from meadef_lightning.experiment.training import derived_seed
from meadef_lightning.experiment.weights import MODEL, load_weights
from meadef_lightning.extraction.encoder_student import EncoderStudent
from meadef_lightning.protection.patch_encoder import PatchEncoder
from meadef_lightning.protection.sslguard import SSLGuard, watermark_rate
from meadef_lightning.verification import VerificationDataModule
from meadef_lightning.victims.downstream import DownstreamClassifier, encode
from meadef_lightning.victims.encoder import Encoder

GUARD = {"encoder_lr": 1e-3, "trigger_lr": 0.03, "decoder_lr": 3e-3, "shadow_lr": 5e-3}
"""SSLGuard's learning rates for an encoder that trains in minutes; its defaults are those of large ones."""


@dataclass(frozen=True)
class Row:
    """One model of one seed.

    Args:
        scheme: The watermark.
        model: ``victim``, the name of a theft, or ``reference``.
        seed: The seed.
        queries: Distinct inputs asked.
        accuracy: Of a linear probe on it, in ``[0, 1]``.
        rate: The owner's own measure on it, in ``[0, 1]``; ``None`` where it cannot be taken.
    """

    scheme: str
    model: str
    seed: int
    queries: int
    accuracy: float
    rate: float | None


@dataclass(frozen=True)
class Marked:
    """A marked encoder, and how its owner reads the mark from a suspect."""

    scheme: str
    directory: Path
    sha256: str
    load: Callable[[], Encoder]
    rate: Callable[[Encoder, DownstreamClassifier], float | None]


class Study:
    """One seed of the study.

    Args:
        files: The experiment.
        overrides: Changes to it, as ``meadef run`` takes them.
        root: Directory of the seed.
        seed: The seed.
        guard: Arguments of SSLGuard.
        guard_epochs: Its epochs.

    Raises:
        MisconfigurationException: If the victim is no encoder, or no theft asks for features.
    """

    def __init__(
        self,
        files: Sequence[Path],
        overrides: Sequence[str],
        root: Path,
        seed: int,
        guard: dict[str, Any],
        guard_epochs: int,
    ) -> None:
        experiment = load_experiment(list(files), list(overrides))
        self.root, self.seed, self.guard, self.guard_epochs = root, seed, guard, guard_epochs
        self.run = SeedRun(experiment, root, seed)
        self.thefts = [
            i for i, theft in enumerate(self.run.spec.extraction) if isinstance(theft.student, EncoderStudent)
        ]
        if not isinstance(self.run.spec.victim.model, Encoder) or not self.thefts:
            raise MisconfigurationException(
                "This study compares encoders: victim.model must be one, and extraction must list a theft with an EncoderStudent. Use "
                "experiments/digits/simclr.yaml."
            )
        model = dict(experiment.config("victim.model"))
        patch = {**model.get("init_args", {}), "target_class": self.run.key.target_class}
        text = json.dumps({"class_path": "meadef_lightning.protection.PatchEncoder", "init_args": patch})
        self.patched = SeedRun(load_experiment(list(files), [*overrides, "--victim.model", text]), root / "patch", seed)

    def probe(self, encoder: Encoder) -> DownstreamClassifier:
        """Fits the experiment's linear probe."""
        downstream = self.run.spec.downstream
        x, y = self.run.data.tensors(downstream.split)
        return DownstreamClassifier.probe(encoder, x, y, self.run.data.num_classes, downstream.weight_decay)

    def ours(self) -> Marked:
        """MEA-Defender: the experiment's own victim."""
        settings = asdict(self.run.spec.verification)
        questions = VerificationDataModule(
            self.run.key, self.run.data, **{name: value for name, value in settings.items() if name != "alpha"}
        )
        questions.setup("predict")
        triggers = torch.cat([x for x, _ in questions.predict_dataloader()[0]])
        digest = self.run.victim("victim")["sha256"]

        def rate(_: Encoder, probe: DownstreamClassifier) -> float:
            return share(answers(probe, triggers) == self.run.key.target_class)

        return Marked("MEA-Defender", self.root, digest, lambda: encoder_of(self.run.load_victim()), rate)

    def patch(self) -> Marked:
        """The patch backdoor: its training is a clean one of the experiment in which it is the victim."""
        digest = self.patched.victim("clean")["sha256"]

        def load() -> PatchEncoder:
            model = self.patched.fresh().victim.model
            if not isinstance(model, PatchEncoder):
                raise TypeError(f"Expected a PatchEncoder, got {type(model).__name__}.")
            load_weights(model, self.run.data, self.root / "patch" / "clean" / MODEL)
            return model

        x, y = self.run.data.tensors("test")
        owner = load()
        stamped = owner.trigger(x[y != owner.target_class])

        def rate(_: Encoder, probe: DownstreamClassifier) -> float:
            return share(answers(probe, stamped) == owner.target_class)

        return Marked("patch", self.root / "patch", digest, load, rate)

    def sslguard(self) -> Marked:
        """SSLGuard on the clean twin."""
        clean = self.run.victim("clean")["sha256"]
        arguments = {**self.guard, "seed": derived_seed(self.seed, "sslguard")}
        trainer = {**self.run.spec.victim.trainer, "max_epochs": self.guard_epochs}
        config = self.run.experiment.hash_of(arguments, trainer)
        root = self.root / "sslguard"

        def fresh() -> SSLGuard:
            body = load_weights(self.run.fresh().victim.model, self.run.data, self.root / "clean" / MODEL)
            return SSLGuard(body, **arguments)

        result = train_stage(
            root / "victim", "sslguard", {**self.run.base, "config": config, "clean": clean},
            lambda: (fresh(), self.run.fresh().data, trainer), derived_seed(self.seed, "sslguard"),
            {"class_path": "meadef_lightning.protection.SSLGuard", "init_args": arguments},
        )  # fmt: skip

        def load() -> SSLGuard:
            model = fresh()
            load_weights(model, self.run.data, root / "victim" / MODEL)
            return model

        owner = load()
        with torch.no_grad():
            stamped = owner.trigger(self.run.data.tensors("test")[0])

        def rate(suspect: Encoder, _: DownstreamClassifier) -> float | None:
            features = encode(suspect, stamped)
            if features.shape[1] != owner.feature_dim:
                return None
            with torch.no_grad():
                return watermark_rate(owner.cosines(features))

        return Marked("SSLGuard", root, result["sha256"], load, rate)

    def steal(self, marked: Marked, index: int) -> tuple[str, Encoder, int]:
        """Steals a marked encoder; ours as ``meadef run`` does, in its stage. Returns the theft's name, the student and its queries."""
        spec = self.run.fresh()
        theft, config = spec.extraction[index], self.run.experiment.config("extraction")[index]
        if marked.directory == self.root:
            suspect = dict(self.run.suspects())[theft.name]()
            return theft.name, encoder_of(self.run.load_model(suspect)), suspect.queries
        inputs = {**self.run.base, "config": self.run.experiment.hash_of(config), "victim": marked.sha256}
        directory = marked.directory / theft.name
        seed = derived_seed(self.seed, theft.name)
        result = extraction_stage(directory, theft, inputs, marked.load, spec.data, seed, config["student"])
        student = load_weights(self.run.fresh().extraction[index].student, self.run.data, directory / MODEL)
        return theft.name, encoder_of(student), result["queries"]

    def rows(self) -> list[Row]:
        """Marks, steals and measures everything that is not on disk yet."""
        self.run.victim("reference")
        reference = encoder_of(self.run.load_reference("reference"))
        x, y = self.run.data.tensors("test")
        found = []
        for marked in (self.ours(), self.patch(), self.sslguard()):
            models = [
                ("victim", marked.load(), 0),
                *(self.steal(marked, i) for i in self.thefts),
                ("reference", reference, 0),
            ]
            for name, model, queries in models:
                probe = self.probe(model)
                accuracy = share(answers(probe, x) == y)
                found.append(Row(marked.scheme, name, self.seed, queries, accuracy, marked.rate(model, probe)))
        return found


def encoder_of(model: nn.Module) -> Encoder:
    """Returns a model that is an encoder; ``TypeError`` otherwise."""
    if not isinstance(model, Encoder):
        raise TypeError(f"Expected an encoder, got {type(model).__name__}.")
    return model


@torch.no_grad()
def answers(classifier: nn.Module, x: Tensor) -> Tensor:
    """Classes that a classifier in eval mode answers, int64 ``(N,)``."""
    return torch.cat([classifier(part).argmax(1) for part in torch.split(x, 512)])


def share(hits: Tensor) -> float:
    """Share of what is true."""
    return float(hits.double().mean())


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Means and 95 % t-intervals over seeds, in per cent, in the order of the rows: scheme, model, queries, accuracy, its own measure."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scheme, row.model), []).append(row)
    lines = []
    for (scheme, model), group in groups.items():
        rates = [row.rate for row in group if row.rate is not None]
        queries = f"{max(row.queries for row in group):,}" if any(row.queries for row in group) else "-"
        accuracy = str(Estimate.of([row.accuracy for row in group]))
        lines.append([scheme, model, queries, accuracy, str(Estimate.of(rates)) if len(rates) == len(group) else "-"])
    return lines


def main(
    experiment: list[Path] | None = None,
    output: Path = Path("runs/ssl_baselines"),
    seeds: list[int] | None = None,
    guard: dict[str, Any] | None = None,
    guard_epochs: int = 60,
    overrides: list[str] | None = None,
) -> Section:
    """Runs the study, or what is left of it.

    Args:
        experiment: Experiment YAMLs, later ones override; ``experiments/digits/simclr.yaml`` by default.
        output: Where everything goes.
        seeds: Seeds; 0, 1 and 2 by default.
        guard: Arguments of SSLGuard, beside the learning rates for small encoders.
        guard_epochs: Epochs that SSLGuard tunes the clean encoder.
        overrides: Changes to the experiment, as ``meadef run`` takes them.
    """
    files = experiment or [Path(__file__).parents[1] / "digits" / "simclr.yaml"]
    seeds = [0, 1, 2] if seeds is None else seeds
    make_directory(output)
    rows: list[Row] = []
    for seed in seeds:
        study = Study(files, overrides or [], output / f"seed-{seed}", seed, {**GUARD, **(guard or {})}, guard_epochs)
        rows += study.rows()
        write_text_atomic(output / "ssl_baselines.csv", csv_text(Row.__dataclass_fields__, map(asdict, rows)))
    section = Section(
        "Watermarks of encoders under theft",
        f"python -m meadef_lightning.experiments.benchmarks.ssl_baselines --seeds '{json.dumps(seeds)}'",
        ("scheme", "model", "queries", "accuracy %", "its own measure %"),
        table(rows),
        f"{', '.join(path.name for path in files)}, {len(seeds)} seed{'s' * (len(seeds) > 1)}; mean ± 95 % t-interval.",
    )
    write_text_atomic(output / "ssl_baselines.md", section.markdown())
    show(section)
    return section


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
