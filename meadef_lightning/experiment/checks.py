"""What is wrong with an experiment, said before anything is trained: a mistake in its last stage must not show after hours.

The stages check their own arguments, too. Here they are made to do so beforehand, and stands what only the whole can tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.detection.base import ModelDetector
from meadef_lightning.experiment.messages import allowed, suggestion
from meadef_lightning.experiment.spec import DetectionSpec, ExperimentSpec, RemovalSpec
from meadef_lightning.oracle import Oracle, QueryLedger, Soft
from meadef_lightning.random_state import kept_random_state
from meadef_lightning.verification import VerificationDataModule
from meadef_lightning.verification.verdict import check_plan
from meadef_lightning.watermark import WatermarkKey

_TRAINER_OPTIONS = tuple(inspect.signature(Trainer.__init__).parameters)[1:]


def check_files(files: Sequence[str | Path], whole: bool = False) -> None:
    """Checks that experiment files can be read and are no other files, before they are parsed together.

    Args:
        files: YAML files, to be merged in this order.
        whole: Whether something else makes an experiment of them.

    Raises:
        MisconfigurationException: If one is missing or no YAML mapping, is a grid, or if none of them is a whole experiment; the
            message names it.
    """
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MisconfigurationException(
                f"There is no experiment file {file}; see experiments/ for those that exist."
            ) from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).replace("<unicode string>", str(file)).split())
            raise MisconfigurationException(f"The experiment file {file} cannot be read as YAML: {reason}") from error
        if not isinstance(content, Mapping) or not content:
            raise MisconfigurationException(
                f"The experiment file {file} holds {'nothing' if content is None else type(content).__name__}; it must be a mapping of "
                "experiment, data, victim, watermark and so on, as in experiments/digits/supervised.yaml."
            )
        if "grid" in content and "axes" in content:
            raise MisconfigurationException(f"{file} is a grid of experiments; run it with: meadef grid {file}")
        whole |= "experiment" in content
    if files and not whole:
        raise MisconfigurationException(
            f"{' and '.join(map(str, files))} can only go on top of an experiment: give that first, e.g. "
            f"experiments/digits/supervised.yaml {' '.join(map(str, files))}"
        )


def check_experiment(spec: ExperimentSpec) -> None:
    """Checks what the specification alone can tell.

    Raises:
        MisconfigurationException: If the name leads out of the directory of results, a Trainer is given what it does not take or is to
            train nothing, a theft may ask nothing, or a removal or search acts on nothing or with a share out of range.
    """
    path = PurePosixPath(spec.experiment.replace("\\", "/"))
    if not spec.experiment.strip() or path.is_absolute() or ".." in path.parts:
        raise MisconfigurationException(
            f"experiment={spec.experiment!r} is the name of a directory below runs/: give one like digits/supervised, without '..'."
        )
    trainers = {"victim": spec.victim.trainer, "patched": spec.patched.trainer}
    trainers |= {f"extraction {attack.name!r}": attack.trainer for attack in spec.extraction}
    trainers |= {f"independent {control.name!r}": control.trainer for control in spec.independent or []}
    trainers |= {f"other_references {other.name!r}": other.trainer for other in spec.other_references}
    for what, options in trainers.items():
        _check_trainer(what, options)
    for attack in spec.extraction:
        if attack.budget is not None and attack.budget < 1:
            raise MisconfigurationException(
                f"extraction {attack.name!r} has budget={attack.budget}, with which it could ask nothing; give at least 1, or null for no limit."
            )
    for kind, acting in (("removal", spec.removal), ("detection", spec.detection)):
        for item in acting:
            _check_acting(kind, item)
    for search in spec.detection:
        controls = sorted(set(search.of).intersection(spec.clean_names))
        if controls and isinstance(search.method, ModelDetector):
            raise MisconfigurationException(
                f"detection {search.name!r} acts on {controls}: a search of models takes the clean ones for its controls anyway. Leave them "
                "out of its `of`; only detectors of inputs name them."
            )


def check_stages(spec: ExperimentSpec, key: WatermarkKey, data: SplitDataModule) -> None:
    """Makes what the stages will be made of, so that it checks its arguments, and throws it away.

    Args:
        spec: Newly built objects.
        key: The key.
        data: The data splits, set up.

    Raises:
        MisconfigurationException: If the verification, the watermark's callback, or a theft or its policy does not take its arguments; the
            message names which.
    """
    numbers = asdict(spec.verification)
    with kept_random_state():
        with _named("verification"):
            check_plan(numbers.pop("alpha"), None)
            VerificationDataModule(key, data, **numbers)
        with _named("watermark.callback"):
            spec.watermark.callback(key)
        for attack in spec.extraction:
            with _named(f"extraction {attack.name!r}"):
                policy = Soft() if attack.policy is None else attack.policy
                if policy.kind != "feature":
                    policy(torch.zeros(1, data.num_classes))
                attack.queries(Oracle(nn.Identity(), policy, QueryLedger(budget=attack.budget)), data)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Says whose arguments an error is about."""
    try:
        yield
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise MisconfigurationException(f"{what}: {error}") from error


def _check_trainer(what: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _TRAINER_OPTIONS:
            raise MisconfigurationException(
                f"The Trainer of {what} takes no {name!r}{suggestion(name, _TRAINER_OPTIONS)}{allowed(_TRAINER_OPTIONS, 'It takes')}"
            )
    for name, least in (("max_epochs", 1), ("max_steps", 1)):
        value = options.get(name)
        if isinstance(value, int) and value < least and value != -1:
            raise MisconfigurationException(
                f"{what} has {name}={value}, which trains nothing; give at least {least}, or -1 for no limit."
            )


def _check_acting(kind: str, item: RemovalSpec | DetectionSpec) -> None:
    name = f"{kind} {item.name!r}"
    if not item.of or len(set(item.of)) < len(item.of):
        raise MisconfigurationException(
            f"{name} acts on {item.of}: name at least one model, and each once, e.g. of: [victim]. To leave it out, delete the entry."
        )
    if not 0 < item.share <= 1:
        raise MisconfigurationException(
            f"{name} has share={item.share}, a share of the attacker's images: above 0 and at most 1."
        )
    if isinstance(item, RemovalSpec) and not 0 <= item.points <= 1:
        raise MisconfigurationException(
            f"{name} has points={item.points}, a share of accuracy: from 0 to 1, e.g. 0.05."
        )
