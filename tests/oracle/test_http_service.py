"""What a served oracle makes of a request: read no further than allowed, answered or refused, and nothing told of the victim."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import torch
from http_fakes import API_KEY, SHAPE, Linear, images, query, send, serving

from meadef_lightning.oracle import HTTPOracle, OracleHTTPError, QueryLedger, TopK, Totals
from meadef_lightning.oracle.clients import ServerLimits
from meadef_lightning.oracle.service import Service


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def url(folder):
    limits = ServerLimits(rows_per_request=8)
    with serving(Linear(), TopK(2), directory=folder, limits=limits, value_range=(-10.0, 10.0)) as address:
        yield address


NAN, LARGE = torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), 10.5)
NAN[0, 0, 1, 2] = torch.nan


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("{", "bad_query", "Invalid JSON"),
        ("[]", "bad_query", "the body"),
        (b"\x80\x04K\x01.", "bad_query", "Invalid JSON"),  # a pickle
        ({"shape": [1, 1, 4, 4]}, "bad_query", "data: Field required"),
        (query(extra=1), "bad_query", "extra"),
        (query(shape=(1, 1, 4)), "bad_query", "shape"),
        ({**query(), "shape": ["1", 1, 4, 4]}, "bad_query", "shape.0"),
        ({**query(), "shape": [1.0, 1, 4, 4]}, "bad_query", "shape.0"),
        ({**query(), "shape": [True, 1, 4, 4]}, "bad_query", "shape.0"),
        ({**query(), "data": 7}, "bad_query", "data"),
        (query(shape=(1, 1, 4, 5)), "bad_shape", "expected 1 to 8 rows of [1, 4, 4]"),
        (query(shape=(9, *SHAPE)), "bad_shape", "expected 1 to 8 rows"),
        ({**query(), "shape": [0, 1, 4, 4], "data": ""}, "bad_shape", "expected 1 to 8 rows"),
        ({**query(), "shape": [-1, 1, 4, 4]}, "bad_shape", "expected 1 to 8 rows"),
        ({**query(), "shape": [10**30, 1, 4, 4]}, "bad_shape", "expected 1 to 8 rows"),
        (
            {**query(), "shape": [2, 1, 4, 4]},
            "bad_data",
            "holds 64 bytes, but <f4 values of shape [2, 1, 4, 4] take 128",
        ),
        ({**query(), "data": "not base64!"}, "bad_data", "not base64"),
        ({**query(), "data": "é"}, "bad_data", "not base64"),
        (query(values=torch.zeros(1, *SHAPE, dtype=torch.int64)), "bad_data", "holds 128 bytes"),
        (query(values=NAN), "not_finite", "NaN or infinity"),
        (query(values=-LARGE / 0), "not_finite", "NaN or infinity"),
        (query(values=LARGE), "out_of_range", "lie in [10.5, 10.5], allowed is [-10, 10]"),
    ],
)
def test_what_is_no_query(url, folder, body, code, message):
    before = QueryLedger(folder / "tester.sqlite").totals()
    status, _, answer = send(url, body=body)
    assert (status, answer["error"]["code"]) == (422, code)
    assert message in answer["error"]["message"]
    assert QueryLedger(folder / "tester.sqlite").totals() == before


def test_other_mistakes_have_the_same_form(url):
    assert send(url, body=query(), Content_Type="text/plain")[2]["error"]["code"] == "not_json"
    for path, method, status in (("/nothing", "GET", 404), ("/predict", "GET", 405), ("/info", "POST", 405)):
        got, _, answer = send(url, path, method=method)
        assert (got, answer["error"]["code"]) == (status, "http_error")


@pytest.fixture
def line(url):
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as connection:
        yield connection


def head(*lines, key=API_KEY):
    start = ("POST /predict HTTP/1.1", "Host: x", "Content-Type: application/json", f"Authorization: Bearer {key}")
    return "\r\n".join((*start, *lines, "", "")).encode()


@pytest.mark.parametrize(("key", "status"), [(API_KEY, b" 413 "), ("a-wrong-key-0123456789", b" 401 ")])
def test_a_body_that_is_announced_too_long_is_not_read(line, key, status):
    line.sendall(head("Content-Length: 99999999999", key=key))
    assert status in line.recv(100)  # before one byte of the body


def test_a_body_of_unknown_length_is_read_no_further_than_allowed(line):
    line.sendall(head("Transfer-Encoding: chunked"))
    chunk, sent = b"10000\r\n" + b" " * 0x10000 + b"\r\n", 0
    try:
        for _ in range(1000):
            line.sendall(chunk)
            sent += len(chunk)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert sent < 500 * len(chunk)  # the rest of what the sockets buffer
    with contextlib.suppress(ConnectionResetError):  # the answer may be lost because we kept sending
        assert b" 413 " in line.recv(100)


def test_a_body_just_over_the_limit_gets_its_answer(url):
    limit = 8 * 16 * 4 * 4 // 3 + 4096
    assert send(url, body=b" " * (limit - 100))[0] == 422
    status, headers, answer = send(url, body=b" " * (limit + 100))
    assert (status, answer["error"]["code"], headers["Connection"]) == (413, "too_large", "close")


def test_slow_and_waiting_bodies(tmp_path):
    limits = ServerLimits(waiting=1, body_seconds=4.0)
    with serving(Linear(), directory=tmp_path, limits=limits) as address:
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=10) as slow:
            slow.sendall(head("Content-Length: 100") + b"{")
            for _ in range(100):  # until the server has seen the slow one
                status, headers, answer = send(address, body=query())
                if status != 200:
                    break
                time.sleep(0.005)
            assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "1")
            assert b" 408 " in slow.recv(100)
        assert send(address, body=query())[0] == 200


def test_a_body_that_takes_long_to_parse_keeps_nobody_waiting(tmp_path, monkeypatch):
    parse, entered, goes_on = Service.parse, threading.Event(), threading.Event()

    def slow(service, body):
        entered.set()
        assert goes_on.wait(30)
        return parse(service, body)

    monkeypatch.setattr(Service, "parse", slow)
    with serving(Linear(), directory=tmp_path) as address, ThreadPoolExecutor(1) as client:
        asked = client.submit(send, address, body=query())
        try:
            assert entered.wait(10)
            assert send(address, "/health")[0] == 200  # while the other is still being parsed
            assert not asked.done()
        finally:
            goes_on.set()
        assert asked.result()[0] == 200


def test_failures_of_the_model_are_not_told(tmp_path, caplog):
    x = images(3)
    x[1, 0, 0, 0] = 3.0  # what the victim chokes on
    with serving(Linear(), directory=tmp_path) as address:
        status, _, answer = send(address, body=query(values=x))
        assert (status, answer["error"]["code"]) == (500, "model_failed")
        assert "secret" not in json.dumps(answer)
        assert "RuntimeError: a secret of the model" in caplog.text
        assert send(address, body=query(values=x[:1]))[0] == 200
        with pytest.raises(OracleHTTPError, match=r"status 500.*nothing was spent, tried once"):
            HTTPOracle(address, API_KEY, retries=0).query(x)
    assert QueryLedger(tmp_path / "tester.sqlite").totals() == Totals(1, 1)
