"""A ledger's file: shared by processes, left by killed ones, bound to one victim, and refused if anything is wrong with it."""

import multiprocessing
import os
import pickle
import signal
import sqlite3

import pytest
import torch
from ledger_victim import POOL, Victim, truth

from meadef_lightning.oracle import BudgetExceededError, LedgerError, QueryLedger, Totals, row_digests, storage

fork = multiprocessing.get_context("fork")


def in_child(function, *arguments):
    process = fork.Process(target=function, args=arguments)
    process.start()
    return process


# --- kills and rivals


def _killed_in_third_batch(path):
    ledger, victim = QueryLedger(path), Victim()
    victim.ask(ledger, [0, 1])
    victim.ask(ledger, [1, 2, 2])
    ledger.settle(row_digests(POOL[3:6]), lambda indices: os.kill(os.getpid(), signal.SIGKILL))


def test_kill_loses_only_the_running_batch(tmp_path):
    path = tmp_path / "ledger.sqlite"
    process = in_child(_killed_in_third_batch, path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    ledger, victim = QueryLedger(path), Victim()
    assert ledger.totals() == Totals(distinct=3, calls=5)
    assert torch.equal(victim.ask(ledger, list(range(6))), truth(POOL[:6]))
    assert victim.seen == [3, 4, 5]
    assert ledger.totals() == Totals(6, 11)


def _rival(path, log, budget, seed, refused):
    ledger = QueryLedger(path, budget)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(60):
        rows = torch.randint(200, (5,), generator=generator)
        x = rows.float().reshape(-1, 1, 1, 1)

        def forward(indices, rows=rows):
            with log.open("ab", buffering=0) as file:
                file.write("".join(f"{row}\n" for row in rows[indices].tolist()).encode())
            return rows[indices, None].float()

        try:
            answers = ledger.settle(row_digests(x), forward)
        except BudgetExceededError:
            with refused.get_lock():
                refused.value += 1
        else:
            if not torch.equal(answers, x.flatten(1)):
                os._exit(3)


@pytest.mark.parametrize("budget", [None, 50])
def test_two_processes_share_one_file(tmp_path, budget):
    path, log, refused = tmp_path / "ledger.sqlite", tmp_path / "log", fork.Value("i", 0)
    processes = [in_child(_rival, path, log, budget, seed, refused) for seed in (1, 2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    forwarded = log.read_text().split()
    totals = QueryLedger(path).totals()
    assert len(forwarded) == len(set(forwarded)) == totals.distinct
    assert totals.calls == 5 * (120 - refused.value)
    if budget is None:
        draws = [torch.randint(200, (300,), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        assert totals == Totals(len(torch.cat(draws).unique()), 600)
    else:
        assert refused.value > 0
        assert 45 < totals.distinct <= 50


def _use(ledger, outcome):
    try:
        outcome.put(tuple(ledger.totals()))
    except LedgerError as error:
        outcome.put(str(error))


def test_after_a_fork_files_are_shared_and_memory_is_refused(tmp_path):
    outcome = fork.SimpleQueue()
    for ledger in (QueryLedger(tmp_path / "ledger.sqlite"), QueryLedger()):
        Victim().ask(ledger, [0, 1, 1])
        in_child(_use, ledger, outcome).join()
    assert outcome.get() == (2, 3)
    assert "in memory cannot be used from a second process. Give QueryLedger a path" in outcome.get()


def test_pickling(tmp_path):
    ledger = QueryLedger(tmp_path / "ledger.sqlite", budget=4)
    Victim().ask(ledger, [0])
    copy = pickle.loads(pickle.dumps(ledger))  # noqa: S301 - our own bytes
    Victim().ask(copy, [1])
    assert (copy.budget, ledger.totals()) == (4, Totals(2, 2))
    assert repr(QueryLedger(budget=2)) == "QueryLedger(path=None, budget=2)"
    with pytest.raises(TypeError, match=r"cannot be copied or sent. Give QueryLedger a path"):
        pickle.dumps(QueryLedger())


# --- files


def test_bound_to_one_victim(tmp_path):
    path = tmp_path / "sub" / "ledger.sqlite"
    first = QueryLedger(path)
    for _ in range(2):
        first.bind("a" * 64)
    with pytest.raises(
        LedgerError, match=r"another victim or policy \(fingerprint aaaaaaaaaaaa…, now bbbbbbbbbbbb…\).*start a new"
    ):
        QueryLedger(path).bind("b" * 64)
    QueryLedger(path).bind("a" * 64)


def _foreign_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()


def _other_version(path):
    QueryLedger(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


def _filled(path):
    ledger = QueryLedger(path)
    for start in range(0, 2000, 500):
        x = torch.arange(start, start + 500).reshape(-1, 1, 1, 1)
        ledger.settle(row_digests(x), lambda indices, x=x: x[indices].flatten(1).float())
    ledger.close()


def _truncated(path):
    _filled(path)
    os.truncate(path, path.stat().st_size // 2)


def _overwritten(path):
    _filled(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 8192 * 4096  # a page of answers, which opening the file alone would not look at
    data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.write_text("not a database, but long enough to be looked at" * 100),
            "is not a query ledger, or is dam",
        ),
        (_foreign_database, "another program's SQLite file, not a query ledger. Give QueryLedger another path"),
        (_other_version, "schema version 99, this package reads 1. Use the version of the package that wrote it"),
        (_truncated, r"or is damaged .*move the file away: its answers then have to be paid for again"),
        (_overwritten, "or is damaged"),
        (lambda path: path.mkdir(), "cannot be opened or written .* give QueryLedger another path"),
    ],
)
def test_bad_files_are_refused_and_left_alone(tmp_path, spoil, message):
    path = tmp_path / "ledger.sqlite"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError, match=message):
        QueryLedger(path)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_answer_of_the_wrong_size_is_damage(tmp_path):
    Victim().ask(QueryLedger(tmp_path / "l"), [0, 1])
    with sqlite3.connect(tmp_path / "l") as database:
        database.execute("UPDATE answers SET answer = x'00'")
    database.close()
    with pytest.raises(LedgerError, match=r"is damaged \(an answer has the wrong size\)"):
        Victim().ask(QueryLedger(tmp_path / "l"), [0])


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"folder of the ledger .* cannot be made .* Give QueryLedger another path"):
        QueryLedger(tmp_path / "file" / "ledger.sqlite")


def test_read_only_file(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    ledger = QueryLedger(tmp_path / "ledger.sqlite")
    ledger.close()
    (tmp_path / "ledger.sqlite").chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LedgerError, match="Make the file and its folder writable"):
            Victim().ask(QueryLedger(tmp_path / "ledger.sqlite"), [0])
    finally:
        tmp_path.chmod(0o700)


def test_full_disk_keeps_what_was_paid(tmp_path):
    ledger, victim = QueryLedger(tmp_path / "l"), Victim()
    victim.ask(ledger, [0, 1])
    with ledger._storage.reading() as database:  # the closest to a full disk that needs no disk
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")

    def ask_on():
        for i in range(1000):
            ledger.settle(row_digests(POOL[:1] + 1000 + i), lambda indices: torch.zeros(1, 2))

    with pytest.raises(LedgerError, match=r"No space is left .* what was paid for is kept"):
        ask_on()
    kept = ledger.totals()
    again = QueryLedger(tmp_path / "l")
    assert again.totals() == kept
    assert torch.equal(again.settle(row_digests(POOL[:2]), lambda indices: pytest.fail("asked twice")), truth(POOL[:2]))


def test_lock_that_is_never_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_LOCK_SECONDS", 0.0)
    ledger = QueryLedger(tmp_path / "l")
    rival = sqlite3.connect(tmp_path / "l", isolation_level=None)
    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match=r"locked by another process .* what was paid for is kept"):
        Victim().ask(ledger, [0])
    rival.execute("ROLLBACK")
    rival.close()
    Victim().ask(ledger, [0])
    assert ledger.distinct == ledger.calls == 1
