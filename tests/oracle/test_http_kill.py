"""``kill -9`` of the server in the middle of a query: nothing is lost, nothing is paid for twice, on either side."""

import multiprocessing
import signal
import sqlite3
import threading

import http_worker
import pytest
import torch
from http_fakes import API_KEY, Linear, images

from meadef_lightning.oracle import HTTPOracle, Oracle, OracleHTTPError, QueryLedger, Totals

# servers are forked from a clean process that has imported what they need, so that starting one is quick
_CONTEXT = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
_CONTEXT.set_forkserver_preload(["meadef_lightning.oracle.server"])


class Servers:
    """Starts one server after the other on the same port and ledgers."""

    def __init__(self, directory):
        self.directory, self.port, self.running = directory, 0, []

    def start(self, *moment):
        mine, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=http_worker.serve, args=(self.directory, self.port, theirs, *moment), daemon=True
        )
        process.start()
        assert mine.poll(60), "the server did not start"
        self.port = mine.recv()
        self.running.append(process)
        return process

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def servers(tmp_path):
    servers = Servers(tmp_path / "server")
    yield servers
    for process in servers.running:
        process.kill()
        process.join(10)


def entries(path):
    """Totals, and the answers that are in the file."""
    totals = QueryLedger(path).totals()
    with sqlite3.connect(path) as database:
        rows = dict(database.execute("SELECT digest, answer FROM answers").fetchall())
    assert len(rows) == totals.distinct
    return totals, rows


def test_killed_twice(servers, tmp_path):
    x, ledgers = images(100), (tmp_path / "client", tmp_path / "server" / "tester.sqlite")

    # 1. dies in its third batch, before it has written it; the client gives up, and knows what the server knows
    server = servers.start("forward", 3)
    oracle = HTTPOracle(servers.url, API_KEY, QueryLedger(ledgers[0]), retries=1, backoff=0.01)
    with pytest.raises(OracleHTTPError, match=r"no answer .*tried 2 times.*what was answered so far is in the ledger"):
        oracle.query(x)
    server.join(10)
    assert server.exitcode == -signal.SIGKILL
    (mine, my_rows), (theirs, their_rows) = map(entries, ledgers)
    assert mine == theirs == Totals(20, 20)
    assert my_rows.keys() == their_rows.keys()

    # 2. a new client goes on; the server dies after it has written its second batch, before the client has heard of it;
    #    somebody starts it again, while the client keeps trying
    server = servers.start("response", 2)

    def restart():
        server.join(60)
        servers.start()

    watch = threading.Thread(target=restart)
    watch.start()
    oracle = HTTPOracle(servers.url, API_KEY, QueryLedger(ledgers[0]), retries=12, backoff=0.05)
    answers = oracle.query(x)
    watch.join(60)
    assert server.exitcode == -signal.SIGKILL
    assert torch.equal(answers, Oracle(Linear(), batch_size=10).query(x))  # the same numbers, whoever gave them

    (mine, my_rows), (theirs, their_rows) = map(entries, ledgers)
    assert mine == Totals(100, 120)  # 20 rows were answered twice from the client's own ledger
    assert theirs == Totals(100, 110)  # 10 rows once more for nothing, since their answer got lost on the way
    assert my_rows.keys() == their_rows.keys()
    assert [my_rows[digest] for digest in my_rows] == [their_rows[digest] for digest in my_rows]
