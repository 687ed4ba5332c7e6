"""Several keys in one model: what a second one costs, and whether the two together prove more than one alone.

    python -m meadef_lightning.experiments.benchmarks.several_keys --together '[1, 2]'

``together: [1, 2]`` marks one victim with each of the keys alone, and one with every two neighbours in their ring, so that every key
is embedded equally often. Each victim is stolen by all thefts of the experiment, and every model is judged once for all of its victim's keys
(:func:`~meadef_lightning.verification.combination.judge_keys`: Fisher's combination of the decoy p-values). The innocent models, which are
trained once a seed, are judged for the same sets of keys. Every model is a stage on disk and every judged set one, too: an interrupted study
goes on, and one that is finished is read.

Written: ``several_keys.csv`` (every model under every set of keys) and ``several_keys.md`` (means and 95 % t-intervals over sets).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks.measuring import Section, show

from meadef_lightning.experiment.aggregate import Estimate
from meadef_lightning.experiment.artifacts import (
    csv_text,
    make_directory,
    read_json,
    write_json_atomic,
    write_text_atomic,
)
from meadef_lightning.experiment.load import Experiment, load_experiment
from meadef_lightning.experiment.seed_run import SeedRun, Suspect
from meadef_lightning.experiment.spec import Model, TrainerOptions
from meadef_lightning.experiment.stage_directory import Stage
from meadef_lightning.experiment.stages import RESULT, train_stage
from meadef_lightning.experiment.training import derived_seed
from meadef_lightning.quiet import quiet
from meadef_lightning.verification import Responses, verify
from meadef_lightning.verification.combination import judge_keys
from meadef_lightning.watermark import WatermarkKey

FILE = Path(__file__).parents[1] / "digits" / "supervised.yaml"


@dataclass(frozen=True)
class Row:
    """One model under one set of keys.

    Args:
        together: How many keys its victim carries.
        keys: Their secrets.
        seed: The run's.
        suspect: The model.
        cost: What the keys cost the victim, in points of accuracy.
        accuracy: The model's, in ``[0, 1]``.
        wsr: Mean over the keys, in ``[0, 1]``.
        wfpr: Likewise.
        p_value: Of all keys together.
        verdict: Likewise.
        alone: The largest p-value of a single key.
    """

    together: int
    keys: str
    seed: int
    suspect: str
    cost: float
    accuracy: float
    wsr: float
    wfpr: float
    p_value: float
    verdict: str
    alone: float


class SeveralKeys(SeedRun):
    """The chain for one seed, with a victim that carries several keys.

    Args:
        experiment: As in ``meadef run``; its own key is not used.
        root: Where victim and thefts go.
        seed: The seed.
        keys: The keys.
    """

    def __init__(self, experiment: Experiment, root: Path, seed: int, keys: Sequence[WatermarkKey]) -> None:
        self.keys = list(keys)
        super().__init__(experiment, root, seed)

    def _key(self) -> WatermarkKey:
        """Keeps all keys beside the victim; stages are tracked under the first."""
        for i, key in enumerate(self.keys):
            key.save(self.root / f"watermark-{i}.key.json")
        return self.keys[0]

    def victim(self, name: str) -> dict[str, Any]:
        """Trains the victim with all keys, each embedded by a callback of its own."""
        config, marks = (self.experiment.config(part) for part in ("victim", "watermark.callback"))
        digests = {f"key-{i}": key.commitment() for i, key in enumerate(self.keys)}
        hashes = {"config": self.experiment.hash_of(config), "watermark": self.experiment.hash_of(marks), **digests}

        def build() -> tuple[Model, LightningDataModule, TrainerOptions]:
            spec = self.fresh()
            # the module hands its callbacks to the Trainer; it has room for one
            callbacks = [spec.watermark.callback(key).named(f"watermark-{i}") for i, key in enumerate(self.keys)]
            spec.victim.model.configure_callbacks = lambda: callbacks  # type: ignore[method-assign]
            return spec.victim.model, spec.data, spec.victim.trainer

        seed = derived_seed(self.seed, "victim")
        return train_stage(self.root / name, name, {**self.base, **hashes}, build, seed, config["model"])


class Study:
    """The study for one seed.

    Args:
        files: Experiment YAMLs.
        overrides: Changes to them, as ``meadef run`` takes them.
        root: Where everything of this seed goes.
        seed: The seed.
    """

    def __init__(self, files: Sequence[Path], overrides: Sequence[str], root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.experiment = load_experiment(list(files), list(overrides))
        self.run = SeedRun(self.experiment, root / "innocent", seed)
        self._references: dict[str, list[Responses]] = {}

    def key(self, secret: str) -> WatermarkKey:
        """Draws the key of a secret, from what the experiment draws from."""
        source = replace(self.run.spec.watermark.key, file=None, secret_env=None, public_secret=secret)
        return source.resolve(self.run.data.num_classes)

    def ask(self, model: Model, key: WatermarkKey, **options: Any) -> Responses:
        """Asks a model the questions of one key."""
        with quiet():
            return verify(
                self.run.classifier(model), key, self.run.data, **asdict(self.run.spec.verification), **options
            )[1]

    def references(self, secret: str) -> list[Responses]:
        """The reference models' answers to the questions of one key."""
        if secret not in self._references:
            key, models = self.key(secret), (self.run.load_reference(name) for name in self.run.spec.reference_names)
            self._references[secret] = [self.ask(model, key) for model in models]
        return self._references[secret]

    def rows(self, secrets: Sequence[str]) -> list[Row]:
        """Marks a victim with the keys of these secrets, steals and judges it, or reads what was found."""
        root = make_directory(self.root / "+".join(secret.replace(" ", "-") for secret in secrets))
        keys = [self.key(secret) for secret in secrets]
        asked = {f"key-{i}": key.commitment() for i, key in enumerate(keys)}
        inputs = {**self.run.base, "config": self.experiment.hash_of(self.experiment.config()), **asked}
        with Stage(root / "judged", "judged", inputs) as stage:
            if not stage.done:
                rows = self._judged(secrets, keys, root)
                write_json_atomic(stage.directory / RESULT, [asdict(row) for row in rows])
        return [Row(**row) for row in read_json(stage.directory / RESULT)]

    def _judged(self, secrets: Sequence[str], keys: Sequence[WatermarkKey], root: Path) -> list[Row]:
        marked = SeveralKeys(self.experiment, root, self.seed, keys)
        for name in self.run.spec.reference_names:
            self.run.reference(name)
        innocent = ["clean", *(name for control in self.run.spec.independent for name in control.names)]
        mine, theirs = dict(marked.suspects()), dict(self.run.suspects())
        suspects: list[tuple[SeedRun, Suspect]] = [
            *((marked, mine[name]()) for name in mine if name not in innocent),
            *((self.run, theirs[name]()) for name in innocent),
        ]
        judged = {}
        for run, suspect in suspects:
            model = run.load_model(suspect)
            answers = [
                self.ask(model, key, reference=self.references(secret))
                for secret, key in zip(secrets, keys, strict=True)
            ]
            cases = list(zip(answers, keys, strict=True))
            judged[suspect.name] = judge_keys(cases, self.run.spec.verification.alpha)
        accuracy = {name: joint.verdicts[0].natural_accuracy for name, joint in judged.items()}
        return [
            Row(
                together=len(keys),
                keys=", ".join(secrets),
                seed=self.seed,
                suspect=name,
                cost=100 * (accuracy["clean"] - accuracy["victim"]),
                accuracy=accuracy[name],
                wsr=fmean(verdict.wsr for verdict in joint.verdicts),
                wfpr=fmean(verdict.wfpr for verdict in joint.verdicts),
                p_value=joint.decoy_p,
                verdict=joint.verdict,
                alone=max(verdict.decoy_p for verdict in joint.verdicts),
            )
            for name, joint in judged.items()
        ]


def rings(secrets: Sequence[str], size: int) -> list[list[str]]:
    """Every ``size`` neighbours of a ring: each secret stands in ``size`` of the sets, once where a set is all of them.

    Raises:
        MisconfigurationException: If there are not so many.
    """
    if not 1 <= size <= len(secrets):
        raise MisconfigurationException(
            f"together must lie between 1 and the number of keys, {len(secrets)}, got {size}."
        )
    starts = range(len(secrets)) if size < len(secrets) else range(1)
    return [[secrets[(start + i) % len(secrets)] for i in range(size)] for start in starts]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Means and 95 % t-intervals over sets of keys and seeds: keys together, model, cost, accuracy, WSR, WFPR, supported, smallest and largest p.

    Controls stand in one line a size.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        name = "innocent" if row.suspect.startswith(("clean", "independent")) else row.suspect
        groups.setdefault((row.together, name), []).append(row)
    lines = []
    for (together, name), group in groups.items():
        means = [str(Estimate.of([getattr(row, column) for row in group])) for column in ("accuracy", "wsr", "wfpr")]
        cost = str(Estimate.of([row.cost / 100 for row in group])) if name == "victim" else "-"
        p_values = [row.p_value for row in group]
        supported = sum(row.verdict == "supported" for row in group)
        ends = f"{min(p_values):.2g} to {max(p_values):.2g}"
        lines.append([str(together), name, cost, *means, f"{supported}/{len(group)}", ends])
    return lines


def main(
    experiment: list[Path] | None = None,
    output: Path = Path("runs/several_keys"),
    keys: list[str] | None = None,
    together: list[int] | None = None,
    seeds: list[int] | None = None,
    overrides: list[str] | None = None,
) -> Section:
    """Runs the study, or what is left of it.

    Args:
        experiment: Experiment YAMLs, later ones override; ``experiments/digits/supervised.yaml`` by default.
        output: Where everything goes.
        keys: Secrets to draw keys from; "digits 0" to "digits 4" by default.
        together: Numbers of keys in one model; 1 and 2 by default.
        seeds: Seeds; 0 by default.
        overrides: Changes to the experiment, as ``meadef run`` takes them.
    """
    files = experiment or [FILE]
    keys = [f"digits {i}" for i in range(5)] if keys is None else keys
    seeds = [0] if seeds is None else seeds
    together = [1, 2] if together is None else together
    sets = [secrets for size in together for secrets in rings(keys, size)]
    make_directory(output)
    rows: list[Row] = []
    for seed in seeds:
        study = Study(files, overrides or [], output / f"seed-{seed}", seed)
        for secrets in sets:
            rows += study.rows(secrets)
            write_text_atomic(output / "several_keys.csv", csv_text(Row.__dataclass_fields__, map(asdict, rows)))
    section = Section(
        "Several keys in one model",
        f"python -m meadef_lightning.experiments.benchmarks.several_keys --together '{json.dumps(together)}' --seeds '{json.dumps(seeds)}'",
        ("keys", "model", "accuracy cost", "accuracy %", "WSR %", "WFPR %", "supported", "p"),
        table(rows),
        f"{', '.join(path.name for path in files)}, keys {', '.join(keys)}; mean ± 95 % t-interval over sets of keys and seeds.",
    )
    write_text_atomic(output / "several_keys.md", section.markdown())
    show(section)
    return section


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(main)
