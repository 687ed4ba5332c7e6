"""What an experiment YAML says, as typed dataclasses: the parser, its ``--help`` and the checks all follow from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import config_hash
from meadef_lightning.extraction import DistillationDataModule, Student
from meadef_lightning.oracle import BlackBox, Policy
from meadef_lightning.victims.supervised import SupervisedVictim
from meadef_lightning.watermark import WatermarkCallback, WatermarkKey

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

TrainerOptions = dict[str, Any]
"""Arguments of ``lightning.pytorch.Trainer``, e.g. ``{max_epochs: 30, accelerator: gpu}``."""


@dataclass
class KeySpec:
    """Where the watermark key comes from: exactly one of the first three.

    Args:
        file: A key file, written by ``WatermarkKey.save``.
        secret_env: Environment variable that holds the owner secret from which the key is drawn.
        public_secret: A secret written into the configuration, and so none: for demos and studies only.
        beacon: Public random value that is mixed into a drawn key.
    """

    file: str | None = None
    secret_env: str | None = None
    public_secret: str | None = None
    beacon: str = ""

    def resolve(self, num_classes: int) -> WatermarkKey:
        """Returns the key for a task of ``num_classes`` classes.

        Raises:
            MisconfigurationException: If not exactly one source is given, the variable is empty, or the key is for another
                number of classes.
        """
        given = [name for name in ("file", "secret_env", "public_secret") if getattr(self, name)]
        if len(given) != 1:
            raise MisconfigurationException(
                f"The watermark key needs exactly one of file, secret_env and public_secret, got {given or 'none'}."
            )
        if self.file:
            key = WatermarkKey.load(self.file)
            if key.num_classes != num_classes:
                raise MisconfigurationException(
                    f"The key in {self.file} is for {key.num_classes} classes, but the data has {num_classes}. Draw a key for this data."
                )
            return key
        secret = self.public_secret
        if self.secret_env:
            secret = os.environ.get(self.secret_env)
            if not secret:
                raise MisconfigurationException(
                    f"The environment variable {self.secret_env}, from which the key is to be drawn, is not set. Export it, e.g. "
                    f"{self.secret_env}=$(python -c 'import secrets; print(secrets.token_hex(16))')."
                )
        return WatermarkKey.draw(num_classes, secret or "", self.beacon)


@dataclass
class VictimSpec:
    """The owner's training; it is run twice, with and without the watermark, from the same seed.

    Args:
        model: The victim.
        trainer: Arguments of the Trainer.
    """

    model: SupervisedVictim
    trainer: TrainerOptions = field(default_factory=lambda: {"max_epochs": 20})


@dataclass
class WatermarkSpec:
    """How the victim is watermarked.

    Args:
        key: Where the key comes from.
        callback: The callback, called with the key.
    """

    key: KeySpec
    callback: Callable[[WatermarkKey], WatermarkCallback] = WatermarkCallback


@dataclass
class AttackSpec:
    """One theft through the oracle.

    Args:
        name: Unique name, used for directories and in the report.
        student: The thief's model.
        policy: What the API answers; ``None`` for soft labels.
        queries: The attack: makes the thief's data from the oracle and the data splits.
        budget: Most distinct inputs the oracle answers; ``None`` for no limit.
        budgets: Numbers of queries for a curve: the theft is run once for each, as ``NAME-1000`` and so on, with that number as
            the ``queries`` argument of its data module.
        trainer: Arguments of the Trainer.
    """

    name: str
    student: Student
    policy: Policy | None = None
    queries: Callable[[BlackBox, SplitDataModule], LightningDataModule] = DistillationDataModule
    budget: int | None = None
    budgets: list[int] = field(default_factory=list)
    trainer: TrainerOptions = field(default_factory=lambda: {"max_epochs": 20})


@dataclass
class IndependentSpec:
    """A negative control: a model of the thief's means that never saw the victim, trained on true labels.

    Args:
        name: Unique name, used for directories and in the report.
        model: The model.
        trainer: Arguments of the Trainer.
        count: How many, each from its own seed.
    """

    name: str
    model: SupervisedVictim
    trainer: TrainerOptions = field(default_factory=lambda: {"max_epochs": 20})
    count: int = 1


@dataclass
class VerificationSpec:
    """The pre-registered test every suspect goes through.

    Args:
        alpha: Significance level of a *supported* verdict.
        samples: Watermark samples for the success rate.
        decoys: Decoy keys; a key space of at most this size is enumerated.
        decoy_samples: Samples per decoy combination.
        seed: The verifier's seed: choice of decoys and pairing of source images.
        batch_size: Samples per forward.
    """

    alpha: float = 1e-3
    samples: int = 512
    decoys: int = 9999
    decoy_samples: int = 32
    seed: int = 0
    batch_size: int = 512


@dataclass
class ExperimentSpec:
    """A whole experiment: victim, thefts, negative controls, verdicts."""

    experiment: str
    data: SplitDataModule
    victim: VictimSpec
    watermark: WatermarkSpec
    extraction: list[AttackSpec]
    independent: list[IndependentSpec]
    verification: VerificationSpec
    seeds: list[int]


def experiment_parser(**kwargs: Any) -> ArgumentParser:
    """Makes the parser of experiment files, whose options are documented by the types and docstrings above."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(parser_mode="yaml", default_env=False, **kwargs)
    parser.add_argument("--config", action=ActionConfigFile, help="Experiment YAML; later ones override earlier ones.")
    parser.add_argument("--experiment", type=str, required=True, help="Name of the experiment.")
    parser.add_argument(
        "--seeds", type=list[int], default=[0], help="Seeds; each runs the whole chain, splits and trainings alike."
    )
    parser.add_subclass_arguments(SplitDataModule, "data", required=True)
    parser.add_class_arguments(VictimSpec, "victim")
    parser.add_class_arguments(WatermarkSpec, "watermark")
    parser.add_argument("--extraction", type=list[AttackSpec], default=[], help="Thefts.")
    parser.add_argument("--independent", type=list[IndependentSpec], help="Negative controls, at least one.")
    parser.add_class_arguments(VerificationSpec, "verification")
    return parser


class Experiment:
    """A parsed experiment that can be instantiated as often as needed: each stage of each seed gets fresh objects.

    Args:
        parser: The parser of :func:`experiment_parser`.
        config: What it parsed.

    Raises:
        MisconfigurationException: If names repeat, seeds are missing or repeat, or there is no negative control.
    """

    def __init__(self, parser: ArgumentParser, config: Namespace) -> None:
        self._parser, self._config = parser, config.clone()
        self._config.pop("config", None)
        self._config.extraction = [cell for attack in self._config.extraction for cell in _cells(attack)]
        spec = self.build()
        names = [attack.name for attack in spec.extraction] + [control.name for control in spec.independent]
        twice = sorted({name for name in names if names.count(name) > 1})
        reserved = sorted({"victim", "clean", "reference"} & set(names))
        if (
            twice
            or reserved
            or not all(name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in names)
        ):
            raise MisconfigurationException(
                f"Attacks and controls need names of their own made of letters, digits, '-', '_' and '.', got {names}"
                + (f"; reserved: {reserved}" if reserved else "")
                + (f"; twice: {twice}" if twice else "")
            )
        if not spec.independent or any(control.count < 1 for control in spec.independent):
            raise MisconfigurationException(
                "An experiment needs at least one independent model (independent: [...], count >= 1): without a negative "
                "control its table proves nothing."
            )
        if not spec.seeds or len(set(spec.seeds)) != len(spec.seeds) or min(spec.seeds) < 0:
            raise MisconfigurationException(
                f"seeds={spec.seeds} must be different integers of at least 0, at least one."
            )
        self.name, self.seeds = spec.experiment, spec.seeds

    def build(self) -> ExperimentSpec:
        """Instantiates everything anew, on CPU, without touching torch's random state."""
        with torch.random.fork_rng():
            objects = self._parser.instantiate(self._config)
        return ExperimentSpec(**{name: objects[name] for name in ExperimentSpec.__dataclass_fields__})

    def config(self, path: str | None = None) -> Any:
        """Returns the configuration as plain values, whole or the part at a dotted ``path``."""
        from jsonargparse import Namespace

        part = self._config if path is None else self._config[path]
        if isinstance(part, list):
            return [item.as_dict() if isinstance(item, Namespace) else item for item in part]
        return part.as_dict() if isinstance(part, Namespace) else part

    def yaml(self) -> str:
        """Returns the whole configuration as YAML that runs again."""
        text: str = self._parser.dump(self._config, skip_unset=False)
        return text

    def hash_of(self, *parts: Any) -> str:
        """Returns a digest of configuration parts, for a stage's inputs."""
        return config_hash(parts)


def _cells(attack: Namespace) -> list[Namespace]:
    """The thefts that an attack's ``budgets`` stand for: the attack itself if there are none."""
    if not attack.budgets:
        return [attack]
    cells = []
    for budget in attack.budgets:
        cell = attack.clone()
        if "queries" not in (cell.queries.get("init_args") or {}):
            raise MisconfigurationException(
                f"The attack {attack.name!r} has budgets, but {cell.queries.get('class_path')} takes no `queries` argument to set to "
                "them. List one attack per size instead."
            )
        cell.name, cell.budgets = f"{attack.name}-{budget}", []
        cell.queries.init_args.queries = budget
        cells.append(cell)
    return cells


def load_experiment(files: list[str | Path], overrides: list[str] | None = None) -> Experiment:
    """Reads experiment files and command-line overrides.

    Args:
        files: YAML files; later ones override earlier ones.
        overrides: Arguments like ``["--victim.trainer.max_epochs", "3"]``.

    Raises:
        MisconfigurationException: If a file is missing, unreadable, or says something the types do not allow.
    """
    parser = experiment_parser(exit_on_error=False)
    arguments = [part for file in files for part in ("--config", str(file))] + list(overrides or [])
    from jsonargparse import ArgumentError

    try:
        return Experiment(parser, parser.parse_args(arguments))
    except ArgumentError as error:
        raise MisconfigurationException(f"The experiment {', '.join(map(str, files))} is not valid: {error}") from error
