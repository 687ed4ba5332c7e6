"""From experiment files and command-line overrides to an experiment that can be built as often as needed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import config_hash
from meadef_lightning.experiment.checks import check_experiment, check_files
from meadef_lightning.experiment.spec import (
    RESERVED,
    AttackSpec,
    DetectionSpec,
    DownstreamSpec,
    ExperimentSpec,
    IndependentSpec,
    PatchedSpec,
    ReferenceSpec,
    RemovalSpec,
    TrainerOptions,
    VerificationSpec,
    VictimSpec,
    WatermarkSpec,
)
from meadef_lightning.processes import started_from_outside
from meadef_lightning.random_state import kept_random_state

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def experiment_parser(**kwargs: Any) -> ArgumentParser:
    """Makes the parser of experiment files, whose options are documented by the types and docstrings above."""
    from jsonargparse import ActionConfigFile

    from meadef_lightning.experiment.messages import Parser

    parser = Parser(parser_mode="yaml", default_env=False, **kwargs)
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
    parser.add_class_arguments(DownstreamSpec, "downstream")
    parser.add_class_arguments(PatchedSpec, "patched")
    parser.add_argument(
        "--removal", type=list[RemovalSpec], default=[], help="Attacks on the watermark of models at hand."
    )
    parser.add_argument("--detection", type=list[DetectionSpec], default=[], help="Searches for a watermark.")
    parser.add_class_arguments(VerificationSpec, "verification")
    parser.add_argument(
        "--references",
        type=int,
        default=1,
        help="Reference models: trainings like the victim's without the watermark, from seeds of their own, that know nothing of the key. "
        "Every suspect is judged above what they answer, and keys on which they differ must stand out further. Three to five recognise more "
        "thefts than one; each costs a training.",
    )
    parser.add_argument(
        "--other_references",
        type=list[ReferenceSpec],
        default=[],
        help="Reference models of other kinds, trained on the victim's images: composites look like something else to an MLP than to a "
        "convolutional network, and who knows what the thief chose?",
    )
    parser.add_argument(
        "--trainer",
        type=TrainerOptions,
        default={},
        help="Arguments of the Trainer of every stage, over what the stage says: --trainer.accelerator gpu, --trainer.devices 2, "
        "--trainer.strategy ddp (or fsdp2), --trainer.num_nodes 2.",
    )
    return parser


class Experiment:
    """A parsed experiment that can be instantiated as often as needed: each stage of each seed gets fresh objects.

    Args:
        parser: The parser of :func:`experiment_parser`.
        config: What it parsed.

    Raises:
        MisconfigurationException: If names repeat, seeds are missing or repeat, or there is no negative control or no reference.
    """

    def __init__(self, parser: ArgumentParser, config: Namespace) -> None:
        self._parser, self._config = parser, config.clone()
        self._config.pop("config", None)
        self._config.extraction = [cell for attack in self._config.extraction for cell in _cells(attack)]
        for stage in (
            self._config.victim, self._config.patched, *self._config.extraction, *(self._config.independent or []),
            *self._config.other_references,
        ):  # fmt: skip
            # what torchrun started is used, unless the stage says what to use
            outside = {} if "devices" in stage.trainer else started_from_outside()
            stage.trainer = {**outside, **stage.trainer, **self._config.trainer}
        spec = self.build()
        if spec.references < 1:
            raise MisconfigurationException(
                f"references={spec.references} must be at least 1: every suspect is judged above what a model without the key answers."
            )
        thefts = [attack.name for attack in spec.extraction]
        # a control's stages, and its name, which is theirs without a number
        controls = [
            name for control in spec.independent or [] for name in dict.fromkeys([control.name, *control.names])
        ]
        others = spec.reference_names[1:]
        check_names("Attacks, controls and references", thefts + controls + others, RESERVED)
        patched = ["patched"] if spec.patched.model is not None else []
        marked = ["victim", *patched, *thefts]
        for kind, acting, there in (
            ("removal", spec.removal, marked),
            ("detection", spec.detection, marked + spec.clean_names),
        ):
            check_names(f"The entries of {kind}", [item.name for item in acting], RESERVED)
            unknown = sorted({name for item in acting for name in item.of}.difference(there))
            if unknown:
                raise MisconfigurationException(
                    f"{kind} acts on {unknown}, which this experiment does not have. There are: {', '.join(there)}"
                    + ("." if patched else "; for `patched` give patched.model.")
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
        check_experiment(spec)
        self.name, self.seeds = spec.experiment, spec.seeds
        self._text: str | None = None

    def build(self) -> ExperimentSpec:
        """Instantiates everything anew, on CPU, without touching torch's random state."""
        with kept_random_state():
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
        if self._text is None:  # once: it takes longer than parsing
            self._text = str(self._parser.dump(self._config, skip_unset=False))
        return self._text

    def hash_of(self, *parts: Any) -> str:
        """Returns a digest of configuration parts, for a stage's inputs."""
        return config_hash(parts)


def _cells(attack: Namespace) -> list[Namespace]:
    """The thefts that an attack's ``budgets`` stand for: the attack itself if there are none."""
    if not attack.budgets:
        return [attack]
    if min(attack.budgets) < 1 or len(set(attack.budgets)) < len(attack.budgets):
        raise MisconfigurationException(
            f"The attack {attack.name!r} has budgets={attack.budgets}; give different numbers of queries, each at least 1."
        )
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


def check_names(what: str, names: list[str], taken: Collection[str]) -> None:
    """Raises a ``MisconfigurationException`` if names repeat, are taken, or could not be those of directories."""
    twice = sorted({name for name in names if names.count(name) > 1})
    reserved = sorted(set(taken) & set(names))
    odd = [name for name in names if not name.replace("-", "").replace("_", "").replace(".", "").isalnum()]
    if twice or reserved or odd:
        raise MisconfigurationException(
            f"{what} need names of their own made of letters, digits, '-', '_' and '.', got {names}"
            + (f"; reserved: {reserved}" if reserved else "")
            + (f"; twice: {twice}" if twice else "")
        )


def load_experiment(files: list[str | Path], overrides: list[str] | None = None) -> Experiment:
    """Reads experiment files and command-line overrides.

    Args:
        files: YAML files; later ones override earlier ones.
        overrides: Arguments like ``["--victim.trainer.max_epochs", "3"]``.

    Raises:
        MisconfigurationException: If a file is missing, unreadable, or says something the types do not allow.
    """
    check_files(files)
    parser = experiment_parser(exit_on_error=False)
    arguments = [part for file in files for part in ("--config", str(file))] + list(overrides or [])
    from jsonargparse import ArgumentError

    try:
        return Experiment(parser, parser.parse_args(arguments))
    except ArgumentError as error:
        raise MisconfigurationException(f"The experiment {', '.join(map(str, files))} is not valid: {error}") from error
