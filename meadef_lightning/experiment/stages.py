"""The stages of an experiment, each a function from a specification to an artifact directory.

A directory holds ``config.yaml`` (the model, so that ``meadef verify --suspect DIRECTORY`` can load it), ``metrics.csv``,
``checkpoints/model.ckpt`` (weights only), ``result.json`` (the stage's numbers) and ``stage.json`` (its record). A finished
stage is read, an interrupted one goes on from its last epoch. Where several processes run the experiment, all of them train and
rank zero writes; see :mod:`meadef_lightning.processes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from meadef_lightning import processes
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import file_sha256, read_json, write_json_atomic
from meadef_lightning.experiment.spec import AttackSpec, Model, TrainerOptions
from meadef_lightning.experiment.stage_directory import Stage
from meadef_lightning.experiment.tracking import Track, untracked
from meadef_lightning.experiment.training import LAST, check_processes, fit
from meadef_lightning.experiment.weights import MODEL
from meadef_lightning.oracle import Oracle, QueryLedger

RESULT = "result.json"
"""A stage's numbers, in its directory."""


def train_stage(
    directory: Path,
    name: str,
    inputs: Mapping[str, str],
    build: Callable[[], tuple[Model, LightningDataModule, TrainerOptions]],
    seed: int,
    model_config: Mapping[str, Any],
    track: Track = untracked,
) -> dict[str, Any]:
    """Trains one model of the owner's or an independent party's.

    Args:
        directory: The stage's directory.
        name: The stage's name.
        inputs: Digests of what the result depends on.
        build: Makes model, data and Trainer options; called only if there is something to do.
        seed: Seed of the training.
        model_config: For ``config.yaml``.
        track: Follows the stage.

    Returns:
        What ``result.json`` holds: ``{"metrics": …, "sha256": …}``.
    """
    with Stage(directory, name, inputs) as stage, track(stage) as loggers:
        if not stage.done:
            model, data, options = build()
            check_processes(options)
            metrics = fit(stage, model, data, options, seed, model_config, loggers)
            _write_result(stage, lambda: {"metrics": metrics})
        return _result(directory)


def extraction_stage(
    directory: Path,
    attack: AttackSpec,
    inputs: Mapping[str, str],
    victim: Callable[[], Model],
    data: SplitDataModule,
    seed: int,
    model_config: Mapping[str, Any],
    track: Track = untracked,
) -> dict[str, Any]:
    """Steals the victim through the oracle.

    Answers that were paid for are kept in ``queries.sqlite``: an interrupted theft goes on without asking again. The victim answers
    on the Trainer's device. Of several processes rank zero asks for all, or, where an attack asks during the training, each of one
    machine asks its own share through this one ledger: every input is paid for once, and the budget holds for all together.

    Args:
        directory: The stage's directory.
        attack: The theft.
        inputs: Digests of what the result depends on.
        victim: Loads the victim; called only if there is something to do.
        data: The data splits; the attack sees the attacker's only.
        seed: Seed of the theft.
        model_config: The student's configuration, for ``config.yaml``.
        track: Follows the stage.

    Returns:
        What ``result.json`` holds: ``{"metrics": …, "labels": …, "queries": …, "sha256": …}``.
    """
    with Stage(directory, attack.name, inputs) as stage, track(stage) as loggers:
        if not stage.done:
            trainer = processes.bare_trainer(attack.trainer)
            # other machines cannot share the file, see QueryLedger, and nothing is asked there
            path = directory / "queries.sqlite" if trainer.node_rank == 0 else None
            # one after the other: SQLite lets nobody in while the file is being made
            ledger = processes.in_turn(lambda: QueryLedger(path, budget=attack.budget))
            device = trainer.strategy.root_device
            oracle = Oracle(victim(), attack.policy, ledger, device=device)
            queries = attack.queries(oracle, data)

            def steal(options: TrainerOptions) -> dict[str, float]:
                return fit(stage, attack.student, queries, options, seed, model_config, loggers)

            if getattr(queries, "one_process", False) and processes.count() > 1:
                # prepared already, and Lightning would wait for all processes
                queries.prepare_data = None  # type: ignore[method-assign, assignment]
                metrics = processes.first(lambda: steal({**attack.trainer, **processes.one_process(device)}))
            else:
                check_processes(attack.trainer)
                metrics = steal(attack.trainer)
            _write_result(
                stage, lambda: {"metrics": metrics, "labels": oracle.labels, "queries": ledger.totals().distinct}
            )
            ledger.close()  # one file again, fit to be copied
        return _result(directory)


def _write_result(stage: Stage, values: Callable[[], Mapping[str, Any]]) -> None:
    def write() -> None:
        result = {**values(), "sha256": file_sha256(stage.directory / MODEL)}
        write_json_atomic(stage.directory / RESULT, result)
        # a full checkpoint holds the watermark's source samples: not to be left lying about; until now a killed run went on from it
        (stage.directory / LAST).unlink(missing_ok=True)

    processes.first(write)


def _result(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = processes.first(lambda: read_json(directory / RESULT))
    return result
