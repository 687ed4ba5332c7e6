"""The served oracle: who may ask, how much and how fast, and that nothing a client sends brings it down."""

import base64
import http.client
import json
import logging
import struct
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
from http_fakes import API_KEY, SHAPE, Linear, images, query, send, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meadef_lightning.oracle import HTTPOracle, LedgerError, Oracle, QueryLedger, TopK, Totals
from meadef_lightning.oracle.clients import ServerLimits
from meadef_lightning.oracle.server import create_app, listen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def url(folder):
    limits = ServerLimits(rows_per_request=8)
    with serving(Linear(), TopK(2), directory=folder, limits=limits, value_range=(-10.0, 10.0)) as address:
        yield address


def test_health_needs_no_key_and_tells_nothing(url):
    assert send(url, "/health", key=None)[::2] == (200, {"status": "ok"})


def test_info_tells_what_a_client_needs_and_nothing_of_the_weights(url):
    status, _, info = send(url, "/info")
    assert status == 200
    assert len(info.pop("model")) == 32
    assert info == {
        "kind": "topk", "num_classes": 4, "image_shape": [1, 4, 4], "max_rows": 8, "budget": None, "spent": info["spent"],
        "remaining": None,
    }  # fmt: skip
    assert Oracle(Linear(), TopK(2)).fingerprint() not in json.dumps(send(url, "/info")[2])


def test_any_client_can_ask_as_the_schema_says(url):
    """By hand, with nothing of ours: little-endian float32 in base64."""
    x = images(2)
    data = base64.b64encode(struct.pack("<32f", *x.flatten().tolist())).decode()
    status, headers, answer = send(url, body={"shape": [2, 1, 4, 4], "data": data})
    assert (status, headers["Content-Type"]) == (200, "application/json")
    got = np.array(struct.unpack("<8f", base64.b64decode(answer["data"]))).reshape(answer["shape"])
    np.testing.assert_array_equal(got, Oracle(Linear(), TopK(2)).query(x).numpy())
    assert answer["kind"] == "topk"


def test_schema_is_published(url):
    _, _, schema = send(url, "/openapi.json", key=None)
    predict = schema["paths"]["/predict"]["post"]
    assert predict["requestBody"]["content"]["application/json"]["schema"]["required"] == ["shape", "data"]
    assert set(predict["responses"]) >= {"200", "401", "402", "413", "422", "429"}
    assert predict["security"]
    assert schema["components"]["securitySchemes"]


# --- who may ask


@pytest.mark.parametrize("path", ["/info", "/predict"])
@pytest.mark.parametrize("key", [None, "", "wrong", API_KEY[:-1], API_KEY + "x", "ünïcode", "a" * 5000])
def test_without_a_valid_key_there_is_no_answer(url, path, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    body = {"shape": [1, *SHAPE], "data": ""} if path == "/predict" else None
    status, answer_headers, answer = send(url, path, body, key=None, **headers)
    assert (status, answer["error"]["code"]) == (401, "unauthorized")
    assert answer_headers["WWW-Authenticate"] == "Bearer"


def test_a_key_in_the_wrong_place_is_none(url):
    for headers in ({"X_API_Key": API_KEY}, {"Authorization": API_KEY}, {"Authorization": f"Basic {API_KEY}"}):
        assert send(url, "/info", key=None, **headers)[0] == 401
    assert send(url, f"/info?api_key={API_KEY}", key=None)[0] == 401


def test_keys_are_never_logged(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with serving(Linear(), directory=tmp_path) as address:
        HTTPOracle(address, API_KEY).query(images(2))
        send(address, key="another-key-0123456789", body={"shape": [], "data": ""})
    output = capfd.readouterr()
    assert "key-0123456789" not in caplog.text + output.out + output.err


# --- how much and how fast


def test_budget(tmp_path):
    with serving(Linear(), directory=tmp_path, limits=ServerLimits(budget=5)) as address:
        status, _, answer = send(address, body=query(values=images(4)))
        assert (status, answer["spent"], answer["remaining"]) == (200, 4, 1)
        status, headers, answer = send(address, body=query(values=images(6)))
        assert status == 402
        assert "Retry-After" not in headers  # waiting does not help
        assert answer["error"].pop("message")
        assert answer["error"] == {"code": "budget_exceeded", "budget": 5, "spent": 4, "asked": 2, "remaining": 1}
        assert send(address, body=query(values=images(5)))[2]["remaining"] == 0
        assert send(address, body=query(values=images(5)))[0] == 200  # answered before, and free
    assert QueryLedger(tmp_path / "tester.sqlite").totals() == Totals(5, 14)


def test_rate(tmp_path):
    limits = ServerLimits(rows_per_request=4, rows_per_second=0.05)
    keys = {"a": API_KEY, "b": "another-key-0123456789"}
    with serving(Linear(), directory=tmp_path, limits=limits, api_keys=keys) as address:
        assert send(address, body=query(values=images(4)))[0] == 200
        status, headers, answer = send(address, body=query(values=images(2)))
        assert (status, answer["error"]["code"]) == (429, "too_fast")
        assert 35 <= int(headers["Retry-After"]) <= 40  # two rows at a twentieth per second
        assert send(address, body=query(values=images(4)), key=keys["b"])[0] == 200  # a client of its own
    assert QueryLedger(tmp_path / "a.sqlite").totals() == Totals(4, 4)


# --- a server that cannot work


def make(directory, victim=None, policy=None, **options):
    options = {"image_shape": SHAPE, "num_classes": 4, "api_keys": {"tester": API_KEY}, **options}
    return create_app(victim or Linear(), policy, directory=directory, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 5}, "answers with 4 classes, but num_classes is 5"),
        ({"image_shape": (1, 4, 5)}, r"does not take images of shape \(1, 4, 5\)"),
        ({"image_shape": (4, 4)}, "three positive sizes"),
        ({"value_range": (1.0, -1.0)}, "must be .lowest, highest."),
        ({"policy": TopK(5)}, "TopK keeps k=5"),
        ({"api_keys": {}}, "at least one API key"),
        ({"api_keys": {"../up": API_KEY}}, "name of client number 1 cannot name a ledger"),
        ({"api_keys": {"a": "short-secret"}}, "API key of client number 1 must be 16 to 512"),
        ({"api_keys": {"a": API_KEY, "A": API_KEY + "2"}}, "share a name"),
        ({"api_keys": {"a": API_KEY, "b": API_KEY}}, "share a name"),
    ],
)
def test_a_server_that_cannot_work_does_not_start(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path, **options)
    assert not any(key in str(error.value) for key in (API_KEY, "short-secret"))


def test_ledgers_of_another_victim_are_found_out_at_the_start(tmp_path):
    make(tmp_path)
    with pytest.raises(LedgerError, match="answers of another victim or policy"):
        make(tmp_path, policy=TopK(2))


def test_a_taken_port_is_named():
    with listen() as taken, pytest.raises(OSError, match=r"Cannot listen on 127.0.0.1 port .*choose another port"):
        listen(port=taken.getsockname()[1])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "meadef_lightning.oracle.server")
    with pytest.raises(
        ModuleNotFoundError, match=r'Serving an oracle needs fastapi: pip install "meadef-lightning\[serve\]"'
    ):
        __import__("meadef_lightning.oracle.server")


# --- whatever a client sends

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
_DATA = st.binary(max_size=200).map(lambda raw: base64.b64encode(raw).decode()) | st.text(max_size=30)
_QUERIES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(-1, 9), st.just(1), st.just(4), st.just(4)) | _JSON,
        "data": st.integers(0, 3).flatmap(
            lambda rows: st.binary(min_size=64 * rows, max_size=64 * rows).map(
                lambda raw: base64.b64encode(raw).decode()
            )
        )
        | _DATA,
    },
    optional={"more": _JSON},
)
_BODIES = (
    st.binary(max_size=300)
    | st.one_of(_QUERIES, _JSON).map(lambda value: json.dumps(value).encode())
    | st.one_of(_QUERIES, _JSON).map(lambda value: json.dumps(value)[:-1].encode())
    | st.integers(1, 3000).map(lambda depth: b"[" * depth)
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=_BODIES,
    kind=st.sampled_from(["application/json", "application/json; charset=latin-1", "text/plain", ""]),
    key=st.sampled_from([f"Bearer {API_KEY}"] * 5 + ["Bearer", "Bearer \xff", "", "\x00"[:0]]),
    path=st.sampled_from(["/predict"] * 8 + ["/info", "/health", "//", "/%ff", "/predict/"]),
)
def test_nothing_that_is_sent_brings_the_server_down(url, body, kind, key, path):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request("POST", path, body, {"Content-Type": kind, "Authorization": key.encode("latin-1")})
        answer = connection.getresponse()
        content = json.loads(answer.read() or b"{}")
    finally:
        connection.close()
    assert answer.status in {200, 401, 404, 405, 413, 415, 422}
    if answer.status >= 400:
        assert content["error"]["code"] != "internal_error"
        assert "Traceback" not in content["error"]["message"]
