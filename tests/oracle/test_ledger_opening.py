"""Two processes may open one new ledger at the same moment; nobody else may read it."""

import os
import sqlite3
import stat
import threading
from contextlib import closing

import pytest
import torch

from meadef_lightning.oracle import QueryLedger
from meadef_lightning.oracle.storage import Storage


class Interrupted:
    """A connection during whose reading somebody else makes the file."""

    def __init__(self, connection, path):
        self.connection = connection
        self.other = threading.Thread(target=lambda: QueryLedger(path).close())

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def execute(self, statement):
        if "user_version" in statement:  # the last of what is read
            self.other.start()
            self.other.join(0.5)  # made by now, unless it has to wait for us
        return self.connection.execute(statement)


def test_a_file_that_another_process_is_making_is_not_taken_for_a_strange_one(tmp_path):
    path = tmp_path / "queries.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    seen = Interrupted(connection, path)
    storage = Storage(None)
    try:
        assert storage._is_empty(seen)
        seen.other.join()
        assert not storage._is_empty(connection)
    finally:
        connection.close()
    assert QueryLedger(path).totals() == (0, 0)


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX knows them")
def test_a_ledger_is_its_owners_alone_and_one_that_is_there_stays_as_it_is(tmp_path):
    """What was asked tells a verifier's key to whoever has the images, and a thief what he paid for."""
    path = tmp_path / "new" / "queries.sqlite"
    before = os.umask(0o022)
    try:
        with closing(QueryLedger(path)) as ledger:
            ledger.settle([b"1" * 32], lambda rows: torch.zeros(len(rows), 3))
            files = list(path.parent.iterdir())
            assert len(files) == 3  # with the log and its index, while it is in use
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)
    path.chmod(0o640)
    QueryLedger(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
