"""One training of a stage: it ends in the same weights however often it was interrupted, and leaves no half-written file."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from typing_extensions import override

from meadef_lightning import processes
from meadef_lightning.experiment.artifacts import is_rank_zero, make_directory, write_bytes_atomic, write_text_atomic
from meadef_lightning.experiment.metrics_log import join_metrics, last_metrics
from meadef_lightning.experiment.spec import Model, TrainerOptions
from meadef_lightning.experiment.stage_directory import Stage
from meadef_lightning.experiment.weights import MODEL
from meadef_lightning.quiet import quiet
from meadef_lightning.victims.classifier import Classifier

LAST = Path("checkpoints") / "last.ckpt"
"""Where an interrupted training goes on from, in a stage's directory."""


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
        if trainer.received_sigterm:
            raise SIGTERMException  # during the last batch, after which Lightning does not look for it
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
