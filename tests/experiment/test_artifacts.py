"""Files of an experiment: old or new but never half, and stages that are filled once."""

import errno
import hashlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from meadef_lightning.experiment import artifacts
from meadef_lightning.experiment.artifacts import (
    OutputError,
    Stage,
    StageRecord,
    config_hash,
    file_sha256,
    make_directory,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def raiser(code):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def names_in(directory):
    return [path.name for path in directory.iterdir()]


def record_of(directory):
    return json.loads((directory / "stage.json").read_text())


# --- files


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(obj=plain_json)
def test_json_comes_back_as_written(tmp_path, obj):
    path = write_json_atomic(tmp_path / "a.json", obj)
    assert json.loads(path.read_bytes()) == obj == read_json(path)
    assert names_in(tmp_path) == ["a.json"]


def test_text_is_written_as_given(tmp_path):
    assert write_text_atomic(tmp_path / "a.txt", "é\r\nb\n").read_bytes() == b"\xc3\xa9\r\nb\n"


def test_permissions_follow_mode_and_umask(tmp_path):
    before = os.umask(0o027)
    try:
        assert write_json_atomic(tmp_path / "secret", {}, mode=0o600).stat().st_mode & 0o777 == 0o600
        assert write_json_atomic(tmp_path / "public", {}).stat().st_mode & 0o777 == 0o640
        # also where a file with wider permissions stood before
        assert write_json_atomic(tmp_path / "public", {}, mode=0o600).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, step):
    path = write_text_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr(artifacts.os, step, raiser(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"a\.txt.*disk is full.*--output") as caught:
        write_text_atomic(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_directory_is_named(tmp_path, monkeypatch, code):
    monkeypatch.setattr(artifacts.os, "open", raiser(code))
    with pytest.raises(OutputError, match=r"a\.txt.*read-only.*--output"):
        write_bytes_atomic(tmp_path / "a.txt", b"x")


def test_file_in_place_of_a_directory(tmp_path):
    (tmp_path / "runs").write_text("")
    for call in (lambda: make_directory(tmp_path / "runs" / "a"), lambda: make_directory(tmp_path / "runs")):
        with pytest.raises(OutputError, match="A file stands where a directory is needed"):
            call()


def test_values_outside_json_are_refused_before_the_file_is_touched(tmp_path):
    path = write_text_atomic(tmp_path / "a.json", "old")
    for bad in ({"x": float("nan")}, {"x": object()}, {"x": [1, {2}]}, "\ud800"):
        with pytest.raises(ValueError, match=r"a\.json cannot be written as JSON"):
            write_json_atomic(path, bad)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\xff\xfe{}", b"{'a': 1}", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 200_000]
)
def test_damaged_json_names_file_and_remedy(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)report\.json is not valid JSON.*Restore it.*or delete it"):
        read_json(path)


def test_oversized_json_is_not_parsed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["x" * 100]))
    with pytest.raises(ValueError, match=r"a\.json is larger than 50 bytes"):
        read_json(path, max_bytes=50)
    assert read_json(path, max_bytes=path.stat().st_size) == ["x" * 100]


def test_missing_file_stays_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


# --- hashes


def test_file_hash_over_several_pieces(tmp_path):
    data = bytes(range(256)) * 4096 * 3 + b"tail"
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@dataclass
class Spec:
    rate: float
    path: Path


def test_config_hash_is_that_of_canonical_json():
    config = {"b": [1, (2, None)], "a": Spec(0.5, Path("runs/ä"))}
    canonical = '{"a":{"path":"runs/\\u00e4","rate":0.5},"b":[1,[2,null]]}'
    assert config_hash(config) == hashlib.sha256(canonical.encode()).hexdigest()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), plain_json, min_size=2, max_size=4))
def test_config_hash_ignores_order_only(config):
    reordered = dict(reversed(config.items()))
    assert config_hash(config) == config_hash(reordered)
    first = next(iter(config))
    assert config_hash(config) != config_hash({**config, first: ["changed", config[first]]})


@pytest.mark.parametrize("bad", [{"a": object()}, {"a": float("inf")}, {1: 0, "a": 0}, {"a": {1, 2}}])
def test_config_hash_refuses_what_has_no_canonical_form(bad):
    with pytest.raises(ValueError, match="cannot be hashed"):
        config_hash(bad)


# --- stages


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
    with pytest.raises(error), Stage(tmp_path, "victim", {}):
        raise error
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
