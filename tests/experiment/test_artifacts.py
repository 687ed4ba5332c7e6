"""Files of an experiment: old or new but never half, and hashes that say whether something is still the same."""

import csv
import errno
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from failing_files import raiser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meadef_lightning.experiment import artifacts
from meadef_lightning.experiment.artifacts import (
    OutputError,
    config_hash,
    csv_text,
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


def names_in(directory):
    return [path.name for path in directory.iterdir()]


# --- files


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(obj=plain_json)
def test_json_comes_back_as_written(tmp_path, obj):
    path = write_json_atomic(tmp_path / "a.json", obj)
    assert json.loads(path.read_bytes()) == obj == read_json(path)
    assert names_in(tmp_path) == ["a.json"]


def test_text_is_written_as_given(tmp_path):
    assert write_text_atomic(tmp_path / "a.txt", "é\r\nb\n").read_bytes() == b"\xc3\xa9\r\nb\n"


# all but a lone carriage return, which the csv module does not quote if lines end otherwise
_CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r"))


@given(st.lists(st.fixed_dictionaries({"a": _CELL, 'b,"\n': _CELL, "unused": _CELL}), max_size=5))
def test_csv_comes_back_as_written(rows):
    columns = ['b,"\n', "a", "missing"]
    written = list(csv.reader(io.StringIO(csv_text(columns, rows), newline="")))
    assert written == [columns, *([row[columns[0]], row["a"], ""] for row in rows)]


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
