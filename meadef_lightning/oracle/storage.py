"""The SQLite side of the ledger: one database, in memory or in a file, that several processes may share and that may be killed.

Nothing is ever written to a file that is not ours, and every SQLite error becomes a `LedgerError` that says what to do.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

_APPLICATION_ID: Final = 0x4D454144  # "MEAD" in the file's header: tells our files from other SQLite files
_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = (
    "CREATE TABLE answers (digest BLOB PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE totals (distinct_inputs INTEGER NOT NULL, calls INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0, 0)",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
_LOCK_SECONDS: Final = 600.0  # how long to wait for another process that is in the middle of a batch
_GIVE_A_PATH: Final = "Give QueryLedger a path, so that processes share its file."
_INHERITED: Final[
    list[sqlite3.Connection]
] = []  # connections of a parent process: neither used nor closed after a fork


class LedgerError(RuntimeError):
    """A ledger's file cannot be used, or belongs to something else. The message says what to do."""


class Storage:
    """A checked SQLite database with the ledger's tables, usable from any thread, and from any process if it has a path.

    Args:
        path: Database file, created with its folder where it does not exist, readable by its owner only; None for memory.

    Raises:
        LedgerError: If the file is not a ledger, is damaged, was written by another version, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.name = "in memory" if path is None else str(path)
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        with self.reading():
            pass  # a bad file is reported now, and not after an hour of training

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The database, for statements that only read."""
        with self._lock, self._translated():
            yield self._open()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The database under the write lock: committed at the end, rolled back on any exception."""
        with self.reading() as database:
            _patiently(database, "BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Fold the write-ahead log into the file; the next use opens it again. Storage in memory stays as it is."""
        with self._lock, self._translated():
            if self.path is not None and self._connection is not None and self._process == os.getpid():
                self._connection.close()
                self._connection = None

    def damaged(self, reason: str) -> LedgerError:
        """The error for a file whose content is wrong."""
        return LedgerError(
            f"{self.name} is not a query ledger, or is damaged ({reason}). Give QueryLedger another path, or move the file "
            "away: its answers then have to be paid for again."
        )

    def __getstate__(self) -> dict[str, Any]:
        if self.path is None:
            raise TypeError(f"A ledger in memory lives in one process and cannot be copied or sent. {_GIVE_A_PATH}")
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Storage.__init__(self, **state)  # with a lock and a connection of its own

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.Error as error:
            reason = str(error)
            if "locked" in reason:
                message = (
                    f"The ledger {self.name} has been locked by another process for {_LOCK_SECONDS:.0f} seconds. Wait for "
                    "that process or end it, then run again: what was paid for is kept."
                )
            elif "full" in reason:
                message = f"No space is left for the ledger {self.name}. Free some, then run again: what was paid for is kept."
            elif any(part in reason for part in ("readonly", "unable to open", "I/O")):
                message = (
                    f"The ledger {self.name} cannot be opened or written ({reason}). Make the file and its folder writable, on "
                    "a local disk, or give QueryLedger another path."
                )
            else:
                raise self.damaged(reason) from error
            raise LedgerError(message) from error

    def _open(self) -> sqlite3.Connection:
        """The connection of this process, made and checked on first use."""
        if self._connection is not None and self._process != os.getpid():
            if self.path is None:
                raise LedgerError(f"A ledger in memory cannot be used from a second process. {_GIVE_A_PATH}")
            _INHERITED.append(self._connection)
            self._connection = None
        if self._connection is None:
            if self.path is not None:
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise LedgerError(
                        f"The folder of the ledger {self.name} cannot be made ({error}). Give QueryLedger another path."
                    ) from error
                # which samples were asked tells a verifier's key; SQLite gives its other files the same permissions, and
                # says itself what is wrong with a path
                with suppress(OSError):
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            # Autocommit, since transactions are explicit; the short timeout keeps Ctrl-C alive while we wait for a lock
            target = ":memory:" if self.path is None else str(self.path)
            connection = sqlite3.connect(target, timeout=1.0, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection, self._process = connection, os.getpid()
        return self._connection

    def _prepare(self, database: sqlite3.Connection) -> None:
        """Check that the database is ours and sound, or make it ours if it is empty."""
        if not self._is_empty(database):
            (report,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if report != "ok":
                raise self.damaged(report)
        _patiently(database, "PRAGMA journal_mode = WAL")
        # NORMAL is safe against a killed process; only a power cut may undo the last batches, each as a whole
        database.execute("PRAGMA synchronous = NORMAL")
        if self._is_empty(database):
            _patiently(database, "BEGIN IMMEDIATE")
            if self._is_empty(database):  # still: another process may have been faster
                for statement in _SCHEMA:
                    database.execute(statement)
            database.execute("COMMIT")

    def _is_empty(self, database: sqlite3.Connection) -> bool:
        """Whether nothing was ever written; raises if something was written by somebody else."""
        within = database.in_transaction
        if not within:
            database.execute("BEGIN")  # all three at one moment: another process may be making the file
        (tables,) = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if not within:
            database.execute("COMMIT")
        if application == version == tables == 0:
            return True
        if application != _APPLICATION_ID:
            raise LedgerError(
                f"{self.name} is another program's SQLite file, not a query ledger. Give QueryLedger another path."
            )
        if version != _SCHEMA_VERSION:
            raise LedgerError(
                f"The ledger {self.name} has schema version {version}, this package reads {_SCHEMA_VERSION}. Use the "
                "version of the package that wrote it, or start a new ledger."
            )
        return False


def _patiently(database: sqlite3.Connection, statement: str) -> None:
    """Execute a statement that needs the write lock, waiting for whoever holds it."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            database.execute(statement)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        else:
            return
