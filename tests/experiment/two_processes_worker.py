"""One of two processes that run an experiment; started by test_two_processes.py.

``killed EXPERIMENT OUTPUT``: both are started as torchrun would, and one kills itself in the middle of the victim's training.
``finished EXPERIMENT FOLDER``: starts the other itself, as ``meadef run`` does with two devices; goes on in FOLDER/killed, runs the same
undisturbed in FOLDER/straight and with sharded weights in FOLDER/fsdp2, and lets one process fail in FOLDER/failed.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from meadef_lightning.cli import main
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run
from meadef_lightning.processes import rank
from meadef_lightning.victims import SupervisedVictim

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
whole_step = SupervisedVictim.training_step


def on_rank_one(action: Callable[[], None], watermarked: bool, epoch: int) -> None:
    """Does something on the second process before a certain step of a training."""

    @functools.wraps(whole_step)
    def step(self, batch):
        if rank() == 1 and bool(self.watermark) == watermarked and self.trainer.current_epoch == epoch:
            action()
        return whole_step(self, batch)

    SupervisedVictim.training_step = step


def fail() -> None:
    raise ValueError("a reason of its own")


def finished(file: str, folder: Path) -> None:
    main(["run", file, *TWO, "--output", str(folder / "killed")])
    run(load_experiment([file], TWO), folder / "straight")
    sharded = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    run(load_experiment([folder / "sharded.yaml"], sharded), folder / "fsdp2")
    on_rank_one(fail, watermarked=False, epoch=1)
    try:
        run(load_experiment([file], TWO), folder / "failed")
    except Exception as error:
        told = {"type": type(error).__name__, "message": str(error)}
        (folder / f"failed.{rank_before}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    action, file, folder = sys.argv[1:4]
    rank_before = int(os.environ.get("LOCAL_RANK", "0"))
    if action == "killed":
        on_rank_one(lambda: os.kill(os.getpid(), signal.SIGKILL), watermarked=True, epoch=1)
        main(["run", file, "--output", folder])
    else:
        finished(file, Path(folder))
