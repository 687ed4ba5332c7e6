"""Servers that lie, dawdle or break: every one is a clear error or overcome, and none leaves anything in the ledger."""

import itertools
import json
import time
import traceback

import pytest
import torch
from http_fakes import API_KEY, INFO, fail, images, pretending, reply, say

from meadef_lightning.oracle import HTTPOracle, OracleHTTPError, ServerBudgetExceededError, Totals, transport

SOFT = torch.full((2, 4), 0.25)
ASK = images(2)


def client(url, **options):
    return HTTPOracle(url, API_KEY, **{"retries": 0, "timeout": 5.0, **options})


def refused(predict, message, info=None, **options):
    """Asks, expects an error that names the server and shows no key, and returns it."""
    with pretending(predict, info) as (url, asked):
        oracle = client(url, **options)
        with pytest.raises(OracleHTTPError, match=message) as error:
            oracle.query(ASK)
        assert str(error.value).startswith(url)
        assert API_KEY not in "".join(traceback.format_exception(error.value))
        assert oracle.ledger.totals() == Totals(0, 0)
        return error.value, asked


def changed(**changes):
    return {**INFO, **changes}


HARD = changed(kind="hard")


@pytest.mark.parametrize(
    ("predict", "info", "message"),
    [
        (reply(SOFT.index_fill(0, torch.tensor([1]), torch.nan)), None, "cannot be right: there are NaN or infinite"),
        (reply(SOFT * torch.inf), None, "NaN or infinite"),
        (reply(SOFT + 1), None, r"probabilities outside \[0, 1\]"),
        (reply(SOFT * 1.123), None, "sum to more than 1"),
        (reply(SOFT[:1]), None, r"not of shape \[2, 4\]"),
        (reply(SOFT[:, :3]), None, r"not of shape \[2, 4\]"),
        (reply(SOFT, shape="24"), None, r"not of shape \[2, 4\]"),
        (reply(SOFT, data=7), None, r"not of shape \[2, 4\]"),
        (reply(SOFT, data="AAAA"), None, "data holds 3 bytes"),
        (reply(SOFT, data="?" * 43 + "="), None, "not base64"),
        (reply(SOFT, model="m2"), None, "another model or policy answers than before"),
        (reply(torch.tensor([0, 1])), None, "another model or policy"),
        (reply(torch.tensor([0, 4])), HARD, "labels outside 0 to 3"),
        (reply(torch.tensor([-1, 0])), HARD, "labels outside 0 to 3"),
        (reply(SOFT, kind="hard"), HARD, r"not of shape \[2\]"),
        ([], None, "is no JSON object"),
        ("{}", None, "is no JSON object"),
        (say("{"), None, "is no JSON object"),
        (say(b"\x80\x04K\x01."), None, "is no JSON object"),
        (say("[" * 3000), None, "is no JSON object"),
        (say(json.dumps(reply(SOFT)), kind="text/html"), None, "the answer .'text/html'. is no JSON object"),
        (say(json.dumps(reply(SOFT)), kind="application/json", Content_Encoding="gzip"), None, None),
    ],
)
def test_answers_that_are_none(predict, info, message):
    if message is None:  # an encoding that was not asked for is not undone, lest a bomb goes off
        with pretending(predict) as (url, _):
            assert torch.equal(client(url).query(ASK), SOFT)
    else:
        refused([predict] if predict == [] else predict, message, info)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (changed(kind="logits"), "kind is none of soft, topk, hard, feature"),
        (changed(num_classes=True), "num_classes is no number"),
        (changed(num_classes=10**9), "num_classes is no number from 1 to 100000"),
        (changed(image_shape=[1, 4]), "image_shape is not three"),
        (changed(max_rows=0), "max_rows is no number"),
        (changed(model="\x1b[31m"), "model is no name"),
        ({}, "model is no name"),
        (say("x" * 100_000), "longer than the 4096 bytes"),
        (fail(404, "Not Found"), r"status 404.: Not Found. Check the address: there is no meadef oracle"),
        (fail(401, f"no client has {API_KEY}\x1b[31m"), r"status 401.: no client has \*\*\* .*MEADEF_API_KEY"),
    ],
)
def test_servers_of_something_else(info, message):
    error, asked = refused(reply(SOFT), message, info)
    assert asked == ["/info"]
    assert "\x1b" not in str(error)


# --- endless, slow and broken answers


def endless(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.server.sent = 0
    for _ in range(4000):  # 256 MiB
        handler.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        handler.server.sent += 0x10000


def test_an_endless_answer_is_not_read():
    sent = []

    def watched(handler):
        try:
            endless(handler)
        finally:
            sent.append(handler.server.sent)

    refused(watched, r"longer than the \d+ bytes it may have. This is no meadef oracle, or a hostile one")
    for _ in range(200):
        if sent:
            break
        time.sleep(0.01)
    assert sent[0] < 64 << 20  # what the sockets buffer


def test_an_endless_error_is_not_read():
    def act(handler):
        handler.send_response(422)
        handler.end_headers()
        for _ in range(4000):
            handler.wfile.write(b" " * 0x10000)

    refused(act, "status 422.: the server does not say why")


def dripping(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def dripping_head(handler):
    for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def silent(handler):
    time.sleep(1.0)
    handler.close_connection = True


def broken(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


def hanging_up(handler):
    handler.close_connection = True


def garbage(handler):
    handler.wfile.write(b"\x00\xff\r\n" * 10)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (dripping, "the answer took longer than 0.3 seconds, tried once"),
        (dripping_head, "no answer .ReadTimeoutError"),
        (silent, "no answer .ReadTimeoutError"),
        (broken, "no answer .ProtocolError.*IncompleteRead"),
        (hanging_up, "no answer .ProtocolError"),
        (garbage, "no answer .ProtocolError.*BadStatusLine"),
    ],
)
def test_no_whole_answer(predict, message):
    refused(predict, message, timeout=0.3)


def test_redirects_are_not_followed():
    with pretending(reply(SOFT)) as (elsewhere, asked):
        error, _ = refused(say("", 307, Location=f"{elsewhere}/predict"), "it redirects, which is not followed")
        assert error.status == 307
        assert asked == []


# --- patience


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that were slept, without sleeping."""
    slept = []
    monkeypatch.setattr(transport.time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize("failure", [fail(500), fail(503), fail(429), broken, hanging_up])
def test_what_may_pass_is_tried_again(failure, pauses):
    with pretending([failure, failure, reply(SOFT)]) as (url, asked):
        oracle = client(url, retries=2, backoff=0.5)
        assert torch.equal(oracle.query(ASK), SOFT)
    assert asked == ["/info"] + 3 * ["/predict"]
    assert oracle.ledger.totals() == Totals(2, 2)
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0


def test_patience_ends(pauses):
    error, asked = refused(fail(503, "busy"), r"status 503.: busy, tried 4 times. Check that", retries=3)
    assert error.status == 503
    assert len(pauses) == 3
    assert asked.count("/predict") == 4


def test_pauses_double_up_to_a_minute_and_are_random(pauses):
    refused(fail(500), "tried 11 times", retries=10, backoff=1.0)
    for pause, longest in zip(pauses, itertools.chain([1, 2, 4, 8, 16, 32], itertools.repeat(60)), strict=False):
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == 10


def test_the_server_says_how_long_to_wait(pauses):
    with pretending([fail(429, _Retry_After="7"), fail(503, _Retry_After="soon"), reply(SOFT)]) as (url, _):
        client(url, retries=2, backoff=0.01).query(ASK)
    assert pauses[0] == 7
    assert pauses[1] < 1


def test_a_server_that_asks_for_ages_is_not_waited_for(pauses):
    refused(fail(429, "later", _Retry_After="9999"), "later .it asks to wait 9999 seconds., tried once", retries=5)
    assert pauses == []


def test_what_does_not_pass_is_not_tried_again(pauses):
    for status in (400, 403, 409, 413, 422):
        error, asked = refused(fail(status, "no way"), "no way", retries=5)
        assert error.status == status
        assert asked.count("/predict") == 1
    assert pauses == []


def test_a_spent_budget_is_told_with_its_numbers(pauses):
    with pretending(fail(402, "spent", budget=10, spent=9, asked=2)) as (url, _):
        oracle = client(url, retries=5)
        with pytest.raises(ServerBudgetExceededError, match=r"is 10 distinct inputs: 9 are spent, 2 new.* 1 are left"):
            oracle.query(ASK)
    refused(fail(402, "spent", budget="10", spent=9, asked=-2), "status 402.: spent")
    assert pauses == []


def test_what_was_answered_before_a_failure_is_kept(pauses):
    with pretending([reply(SOFT), reply(SOFT), fail(500), reply(SOFT)]) as (url, asked):
        oracle = client(url, batch_size=2)
        x = images(6)
        with pytest.raises(OracleHTTPError, match="status 500"):
            oracle.query(x)
        assert oracle.ledger.totals() == Totals(4, 4)
        assert len(oracle.query(x)) == 6
        assert asked.count("/predict") == 4  # two, the failure, and only the last again
