"""The ledger against brute-force counts: what is an input, what is counted, what a budget refuses, and what is answered."""

import hashlib
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_victim import POOL, Victim, truth

from meadef_lightning.oracle import BudgetExceededError, LedgerError, QueryLedger, Totals, row_digests

BATCHES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), max_size=8)


# --- identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_digest_is_sha256_over_dtype_shape_and_bytes(dtype):
    x = torch.randn(3, 2, 4, 5).to(dtype)
    head = f"{dtype}|(2, 4, 5)|".encode()
    assert row_digests(x) == [hashlib.sha256(head + np.ascontiguousarray(row).tobytes()).digest() for row in x.numpy()]
    assert row_digests(x.transpose(2, 3).contiguous().transpose(2, 3)) == row_digests(x)


def test_digest_separates_shape_dtype_and_value():
    x = torch.zeros(1, 1, 2, 8)
    others = [x.view(1, 1, 8, 2), x.view(1, 2, 1, 8), x.to(torch.bfloat16), x.int(), -x, x + 1e-7]
    assert len({row_digests(other)[0] for other in [x, *others]}) == 7
    assert row_digests(torch.zeros(0, 1, 2, 2)) == []


# --- counting


@settings(deadline=None)
@given(BATCHES)
def test_totals_equal_brute_force_counts(batches):
    ledger, victim = QueryLedger(), Victim()
    for rows in batches:
        assert torch.equal(victim.ask(ledger, rows), truth(POOL[rows]))
    asked = [row for rows in batches for row in rows]
    assert ledger.totals() == Totals(distinct=len(set(asked)), calls=len(asked))
    assert sorted(victim.seen) == sorted(set(asked))
    assert ledger.remaining is None


@settings(max_examples=25, deadline=None)
@given(BATCHES, st.lists(st.integers(0, 8), max_size=4), st.booleans())
def test_totals_survive_restarts(batches, restarts, clean):
    with tempfile.TemporaryDirectory() as folder:
        path, victim = Path(folder) / "ledger.sqlite", Victim()
        ledger = QueryLedger(path)
        for turn, rows in enumerate(batches):
            if turn in restarts:
                if clean:
                    ledger.close()
                ledger = QueryLedger(path)
            assert torch.equal(victim.ask(ledger, rows), truth(POOL[rows]))
        asked = [row for rows in batches for row in rows]
        assert ledger.totals() == Totals(len(set(asked)), len(asked))
        assert sorted(victim.seen) == sorted(set(asked))
        ledger.close()


@settings(deadline=None)
@given(BATCHES, st.integers(0, 10))
def test_budget_refuses_whole_batches_and_changes_nothing(batches, budget):
    ledger, victim, paid, calls = QueryLedger(budget=budget), Victim(), set(), 0
    for rows in batches:
        new = set(rows) - paid
        before = list(victim.seen)
        if len(paid) + len(new) > budget:
            for attempt in (
                lambda rows=rows: ledger.check(row_digests(POOL[rows])),
                lambda rows=rows: victim.ask(ledger, rows),
            ):
                with pytest.raises(BudgetExceededError) as caught:
                    attempt()
                assert (caught.value.budget, caught.value.spent, caught.value.asked) == (budget, len(paid), len(new))
            assert victim.seen == before
        else:
            assert ledger.check(row_digests(POOL[rows])) == len(new)
            victim.ask(ledger, rows)
            paid, calls = paid | new, calls + len(rows)
        assert ledger.totals() == Totals(len(paid), calls)
        assert ledger.remaining == budget - len(paid)
    if paid:  # answers already paid for stay available
        assert torch.equal(victim.ask(ledger, sorted(paid)), truth(POOL[sorted(paid)]))


def test_budget_error_says_what_to_do_and_travels_between_processes():
    ledger, victim = QueryLedger(budget=3), Victim()
    victim.ask(ledger, [0, 1])
    with pytest.raises(
        BudgetExceededError, match=r"is 3 distinct inputs: 2 are spent, 4 new ones were asked, 1 are left.*larg"
    ) as e:
        victim.ask(ledger, [1, 2, 3, 4, 5, 2])
    copy = pickle.loads(pickle.dumps(e.value))  # noqa: S301 - our own bytes
    assert str(copy) == str(e.value)
    assert (copy.budget, copy.spent, copy.asked) == (3, 2, 4)


def test_budget_is_raised_by_reopening(tmp_path):
    victim = Victim()
    ledger = QueryLedger(tmp_path / "ledger.sqlite", budget=2)
    victim.ask(ledger, [0, 1])
    with pytest.raises(BudgetExceededError):
        victim.ask(ledger, [0, 1, 2])
    victim.ask(QueryLedger(tmp_path / "ledger.sqlite", budget=3), [0, 1, 2])
    assert victim.seen == [0, 1, 2]
    with pytest.raises(ValueError, match="budget must be at least 0, got -1"):
        QueryLedger(budget=-1)


def test_more_rows_than_one_statement_holds():
    x = torch.arange(2500, dtype=torch.float32).reshape(-1, 1, 1, 1)
    ledger = QueryLedger()
    digests = row_digests(x)
    ledger.settle(digests[:2000], lambda indices: x[indices].flatten(1))
    assert ledger.check(digests) == 500
    assert torch.equal(
        ledger.settle(digests, lambda i: x[2000:].flatten(1) if i == list(range(2000, 2500)) else x), x.flatten(1)
    )


@pytest.mark.parametrize("answers", [torch.tensor([3, 1, 2]), torch.randn(3, 7), torch.randn(3, 2, 2)])
def test_answers_come_back_bit_for_bit(tmp_path, answers):
    digests = row_digests(POOL[:3])
    QueryLedger(tmp_path / "l").settle(digests, lambda indices: answers[indices])
    again = QueryLedger(tmp_path / "l").settle(digests[::-1], lambda indices: pytest.fail("asked twice"))
    assert again.dtype == answers.dtype
    assert torch.equal(again, answers.flip(0))
    again[0] = 0  # the caller's own, not a view of the cache
    assert torch.equal(QueryLedger(tmp_path / "l").settle(digests, lambda indices: pytest.fail("asked twice")), answers)


# --- failures of the victim


def test_a_failing_batch_is_not_counted():
    ledger, victim = QueryLedger(), Victim()
    victim.ask(ledger, [0, 1])

    def fail(indices):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.settle(row_digests(POOL[:4]), fail)
    assert ledger.totals() == Totals(2, 2)
    victim.ask(ledger, [0, 1, 2, 3])
    assert victim.seen == [0, 1, 2, 3]


def test_answers_of_another_form_are_refused():
    ledger = QueryLedger()
    ledger.settle(row_digests(POOL[:2]), lambda indices: torch.zeros(2, 5))
    with pytest.raises(
        LedgerError, match=r'holds answers of the form \["float32", \[5\]\], .* now gives \["int64", \[\]\]'
    ):
        ledger.settle(row_digests(POOL[2:4]), lambda indices: torch.zeros(2, dtype=torch.int64))
    with pytest.raises(LedgerError, match=r"for 2 rows it got float64 of shape \(2, 5\)"):
        ledger.settle(row_digests(POOL[2:4]), lambda indices: torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(LedgerError, match=r"for 2 rows it got float32 of shape \(1, 5\)"):
        ledger.settle(row_digests(POOL[2:4]), lambda indices: torch.zeros(1, 5))
    with pytest.raises(ValueError, match="empty batch"):
        ledger.settle([], lambda indices: torch.zeros(0, 5))
    assert ledger.totals() == Totals(2, 2)
