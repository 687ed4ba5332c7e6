"""The stages of an experiment, each a function from a specification to an artifact directory.

A directory holds ``config.yaml`` (the model, so that ``meadef verify --suspect DIRECTORY`` can load it), ``metrics.csv``,
``checkpoints/model.ckpt`` (weights only), ``result.json`` (the stage's numbers) and ``stage.json`` (its record). A finished
stage is read, an interrupted one goes on from its last epoch. Where several processes run the experiment, all of them train and
rank zero writes; see :mod:`meadef_lightning.processes`.
"""

from __future__ import annotations

import csv
import io
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from meadef_lightning import processes
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import (
    Stage,
    file_sha256,
    is_rank_zero,
    make_directory,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from meadef_lightning.experiment.spec import AttackSpec, Model, TrainerOptions
from meadef_lightning.experiment.tracking import Track, untracked
from meadef_lightning.oracle import Oracle, QueryLedger
from meadef_lightning.quiet import quiet
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.encoder import Encoder

MODEL = Path("checkpoints") / "model.ckpt"
LAST = Path("checkpoints") / "last.ckpt"
RESULT = "result.json"
AnyModel = TypeVar("AnyModel", Classifier, Encoder, Model)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def derived_seed(seed: int, *names: str) -> int:
    """Returns a seed for one stage: the same for the same names, different for others, in ``[0, 2³¹)``."""
    return zlib.crc32("/".join([str(seed), *names]).encode()) >> 1


class EpochSeed(Callback):
    """Seeds torch anew at every epoch, so that an epoch's dropout and augmentation do not depend on how the run got there.

    With it a run that was interrupted ends in the very weights of one that was not.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds the epoch, on each process differently."""
        torch.manual_seed(derived_seed(self.seed, f"epoch {trainer.current_epoch}", f"rank {trainer.global_rank}"))


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints in the directory where they stay, so that a killed process leaves the old one or the new one.

    Lightning writes them to the temporary directory and moves them, which copies where that is another file system: a run that is
    killed meanwhile could not go on from half a file. Readable by their owner only, as before: they hold the watermark's samples.
    Weights alone come without the Trainer's counters, which would tell two trainings to the same weights apart by their interruptions.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Replaces the file in one step; raises ``OutputError`` where that is impossible."""
        buffer = io.BytesIO()
        left_out = set() if "optimizer_states" in checkpoint else {"loops"}
        torch.save({name: value for name, value in checkpoint.items() if name not in left_out}, buffer)
        make_directory(Path(path).parent)
        write_bytes_atomic(path, buffer.getvalue(), mode=0o600)


def row_identity(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """Returns what a row of metrics tells: its step and its columns. An epoch that is repeated after an interruption tells it again."""
    return int(row["step"]), frozenset(row) - {"step"}


def logged_rows(logs: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of metrics that all attempts at a stage logged, in order, empty columns left out."""
    attempts = {int(path.parent.name.partition("_")[2]): path for path in logs.glob("attempt_*/metrics.csv")}
    for number in sorted(attempts):
        with attempts[number].open(newline="") as file:
            for line in csv.DictReader(file):
                row = {name: value for name, value in line.items() if value}
                if "step" in row:
                    yield row


def join_metrics(logs: Path) -> str:
    """Joins the metrics of all attempts at a stage, in order, into one CSV text with all their columns; none is told twice."""
    rows = list({row_identity(row): row for row in logged_rows(logs)}.values())
    text = io.StringIO()
    columns = sorted({name for row in rows for name in row}, key=lambda name: (name not in ("epoch", "step"), name))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def last_metrics(logs: Path) -> dict[str, float]:
    """The last finite value of every metric that all attempts at a stage logged."""
    told = ((k, float(v)) for row in logged_rows(logs) for k, v in row.items() if k not in ("epoch", "step"))
    return {name: value for name, value in told if math.isfinite(value)}


def fit(
    stage: Stage,
    model: Model,
    data: LightningDataModule,
    options: TrainerOptions,
    seed: int,
    model_config: Mapping[str, Any],
    loggers: Sequence[Logger] = (),
) -> dict[str, float]:
    """Trains a model in a stage's directory, or goes on where an interrupted attempt stopped, and tests a classifier.

    Args:
        stage: The running stage.
        model: What to train.
        data: What to train it on.
        options: Arguments of the Trainer.
        seed: Seed of everything random in the training.
        model_config: ``class_path`` and ``init_args`` of the model, for ``config.yaml``.
        loggers: Where metrics go besides ``metrics.csv``.

    Returns:
        The metrics of the last epoch and the test.

    Raises:
        MisconfigurationException: If ``options`` holds what the pipeline sets itself.
    """
    taken = {"logger", "default_root_dir", "callbacks", "enable_checkpointing"} & set(options)
    if taken:
        raise MisconfigurationException(
            f"The pipeline sets the Trainer's {sorted(taken)} itself; leave them out of `trainer`."
        )
    directory = stage.directory
    resume = directory / LAST

    def prepare() -> tuple[int, bool]:
        write_text_atomic(directory / "config.yaml", yaml.safe_dump({"model": dict(model_config)}, sort_keys=False))
        return len(list((directory / "logs").glob("attempt_*"))), resume.exists()

    attempts, resuming = processes.first(prepare)
    options = {"enable_model_summary": False, "log_every_n_steps": 10, **options}
    if options.get("strategy") == processes.FSDP2:
        # whole weights in one file, since every other stage reads them in one process
        options["strategy"] = ModelParallelStrategy(processes.count(), 1, save_distributed_checkpoint=False)
    seed_everything(seed, workers=True, verbose=False)
    with quiet():
        trainer = Trainer(
            **options,
            default_root_dir=directory,
            logger=[
                # no version, which would stand in the progress bar; written at once, so that a killed run has lost nothing
                CSVLogger(directory / "logs", name=f"attempt_{attempts}", version="", flush_logs_every_n_steps=1),
                *loggers,
            ],
            # the latest epoch under one name; `save_last` alone saves nothing any more where no best one is kept
            callbacks=[
                EpochSeed(seed),
                ModelCheckpoint(resume.parent, resume.stem, enable_version_counter=False, save_on_train_epoch_end=True),
            ],
        )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that was asked for
            trainer.strategy.checkpoint_io = AtomicCheckpoints()
        trainer.fit(model, datamodule=data, ckpt_path=resume if resuming else None, weights_only=True)
        # the log first: an attempt that was killed after its last epoch leaves nothing to train, and so nothing to call back
        metrics = last_metrics(directory / "logs")
        metrics.update({name: float(value) for name, value in trainer.callback_metrics.items()})
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.save_checkpoint(directory / MODEL, weights_only=True)
        if isinstance(model, Classifier):
            metrics.update({name: float(value) for name, value in _tested(trainer, model, data, options).items()})
    if is_rank_zero():
        write_text_atomic(directory / "metrics.csv", join_metrics(directory / "logs"))
    return metrics


def _tested(
    trainer: Trainer, model: Classifier, data: LightningDataModule, options: TrainerOptions
) -> Mapping[str, float]:
    """Tests a trained classifier, in one process: among several, some images would count twice, so that each gets as many."""
    if processes.count() == 1 or isinstance(trainer.strategy, ModelParallelStrategy):  # whose weights are spread
        return trainer.test(model, datamodule=data, verbose=False)[0]

    def test() -> Mapping[str, float]:
        here = {**options, **processes.one_process(trainer.strategy.root_device)}
        tester = Trainer(**here, logger=False, enable_checkpointing=False)
        # its loader alone: before Lightning prepares a data module it waits for all processes, even if it trains in one
        metrics = tester.test(model, data.test_dataloader(), verbose=False)[0]
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, trainer.global_step)
        return metrics

    return processes.first(test)


def check_processes(options: TrainerOptions) -> None:
    """Raises a ``MisconfigurationException`` if a stage's Trainer would not use exactly the processes that run the experiment."""
    wanted = processes.bare_trainer(options).world_size
    if wanted != processes.count():
        raise MisconfigurationException(
            f"This stage's Trainer wants {wanted} process(es), but {processes.count()} run the experiment, as the victim's Trainer wants "
            "them. Set devices, num_nodes and strategy for all stages at once: --trainer.devices and so on."
        )


def read_weights(model: AnyModule, checkpoint: Path) -> AnyModule:
    """Loads a checkpoint's weights into a built module, without unpickling anything but tensors.

    Args:
        model: The module.
        checkpoint: A Lightning checkpoint, or a bare state dict.

    Returns:
        The module in eval mode.

    Raises:
        MisconfigurationException: If the file is missing, damaged, unsafe, or of another architecture.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MisconfigurationException(
            f"There is no checkpoint {checkpoint}; check the path, or delete its stage's directory to run it again."
        ) from error
    except Exception as error:  # torch raises many types for a broken or unsafe file
        raise MisconfigurationException(
            f"{checkpoint} is not a checkpoint that can be read safely ({type(error).__name__}): it is damaged, or holds more than "
            "weights. Delete its stage's directory to run it again, or ask for the state_dict alone."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise MisconfigurationException(
            f"The weights in {checkpoint} do not fit the model of its configuration: {str(error)[:500]}"
        ) from error
    return model.eval()


def build_network(model: Model, data: SplitDataModule) -> None:
    """Builds the network of a classifier or an encoder for the data."""
    if isinstance(model, Encoder):
        model.build_network(data.image_shape[0])
    else:
        model.build_network(data.num_classes, data.image_shape[0])


def load_weights(model: AnyModel, data: SplitDataModule, checkpoint: Path) -> AnyModel:
    """Builds a model's network for the data and loads its weights; see :func:`read_weights`."""
    build_network(model, data)
    read_weights(model, checkpoint)
    return model


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
