"""Runs an experiment again and again, killed (SIGKILL) somewhere else each time, and at last to its end. No timing is involved.

``python kill_worker.py EXPERIMENT.yaml STRAIGHT KILLED`` first lets a run fill STRAIGHT that nothing happens to. The others are forks of it, so
that all is imported once. What each kill leaves in KILLED is printed as a line of JSON: where the run was killed, and the states of its stages.
"""

import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.experiment import stages
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run
from meadef_lightning.extraction import Student
from meadef_lightning.oracle import Oracle
from meadef_lightning.victims import SupervisedVictim

fitting = []
"""Names of the stages that this process has trained, the present one last."""


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def told(line):
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def wrapped(owner, name, before=lambda *_: None, after=lambda *_: None):
    """Puts something before and after a function."""
    function = getattr(owner, name)

    @functools.wraps(function)  # Lightning reads signatures
    def wrapper(*args, **kwargs):
        before(*args)
        result = function(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapper)


def nth(count, matches, action=die):
    """Acts at the ``count``-th call whose arguments match."""
    seen = []

    def act(*args):
        if matches(*args):
            seen.append(args)
            if len(seen) == count:
                action()

    return act


def in_step(module, stage, epoch, batch, action=die):
    def here(self, *_):
        trainer = self.trainer
        return fitting[-1:] == [stage] and (trainer.current_epoch, trainer.fit_loop.batch_idx) == (epoch, batch)

    return lambda: wrapped(module, "training_step", nth(1, here, action))


def replacing(file, when, count=1):
    """Before or after the ``count``-th time that a file is put in its place."""
    return lambda: wrapped(os, "replace", **{when: nth(count, lambda _, target: str(target).endswith(file))})


def refused_then_die(again):
    """What a second run in the same directory says, before the first one is killed."""
    try:
        again()
    except MisconfigurationException as stopped:
        told({"refused": str(stopped)})
    die()


def points(again=None):
    """Where runs are killed, in the order of the chain; ``again`` runs the experiment."""
    return {
        "key": replacing("/watermark.key.json", "before"),
        "victim, in a batch": in_step(SupervisedVictim, "victim", 2, 1, lambda: refused_then_die(again)),
        "victim, result written": replacing("/victim/result.json", "after"),
        "clean, checkpoint of the second epoch": replacing("/clean/checkpoints/last.ckpt", "before", 2),
        "clean, in the test": lambda: wrapped(SupervisedVictim, "test_step", nth(1, lambda *_: fitting[-1] == "clean")),
        "theft, round kept": replacing("/theft/queries.sqlite.rounds.pt", "after"),
        "theft, answers not booked": lambda: wrapped(Oracle, "_answer", after=nth(1, lambda *_: True)),
        "theft, in a batch": in_step(Student, "theft", 1, 1),
        "verify-theft, evidence written": replacing("/verify-theft/evidence.json", "after"),
        "removal, weights written": replacing("/theft.fine-tuning/checkpoints/model.ckpt", "after"),
        "detection, result not written": replacing("/search-lof-theft/result.json", "before"),
        "report, page written": replacing("/report.html", "after"),
    }


def forked(action):
    """Runs something in a process of its own; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # no clean-up of what belongs to the parent
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


if __name__ == "__main__":
    experiment = load_experiment([Path(sys.argv[1])])
    experiment.yaml()
    straight, killed = map(Path, sys.argv[2:4])
    run(experiment, straight)  # here, so that the forks find everything imported
    wrapped(stages, "fit", lambda stage, *_: fitting.append(stage.directory.name))
    again = functools.partial(run, experiment, killed)
    for point, arm in points(again).items():
        ended = forked(lambda arm=arm: (arm(), again()))
        states = {path.parent.name: json.loads(path.read_text())["status"] for path in killed.glob("*/stage.json")}
        told({"point": point, "signal": ended, "states": states})
    sys.exit(-forked(again))
