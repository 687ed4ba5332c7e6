"""The configuration of ``meadef fit`` beside its results, with any logger and any number of runs in one directory."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from meadef_lightning.experiment.tracking import public


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's own directory, and tells W&B the whole configuration without its secrets.

    Lightning's own callback writes it into ``save_dir``, which all runs of a ``WandbLogger`` share: the second run would stop at
    the first one's file.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the configuration once."""
        self.save_to_log_dir = not isinstance(trainer.logger, WandbLogger)
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells W&B, on rank zero."""
        for logger in trainer.loggers:
            if not isinstance(logger, WandbLogger) or getattr(logger.experiment, "disabled", False):
                continue
            run = logger.experiment
            if logger is trainer.logger:
                self.parser.save(
                    self.config, Path(run.dir).parent / self.config_filename, skip_unset=False, overwrite=True
                )
            run.config.update(public(self.config.as_dict()), allow_val_change=True)
