"""What an attack has asked and paid for: counts, a budget, and the answers themselves, in memory or in one SQLite file.

Two totals are kept, because the literature mixes them up:

* ``distinct``: different inputs, each forwarded to the victim once. This is what the budget limits.
* ``calls``: rows asked and answered, from the cache or not: what a thief without a cache would be billed.

An input's identity is the SHA-256 of its dtype, shape and bytes. Every batch is one transaction that holds the write lock from
the look-up to the commit: two processes on one file neither forward an input twice nor overspend, and a process that is killed
loses at most the batch it was in. The file is in WAL mode, which needs a local file system.
"""

import hashlib
import json
import math
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from meadef_lightning.oracle.storage import LedgerError, Storage

_VARIABLES: Final = 900  # placeholders in one statement; SQLite before 3.32 allows 999
_DTYPES: Final = {"float32": torch.float32, "int64": torch.int64}


class BudgetExceededError(RuntimeError):
    """A query would spend more distinct inputs than the budget has left; none of them was forwarded.

    Args:
        budget: Distinct inputs allowed.
        spent: Distinct inputs spent so far.
        asked: Distinct inputs of the refused query that were not paid for yet.

    Attributes:
        budget: See the argument.
        spent: See the argument.
        asked: See the argument.
    """

    def __init__(self, budget: int, spent: int, asked: int) -> None:
        super().__init__(
            f"The query budget is {budget} distinct inputs: {spent} are spent, {asked} new ones were asked, "
            f"{max(0, budget - spent)} are left. None of the new ones was forwarded, and answers already paid for stay "
            "available. Ask for fewer inputs, or give QueryLedger a larger budget (the same file can be reused)."
        )
        self.budget, self.spent, self.asked = budget, spent, asked

    def __reduce__(self) -> tuple[type[Self], tuple[int, int, int]]:
        return type(self), (self.budget, self.spent, self.asked)


class Totals(NamedTuple):
    """The two counts of a ledger.

    Attributes:
        distinct: Different inputs forwarded to the victim.
        calls: Rows asked and answered, cached ones included.
    """

    distinct: int
    calls: int


def row_digests(x: Tensor) -> list[bytes]:
    """Identity of each row of a batch.

    Args:
        x: ``(B, ...)`` of any dtype and device, rows not empty. They are compared byte for byte: ``0.0`` and ``-0.0`` differ.

    Returns:
        ``B`` SHA-256 digests of 32 bytes, over the dtype, the shape and the bytes of each row.
    """
    head = hashlib.sha256(f"{x.dtype}|{tuple(x.shape[1:])}|".encode())
    digests = []
    for row in _rows(x):
        digest = head.copy()
        digest.update(row)
        digests.append(digest.digest())
    return digests


class QueryLedger:
    """Counts queries, enforces a budget on distinct inputs, and never asks a victim the same thing twice.

    Args:
        path: SQLite file of the ledger; created, with its folder, where it does not exist, and continued where it does. Without
            a path everything stays in the memory of this process: about 100 bytes a distinct input, and the answer, which for soft
            ones is 4 bytes a class.
        budget: Most distinct inputs that may ever be forwarded, those already in the file included. No limit if None. It is
            not stored: reopen a file with a larger budget to go on.

    Raises:
        ValueError: If ``budget`` is negative.
        LedgerError: If the file is not a ledger, is damaged, was written by another version, or cannot be written.
    """

    def __init__(self, path: Path | str | None = None, budget: int | None = None) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"budget must be at least 0, got {budget}; None means no limit.")
        self.path = None if path is None else Path(path)
        self.budget = budget
        self._bound: str | None = None
        self._storage = Storage(self.path)

    @property
    def distinct(self) -> int:
        """Different inputs forwarded to the victim so far, by all processes that share the file."""
        return self.totals().distinct

    @property
    def calls(self) -> int:
        """Rows asked and answered so far, cached ones included, by all processes that share the file."""
        return self.totals().calls

    @property
    def remaining(self) -> int | None:
        """Distinct inputs the budget still allows; None without a budget."""
        return None if self.budget is None else max(0, self.budget - self.distinct)

    @property
    def identity(self) -> str:
        """Random name of this ledger, 32 hexadecimal digits. It stays with the file, and tells nothing of what is in it."""
        with self._storage.writing() as database:
            return _fact(database, "identity", default=secrets.token_hex(16))

    def totals(self) -> Totals:
        """Both counts at one moment."""
        with self._storage.reading() as database:
            return Totals(*database.execute("SELECT distinct_inputs, calls FROM totals").fetchone())

    def bind(self, fingerprint: str) -> None:
        """Tie the ledger to one victim and policy, or check that it is tied to this one.

        Args:
            fingerprint: `Oracle.fingerprint` of the asker.

        Raises:
            LedgerError: If the ledger holds answers of another victim or policy.
        """
        if self._bound == fingerprint:
            return
        with self._storage.writing() as database:
            self._bound = _fact(database, "fingerprint", default=fingerprint)
        if self._bound != fingerprint:
            raise LedgerError(
                f"The ledger {self._storage.name} holds answers of another victim or policy (fingerprint "
                f"{self._bound[:12]}…, now {fingerprint[:12]}…). Give every victim and every policy a ledger of its own, "
                "and start a new one if the victim was trained further."
            )

    def check(self, digests: Sequence[bytes]) -> int:
        """Find out what a query would cost before anything is forwarded.

        Args:
            digests: `row_digests` of the query.

        Returns:
            Number of distinct inputs that are not paid for yet.

        Raises:
            BudgetExceededError: If the budget does not cover them.
        """
        unique = list(dict.fromkeys(digests))
        with self._storage.reading() as database:
            new = len(unique) - len(_select(database, "1", unique))
            self._require(database, new)
        return new

    def settle(self, digests: Sequence[bytes], forward: Callable[[list[int]], Tensor]) -> Tensor:
        """Answer one batch in one transaction: from the cache where possible, from the victim where not.

        Args:
            digests: `row_digests` of the batch, at least one.
            forward: Gets the indices of the rows to forward (one per new distinct input, at least one) and returns their
                answers, ``(n, ...)`` float32 or int64. What it raises passes through, and the batch is not counted.

        Returns:
            ``(B, ...)`` answers on the CPU, one per digest.

        Raises:
            ValueError: If there are no digests.
            BudgetExceededError: If the budget does not cover the batch; nothing is forwarded or counted.
            LedgerError: If the file cannot be written, or the answers differ in dtype or shape from earlier ones.
        """
        if not digests:
            raise ValueError("An empty batch has no answers; ask for at least one row.")
        first: dict[bytes, int] = {}
        for index, digest in enumerate(digests):
            first.setdefault(digest, index)
        with self._storage.writing() as database:
            answers: dict[bytes, bytes] = dict(_select(database, "digest, answer", list(first)))
            new = [digest for digest in first if digest not in answers]
            self._require(database, len(new))
            if new:
                fresh = self._blobs(database, forward([first[digest] for digest in new]), len(new))
                database.executemany("INSERT INTO answers VALUES (?, ?)", zip(new, fresh, strict=True))
                answers.update(zip(new, fresh, strict=True))
            database.execute(
                "UPDATE totals SET distinct_inputs = distinct_inputs + ?, calls = calls + ?", (len(new), len(digests))
            )
            name, shape = json.loads(_fact(database, "answer", default="null"))
        data, dtype = bytearray().join(answers[digest] for digest in digests), _DTYPES[name]
        if len(data) != len(digests) * math.prod(shape) * dtype.itemsize:
            raise self._storage.damaged("an answer has the wrong size")
        return torch.frombuffer(data, dtype=dtype).reshape(len(digests), *shape)

    def close(self) -> None:
        """Fold the write-ahead log into the file, for instance before copying it. The next use opens it again."""
        self._storage.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(path={None if self.path is None else str(self.path)!r}, budget={self.budget})"

    def _require(self, database: sqlite3.Connection, new: int) -> None:
        """Refuse what the budget does not cover."""
        if self.budget is None or new == 0:
            return
        (spent,) = database.execute("SELECT distinct_inputs FROM totals").fetchone()
        if spent + new > self.budget:
            raise BudgetExceededError(self.budget, spent, new)

    def _blobs(self, database: sqlite3.Connection, answers: Tensor, rows: int) -> list[bytes]:
        """Raw bytes of each answer, after checking that it looks like the ones before it."""
        name = str(answers.dtype).removeprefix("torch.")
        if name not in _DTYPES or len(answers) != rows:
            raise LedgerError(
                f"A ledger keeps one float32 or int64 answer per row; for {rows} rows it got {name} of shape "
                f"{tuple(answers.shape)}."
            )
        form = json.dumps([name, list(answers.shape[1:])])
        known = _fact(database, "answer", default=form)
        if known != form:
            raise LedgerError(
                f"The ledger {self._storage.name} holds answers of the form {known}, the victim now gives {form}. All "
                "answers of one ledger have one dtype and shape; start a new ledger."
            )
        return [bytes(row) for row in _rows(answers)]


def _rows(x: Tensor) -> list[memoryview]:
    """The bytes of each row, without copying a tensor that is contiguous and on the CPU."""
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    size = len(data) // max(1, len(x))
    return [data[start : start + size] for start in range(0, len(data), max(1, size))]


def _fact(database: sqlite3.Connection, name: str, default: str) -> str:
    """A fact of the ledger, which becomes the default if it is new."""
    database.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, default))
    return str(database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0])


def _select(database: sqlite3.Connection, columns: str, digests: Sequence[bytes]) -> list[tuple[Any, ...]]:
    """Columns of the answers with these digests, in no particular order."""
    rows: list[tuple[Any, ...]] = []
    for start in range(0, len(digests), _VARIABLES):
        part = digests[start : start + _VARIABLES]
        marks = ",".join("?" * len(part))
        statement = f"SELECT {columns} FROM answers WHERE digest IN ({marks})"  # noqa: S608 - our columns, question marks
        rows.extend(database.execute(statement, part))
    return rows
