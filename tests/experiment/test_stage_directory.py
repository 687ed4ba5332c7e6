"""Stages are filled once: skipped when done, resumed when interrupted, refused when made from something else."""

import errno
import json
import signal
from pathlib import Path

import pytest
from failing_files import raiser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from meadef_lightning.experiment import artifacts
from meadef_lightning.experiment.artifacts import OutputError
from meadef_lightning.experiment.stage_directory import Stage, StageRecord


def record_of(directory):
    return json.loads((directory / "stage.json").read_text())


def test_finished_stage_is_skipped(tmp_path):
    directory = tmp_path / "runs" / "victim"
    with Stage(directory, "victim", {"config": "1"}) as stage:
        assert not stage.done
        assert not stage.resumed
        assert record_of(directory) == {
            "name": "victim",
            "status": "running",
            "inputs": {"config": "1"},
            "seconds": 0.0,
            "error": None,
        }
        (stage.directory / "metrics.csv").write_text("x")
    first = record_of(directory)
    assert first["status"] == "done"
    assert first["seconds"] > 0
    with Stage(directory, "victim", {"config": "1"}) as stage:
        assert stage.done
        assert not stage.resumed
    assert record_of(directory) == first


def test_error_while_reading_a_finished_stage_leaves_it_finished(tmp_path):
    with Stage(tmp_path, "victim", {}):
        pass
    with pytest.raises(RuntimeError, match="reader"), Stage(tmp_path, "victim", {}):
        raise RuntimeError("reader")
    assert record_of(tmp_path)["status"] == "done"


def test_other_inputs_are_refused_and_named(tmp_path):
    with Stage(tmp_path, "victim", {"config": "1", "data": "2", "old": "3"}):
        pass
    before = record_of(tmp_path)
    with (
        pytest.raises(MisconfigurationException) as caught,
        Stage(tmp_path, "victim", {"config": "9", "data": "2", "key": "4"}),
    ):
        pytest.fail("the body must not run")
    message = str(caught.value)
    assert "('config' differs, 'key' is new, 'old' is gone)" in message
    assert "--output" in message
    assert f"delete {tmp_path}" in message
    assert "'data'" not in message
    with (
        pytest.raises(MisconfigurationException, match="it belongs to stage 'victim'"),
        Stage(tmp_path, "clean", before["inputs"]),
    ):
        pytest.fail("the body must not run")
    assert record_of(tmp_path) == before


def test_failed_stage_keeps_its_cause_and_resumes(tmp_path):
    with pytest.raises(ZeroDivisionError), Stage(tmp_path, "victim", {"config": "1"}):
        (tmp_path / "last.ckpt").write_text(f"half {1 / 0}")
    failed = record_of(tmp_path)
    assert (failed["status"], failed["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert failed["seconds"] > 0
    StageRecord(**{**failed, "seconds": 1000.0}).save(tmp_path)
    with Stage(tmp_path, "victim", {"config": "1"}) as stage:
        assert stage.resumed
        assert not stage.done
        assert record_of(tmp_path)["error"] is None
    done = record_of(tmp_path)
    assert done["status"] == "done"
    assert done["seconds"] > 1000


def test_killed_stage_resumes(tmp_path):
    Stage(tmp_path, "victim", {"config": "1"}).__enter__()  # as if the process died here
    assert record_of(tmp_path)["status"] == "running"
    with Stage(tmp_path, "victim", {"config": "1"}) as stage:
        assert stage.resumed


def test_unfinished_stage_of_other_inputs_is_restarted_only_where_it_left_nothing(tmp_path):
    def fail(config):
        with Stage(tmp_path, "victim", {"config": config}) as stage:
            assert not stage.resumed
            raise ValueError("typo")

    with pytest.raises(ValueError, match="typo"):
        fail("1")
    (tmp_path / "config.yaml").write_text("typo: 1")
    with pytest.raises(ValueError, match="typo"):
        fail("2")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(MisconfigurationException, match="'config' differs"):
        fail("3")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SIGTERMException])
def test_interruption_is_called_so(tmp_path, error):
    with pytest.raises(error) as stopped, Stage(tmp_path, "victim", {}):
        raise error
    assert getattr(stopped.value, "code", 143) == 143  # without it a script would end with 0
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["error"]) == ("failed", "interrupted")


def test_ordinary_exit_is_no_interruption(tmp_path):
    with pytest.raises(SystemExit), Stage(tmp_path, "victim", {}):
        raise SystemExit(3)
    assert record_of(tmp_path)["error"] == "SystemExit: 3"


def test_ctrl_c_in_a_lightning_trainer_counts_as_interruption(tmp_path):
    class CtrlC(Callback):
        def on_train_batch_end(self, *_args, **_kwargs):
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit), Stage(tmp_path, "victim", {}):
            Trainer(
                max_steps=2, callbacks=[CtrlC()], accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            ).fit(BoringModel())  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C switched off
    assert record_of(tmp_path)["error"] == "interrupted"


def test_read_only_output_fails_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", raiser(errno.EROFS))
    with pytest.raises(OutputError, match=r"victim.*read-only.*--output"), Stage(tmp_path / "victim", "victim", {}):
        pytest.fail("the body must not run")


def test_disk_full_during_a_stage_says_so_and_is_recorded(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "last.ckpt")
    with pytest.raises(OutputError, match="disk is full") as caught, Stage(tmp_path, "victim", {}):
        raise full
    assert caught.value.__cause__ is full
    assert record_of(tmp_path)["status"] == "failed"
    assert "No space left" in record_of(tmp_path)["error"]


def test_unreadable_input_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(PermissionError, match="data"), Stage(tmp_path, "victim", {}):
        raise PermissionError(errno.EACCES, "Permission denied", "data")


def test_full_disk_does_not_hide_why_a_stage_failed(tmp_path, monkeypatch):
    def run():
        with Stage(tmp_path, "victim", {}):
            monkeypatch.setattr(artifacts.os, "fsync", raiser(errno.ENOSPC))
            raise RuntimeError("real cause")

    with pytest.warns(UserWarning, match=r"disk is full.*unrecorded"), pytest.raises(RuntimeError, match="real cause"):
        run()
    assert record_of(tmp_path)["status"] == "running"


def test_full_disk_at_the_end_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="disk is full"), Stage(tmp_path, "victim", {}):
        monkeypatch.setattr(artifacts.os, "fsync", raiser(errno.ENOSPC))


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with Stage(tmp_path, "victim", {}) as stage:
        assert not stage.done
    assert stage.record.status == "done"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold exactly error, inputs, name, seconds, status"),
        ('{"name": "victim"}', "must hold exactly"),
        ('{"name": "v", "status": "over", "inputs": {}, "seconds": 0, "error": null}', "running, done, failed"),
        ('{"name": "v", "status": "done", "inputs": {"a": 1}, "seconds": 0, "error": null}', "names to hashes"),
        ('{"name": "v", "status": "done", "inputs": {}, "seconds": -1, "error": null}', "at least 0"),
        ('{"name": "", "status": "done", "inputs": {}, "seconds": 0, "error": null}', "non-empty string"),
        ('{"name": "v", "status": "done", "inputs": {}, "seconds": 0, "error": 1}', "string or null"),
    ],
)
def test_damaged_stage_record_is_reported(tmp_path, damage, message):
    (tmp_path / "stage.json").write_text(damage)
    with pytest.raises(ValueError, match=message) as caught, Stage(tmp_path, "victim", {}):
        pytest.fail("the body must not run")
    assert str(tmp_path) in str(caught.value)


def test_record_round_trip(tmp_path):
    record = StageRecord("victim", "failed", {"config": "ab"}, 1.5, "cause")
    record.save(tmp_path)
    assert StageRecord.load(tmp_path) == record
    assert StageRecord.load(tmp_path / "elsewhere") is None
