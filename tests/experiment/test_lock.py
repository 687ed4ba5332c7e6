"""One run at a time in a directory, however it ends."""

import subprocess
import sys

import pytest
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from meadef_lightning.experiment.artifacts import OutputError
from meadef_lightning.experiment.lock import LOCK_FILE, locked

HOLDER = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
"""A process that holds a lock until it is killed."""


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with locked(tmp_path):
        with pytest.raises(MisconfigurationException, match=f"at work in {tmp_path}.*Wait.*--output"), locked(tmp_path):
            pytest.fail("two at once")
        with pytest.raises(MisconfigurationException), locked(tmp_path):
            pytest.fail("the refused one gave the first one's lock away")
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / LOCK_FILE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(MisconfigurationException, match="Another run is at work"), locked(tmp_path):
            pass
        other.kill()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        pass


def test_of_several_processes_rank_zero_alone_takes_it(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with locked(tmp_path):
            pass


def test_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*\.lock.*--output"), locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unknown(*_args, **_kwargs):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", unknown)
    with pytest.warns(UserWarning, match="knows no locks"), locked(tmp_path):
        pass
