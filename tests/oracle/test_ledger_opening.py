"""Two processes may open one new ledger at the same moment."""

import sqlite3
import threading

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
