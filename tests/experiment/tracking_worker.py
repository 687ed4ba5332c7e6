"""A training that W&B follows, and that can die in the middle of an epoch: in the test's process, or in its own."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from small import QUIET, SIZES

import meadef_lightning.cli
import meadef_lightning.experiment.pipeline  # noqa: F401
from meadef_lightning.data import DigitsDataModule
from meadef_lightning.experiment.stages import train_stage
from meadef_lightning.experiment.tracking import Tracking
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import DigitsCNN
from meadef_lightning.watermark import WatermarkKey

KEY = WatermarkKey.draw(10, "resume")
OPTIONS = {**QUIET, "max_epochs": 3, "log_every_n_steps": 1, "limit_val_batches": 1}


class Mortal(SupervisedVictim):
    """Logs every step, and dies in the third batch of the second epoch, if it is told how."""

    die = None

    def training_step(self, batch):
        if self.die is not None and self.trainer.current_epoch == 1 and self.trainer.fit_loop.batch_idx == 2:
            self.die()
        loss = super().training_step(batch)
        self.log("step_loss", loss)
        return loss


def train(output, die=None, wandb=True):
    def build():
        model = Mortal(partial(DigitsCNN, width=4, hidden=16))
        model.die = die
        return model, DigitsDataModule(batch_size=24, **SIZES), OPTIONS

    tracker = Tracking(wandb=wandb).tracker(output, "resume", {})
    train_stage(output / "victim", "victim", {}, build, 0, {"class_path": "x"}, tracker.stage("train", 0, KEY))


if __name__ == "__main__":
    if "wandb" in sys.modules:
        sys.exit("wandb was imported before anybody asked for it")
    train(Path(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL))
