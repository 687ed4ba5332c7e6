"""API keys, limits and the token bucket of a served oracle."""

import pytest
from http_fakes import API_KEY
from hypothesis import given, settings
from hypothesis import strategies as st

from meadef_lightning.oracle.clients import ServerLimits, TokenBucket, check_api_keys, read_api_keys


def test_token_bucket_by_hand():
    now = [0.0]
    bucket = TokenBucket(10.0, 20.0, clock=lambda: now[0])
    assert [bucket.take(15), bucket.take(5)] == [0, 0]
    assert bucket.take(5) == pytest.approx(0.5)
    now[0] = 0.4
    assert bucket.take(5) == pytest.approx(0.1)
    now[0] = 0.5
    assert bucket.take(5) == 0
    now[0] = 100.0  # no more than its capacity is saved up
    assert bucket.take(20) == 0
    assert bucket.take(1) == pytest.approx(0.1)
    assert TokenBucket(None, 1.0).take(10**9) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 8)), max_size=60), st.floats(0.1, 50))
def test_token_bucket_never_lets_more_through_than_rate_and_capacity(asked, rate):
    now, passed = [0.0], 0
    bucket = TokenBucket(rate, 8.0, clock=lambda: now[0])
    for pause, rows in asked:
        now[0] += pause
        wait = bucket.take(rows)
        passed += rows if wait == 0 else 0
        assert passed <= 8 + rate * now[0] + 1e-6
        if wait:  # what it promises, it keeps
            now[0] += wait * (1 + 1e-9)
            assert bucket.take(rows) == 0
            passed += rows


@pytest.mark.parametrize(
    "limits",
    [
        {"budget": -1}, {"rows_per_request": 0}, {"waiting": 0}, {"rows_per_second": 0}, {"rows_per_second": float("nan")},
        {"body_seconds": float("inf")},
    ],
)  # fmt: skip
def test_limits_out_of_range(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        ServerLimits(**limits)


def test_reading_api_keys():
    text = f"# clients\n\nalice:{API_KEY}\n bob : {API_KEY}:2 \n"
    assert read_api_keys(text, "keys.txt") == {"alice": API_KEY, "bob": f"{API_KEY}:2"}
    assert read_api_keys(f"a:{API_KEY},b:{API_KEY}2", "the environment") == {"a": API_KEY, "b": f"{API_KEY}2"}
    for text, message in [
        ("", "keys.txt: A server needs at least one"),
        (f"a:{API_KEY}\n{API_KEY}", "Line 2 of keys.txt is not of the form"),
        (f"a:{API_KEY}\na:{API_KEY}2", "Line 2 of keys.txt .*repeats a name"),
        (f"{API_KEY}:alice", "keys.txt: The API key of client number 1"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            read_api_keys(text, "keys.txt")
        assert API_KEY not in str(error.value)


def test_keys_that_need_quoting_are_refused():
    for key in ("has a blank 0123456789", "comma,comma,comma,comma", "ünïcode-0123456789", "line\nbreak-0123456789"):
        with pytest.raises(ValueError, match="visible ASCII characters without a comma"):
            check_api_keys({"a": key})
