"""A stage that broke off goes on in the same W&B run, with nothing lost and nothing doubled."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tracking_worker
from tracking_worker import train
from wandb_records import offline_runs

from meadef_lightning.experiment.metrics_log import join_metrics
from meadef_lightning.experiment.wandb_history import History


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Rows of a training that nothing happens to, and its CSV file."""
    output = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        train(output)
    (run,) = offline_runs(output)
    rows = run.rows()
    assert len(rows) == 3 * 5 + 2 * 3 + 1, "a row for every step, two for every epoch, one for the test"
    return rows, (output / "victim" / "metrics.csv").read_text()


def interrupt():
    raise KeyboardInterrupt


def break_off(how, output, wandb=True):
    if how == "kill":
        worker = [sys.executable, tracking_worker.__file__, str(output)]
        # not W&B's helper process of this test, which would survive
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        died = subprocess.run(worker, capture_output=True, text=True, env=environment)
        assert died.returncode == -signal.SIGKILL, died.stderr
    else:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(output, interrupt, wandb)


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_resumed_stage_goes_on_in_the_same_run(how, tmp_path, straight):
    break_off(how, tmp_path)
    told = json.loads((tmp_path / "victim" / "wandb.json").read_text())
    assert told["told"] == ""
    assert [run.directory.name[-8:] for run in offline_runs(tmp_path)] == [told["id"]]
    train(tmp_path)
    # W&B's file of a killed process ends anywhere; the one that replaces it has everything
    (run,) = offline_runs(tmp_path)
    assert run.id == told["id"]
    assert run.resume
    assert run.rows() == straight[0]
    assert (tmp_path / "victim" / "metrics.csv").read_text() == straight[1]
    assert list(run.artifacts) == ["resume-victim-model"]
    train(tmp_path)
    assert [run.directory for run in offline_runs(tmp_path)] == [run.directory], "a finished stage was told again"


def test_online_only_rows_that_never_arrived_are_sent():
    class Online:
        """A resumed run that has two rows."""

        step = 2

        def __init__(self):
            self.sent = []

        def log(self, values, step):
            self.sent.append((step, values))

    run = Online()
    earlier = [{"step": str(step), "loss": "0.5"} for step in (0, 1, 2)]
    history = History(run, earlier)
    history.metrics({"loss": 0.5}, 2)  # an epoch that is repeated
    history.metrics({"loss": 0.4}, 3)
    assert run.sent == [(2, {"loss": 0.5, "trainer/global_step": 2}), (3, {"loss": 0.4, "trainer/global_step": 3})]


def test_what_an_attempt_without_wandb_logged_is_told_by_the_next(tmp_path, straight):
    break_off("interrupt", tmp_path, wandb=False)
    train(tmp_path)
    (run,) = offline_runs(tmp_path)
    assert run.rows() == straight[0]


def test_stage_begun_anew_is_another_run(tmp_path):
    """Nothing of the first attempt is left but its id, so that its run must not get the second attempt's rows."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "wandb.json").write_text('{"id": "old", "told": ""}')
    train(tmp_path)
    (run,) = offline_runs(tmp_path)
    assert run.id != "old"


def test_a_damaged_record_costs_a_new_run_only(tmp_path, straight):
    break_off("interrupt", tmp_path)
    (tmp_path / "victim" / "wandb.json").write_text('{"id": "*", "told": ""}')
    train(tmp_path)
    first, second = offline_runs(tmp_path)
    assert first.id != second.id
    assert second.rows() == straight[0]


def test_joined_metrics_tell_a_repeated_epoch_once(tmp_path):
    for attempt, text in (
        (0, "epoch,loss,step\n0,1.5,4\n1,1.0,9\n"),
        (1, "acc,epoch,loss,step\n,1,0.9,9\n0.5,1,,9\n"),
        (10, "step\n"),
    ):
        (tmp_path / f"attempt_{attempt}").mkdir()
        (tmp_path / f"attempt_{attempt}" / "metrics.csv").write_text(text)
    assert join_metrics(tmp_path) == "epoch,step,acc,loss\n0,4,,1.5\n1,9,,0.9\n1,9,0.5,\n"
