"""Experiment tracking: what is asked for on the command line, what may be told, and the tracker that tells nothing.

With ``--wandb``, `meadef run`, `demo` and `verify` log to Weights & Biases beside the CSV files. Where it goes is said by W&B's own
environment variables: ``WANDB_PROJECT`` (default ``meadef``) and ``WANDB_MODE`` (default ``offline``, which needs no account; upload
later with ``wandb sync``). Under ``wandb agent`` the default is ``online``.

The key is never told: not its fields, not its secret, not its file; only its commitment (see `public`). Two pictures of a report show
what a watermark sample looks like, and so name the key's classes: keep the W&B project private, or leave them out with
``--wandb_samples false``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from meadef_lightning.experiment.artifacts import is_rank_zero
from meadef_lightning.experiment.stage_directory import Stage

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from meadef_lightning.experiment.render import ReportFigure
    from meadef_lightning.experiment.report import Report
    from meadef_lightning.verification import Verdict
    from meadef_lightning.watermark import WatermarkKey

StageKind = Literal["train", "extract", "verify", "remove", "detect"]
Track = Callable[[Stage], AbstractContextManager[Sequence[Logger]]]
"""Follows a stage from entering to leaving it; gives the loggers of a training in it."""

SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""What ``wandb agent`` sets for the one run that it waits for."""

_PRIVATE = {"key", "keys", "salt", "api_key", "api_keys", "password"}
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")  # up to the last one: a password may hold another


def untracked(stage: Stage) -> AbstractContextManager[Sequence[Logger]]:
    """Follows nothing."""
    return nullcontext(())


class Tracker:
    """Tracks nothing: the default, and the interface of `WandbTracker`."""

    def stage(self, kind: StageKind, seed: int, key: WatermarkKey) -> Track:
        """Returns what follows a stage.

        Args:
            kind: What the stage does.
            seed: Its experiment's seed.
            key: The watermark key, of which only the commitment is told.
        """
        return untracked

    def report(self, report: Report, figures: Sequence[ReportFigure], directory: Path, key: WatermarkKey) -> None:
        """Tells the report of a whole experiment.

        Args:
            report: The report.
            figures: Its figures.
            directory: Where ``report.json`` and ``summary.csv`` are.
            key: The watermark key, of which only the commitment is told.
        """

    def verdict(self, suspect: str, verdict: Verdict, directory: Path, key: WatermarkKey) -> None:
        """Tells a single verdict.

        Args:
            suspect: The suspect's name.
            verdict: What was found.
            directory: Where ``evidence.json`` and the figures are.
            key: The watermark key, of which only the commitment is told.
        """


@dataclass(frozen=True)
class Tracking:
    """The options of tracking, by their names on the command line.

    Args:
        wandb: Whether to log to Weights & Biases.
        wandb_checkpoints: Whether the models' weights become artifacts.
        wandb_samples: Whether the pictures of watermark samples are logged, which name the key's classes.
    """

    wandb: bool = False
    wandb_checkpoints: bool = True
    wandb_samples: bool = True

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Adds the options to a command's parser."""
        parser.add_argument(
            "--wandb",
            action="store_true",
            help="Log to Weights & Biases, too: a run for every stage, grouped by experiment, and one for the report. WANDB_PROJECT "
            "names the project (default: meadef), WANDB_MODE says how (default: offline, without an account; upload with `wandb sync`).",
        )
        parser.add_argument(
            "--wandb_checkpoints", type=bool, default=True, help="Whether W&B gets the models' weights as artifacts."
        )
        parser.add_argument(
            "--wandb_samples",
            type=bool,
            default=True,
            help="Whether W&B gets the pictures of watermark samples and features. They name the key's classes: in a project that others "
            "can see, say false.",
        )

    @classmethod
    def pop(cls, config: Namespace) -> Tracking:
        """Takes the options out of what a command's parser parsed."""
        return cls(**{field.name: config.pop(field.name) for field in dataclasses.fields(cls)})

    def tracker(self, output: Path, experiment: str, config: Mapping[str, Any], many: bool = False) -> Tracker:
        """Makes the tracker; one that does nothing where W&B was not asked for, is missing, or on other ranks than zero.

        Args:
            output: Directory of the results; W&B's files go into ``wandb`` in it.
            experiment: The experiment's name, which groups its runs.
            config: Its whole configuration as plain values; what is secret in it is left out.
            many: Whether there are several seeds, to be named apart.
        """
        if not self.wandb or not is_rank_zero() or os.environ.get("WANDB_MODE") == "disabled":
            return Tracker()
        try:
            from wandb import init  # noqa: F401  a directory called wandb can be imported, too, but has no init
        except ImportError:
            rank_zero_warn(
                "wandb is not installed, so --wandb does nothing: metrics go to CSV files only. Get it with `pip install wandb`."
            )
            return Tracker()
        from meadef_lightning.experiment.wandb_tracker import WandbTracker

        return WandbTracker(output, experiment, public(config), many, self.wandb_checkpoints, self.wandb_samples)


def public(config: Any) -> Any:
    """Returns a configuration without what is secret, as may be told to others.

    Left out are entries named ``key``, ``salt``, ``api_key``, ``password`` (or their plural), everything with ``secret`` in its name,
    written-out watermark keys, and user names and passwords in URLs. What batches call their parts (``input_key``) stays.

    Args:
        config: Mappings, lists and values, nested at will.
    """
    if isinstance(config, Mapping):
        return {
            name: public(value)
            for name, value in config.items()
            if not (str(name).lower() in _PRIVATE or "secret" in str(name).lower() or _is_key(value))
        }
    if isinstance(config, (list, tuple)):
        return [public(value) for value in config if not _is_key(value)]
    return _CREDENTIALS.sub("", config) if isinstance(config, str) else config


def _is_key(value: Any) -> bool:
    return isinstance(value, Mapping) and str(value.get("class_path", "")).rpartition(".")[2].startswith("WatermarkKey")


def default_output(experiment: str) -> Path:
    """Returns the directory of results: ``runs/EXPERIMENT``, and under ``wandb agent`` one of its own for every run."""
    sweep, run = (os.environ.get(name, "") for name in SWEEP_VARIABLES[:2])
    return Path("runs", experiment, sweep, run) if sweep and run else Path("runs", experiment)
