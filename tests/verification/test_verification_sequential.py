from fractions import Fraction
from math import comb, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.verification.sequential import (
    SCREENING_NOTE,
    SequentialTest,
    e_process,
    log_e_value,
    sequential_test,
)

counts = st.integers(0, 40)
priors = st.sampled_from([(1.0, 1.0), (0.5, 0.5), (3.0, 1.0)])


@given(counts, counts)
def test_uniform_mixture_equals_its_sum_in_fractions(s, f):
    """2^(s+f) · 2·∫ θ^s (1-θ)^f over [1/2, 1], with (1-θ)^f written out."""
    total = sum(Fraction((-1) ** i * comb(f, i), s + i + 1) * (1 - Fraction(1, 2) ** (s + i + 1)) for i in range(f + 1))
    assert log_e_value(s, f) == pytest.approx(log(2 ** (s + f + 1) * total), abs=1e-8)


@pytest.mark.parametrize("prior", [(1.0, 2000.0), (5.0, 1e5)])
def test_a_prior_that_bets_on_nothing_is_refused(prior):
    """Its weight above one half is 0 in double precision, and so would be every e-value divided by it: NaN, or infinite evidence."""
    assert stats.beta.sf(0.5, *prior) == 0
    with pytest.raises(ValueError, match="leaves no weight to rates above one half"):
        log_e_value(3, 0, prior)
    with pytest.raises(ValueError, match="leaves no weight"):
        SequentialTest(KEY, FakeData(), prior=prior)


@given(counts, counts, priors)
def test_e_value_is_the_mixture_of_likelihood_ratios(s, f, prior):
    density = stats.beta(*prior)

    def ratio(theta):
        return density.pdf(theta) / density.sf(0.5) * (2 * theta) ** s * (2 * (1 - theta)) ** f

    middle = min(max(s / max(s + f, 1), 0.51), 0.99)
    expected = sum(integrate.quad(ratio, *ends, limit=200)[0] for ends in ((0.5, middle), (middle, 1)))
    assert np.exp(log_e_value(s, f, prior)) == pytest.approx(expected, rel=1e-5)


@given(counts, counts, priors, st.floats(0, 0.5))
def test_one_more_pair_gains_nothing_on_average(s, f, prior, fair):
    """A supermartingale under the null, and a martingale where the coin is fair."""
    now, won, lost = (np.exp(log_e_value(*pair, prior)) for pair in ((s, f), (s + 1, f), (s, f + 1)))
    assert (won + lost) / 2 == pytest.approx(now, rel=1e-9)
    assert fair * won + (1 - fair) * lost <= now * (1 + 1e-9)


@pytest.mark.parametrize("coin", [0.5, 0.4, 0.1])
@pytest.mark.parametrize(("alpha", "prior"), [(0.05, (1.0, 1.0)), (0.2, (0.5, 0.5)), (0.001, (1.0, 1.0))])
def test_the_chance_of_ever_crossing_is_at_most_alpha(coin, alpha, prior):
    """Exact: the distribution of the pairs won, among runs that have not crossed, one flip after the other."""
    alive, crossed = np.array([1.0]), 0.0
    for n in range(1, 1001):
        flipped = np.zeros(n + 1)
        flipped[1:] += coin * alive
        flipped[:-1] += (1 - coin) * alive
        won = np.arange(n + 1)
        over = log_e_value(won, n - won, prior) >= -log(alpha)
        crossed += flipped[over].sum()
        flipped[over] = 0
        alive = flipped
    assert crossed + alive.sum() == pytest.approx(1)
    assert crossed <= alpha
    if coin == 0.5 and alpha > 0.01:
        assert crossed > alpha / 4  # the bound is not kept by never rejecting


def test_concordant_pairs_leave_the_capital_alone():
    trigger, control = [True, True, False, True, False], [False, True, False, False, True]
    assert e_process(trigger, control).tolist() == log_e_value([1, 1, 1, 2, 2], [0, 0, 0, 0, 1]).tolist()
    assert e_process([], []).shape == (0,)
    assert log_e_value(0, 0) == 0
    assert log_e_value(0, 2000) < -7
    assert np.exp(log_e_value(0, 5000)) >= 0  # and no NaN where nothing is left


def test_the_stream_is_left_where_the_evidence_suffices():
    drawn = []

    def stream():
        for i in range(10):
            drawn.append(i)
            yield [True] * 6, [False] * 6

    result = sequential_test(stream())
    # 13 pairs in a row make 1,170 at alpha = 0.001
    assert log_e_value(12, 0) < log(1000) < log_e_value(13, 0)
    assert (drawn, result.pairs, result.queries, result.stopped) == ([0, 1, 2], 18, 36, "evidence")
    assert result.p_value == pytest.approx(1 / np.exp(log_e_value(18, 0)))


def test_a_crossing_within_a_batch_counts():
    """The bound holds at any time, so what a later pair of the same batch loses is not lost."""
    result = sequential_test([([True] * 13 + [False] * 5, [False] * 13 + [True] * 5)])
    assert (result.stopped, result.log_e) == ("evidence", pytest.approx(float(log_e_value(13, 0))))
    assert float(log_e_value(13, 5)) < log(1000)


class Counting(Thief):
    """Counts what it is asked, and notes the batches and its mode."""

    def __init__(self, key, share):
        super().__init__(key, share)
        self.batches, self.modes = [], set()

    def forward(self, x):
        self.batches.append(x)
        self.modes.add((self.training, torch.is_grad_enabled()))
        return super().forward(x)


def test_a_strong_watermark_stops_early():
    thief = Counting(KEY, share=0.9)
    thief.train()
    result = SequentialTest(KEY, FakeData(per_class=30), budget=512, batch_pairs=4).run(thief)
    assert (result.stopped, result.note) == ("evidence", SCREENING_NOTE)
    assert result.queries == sum(map(len, thief.batches)) == 2 * result.pairs < 60
    assert (result.only_control, thief.training, thief.modes) == (0, True, {(False, False)})
    assert result.only_trigger > 0.7 * result.pairs
    assert set(result.to_dict()) >= {"p_value", "queries", "note"}


def test_triggers_and_controls_are_mixed():
    thief = Counting(KEY, share=1.0)
    SequentialTest(KEY, FakeData(per_class=30), batch_pairs=16).run(thief)
    hits = [thief.labels(x) == KEY.target_class for x in thief.batches]
    assert all(0 < int(hit[:16].sum()) < 16 for hit in hits)
    assert any(not torch.equal(hits[0], hit) for hit in hits[1:]) or len(hits) == 1


def test_an_independent_suspect_costs_the_budget_and_no_more():
    class Box:
        asked = 0

        def query(self, x):
            self.asked += len(x)
            return Independent()(x)

    box = Box()
    result = SequentialTest(KEY, FakeData(per_class=30), budget=101, batch_pairs=8).run(box)
    assert (result.stopped, result.queries, box.asked, result.pairs) == ("budget", 100, 100, 25)
    assert (result.p_value, result.log_e) == (1, 0)
    model = SequentialTest(KEY, FakeData(per_class=30), budget=101, batch_pairs=8).run(Independent())
    assert (model.queries, model.pairs) == (100, 50)  # a module is asked no cover
    with pytest.raises(ValueError, match=r"budget=3 does not pay for one pair and its cover, 4 queries"):
        SequentialTest(KEY, FakeData(per_class=30), budget=3).run(box)


class Watching:
    """A black box that keeps what it is asked."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def query(self, x):
        self.batches.append(x)
        return self.model(x)


def rows(x):
    return [row.numpy().tobytes() for row in x]


@pytest.mark.parametrize("cover", [0, 1, 2, 5])
def test_a_black_box_is_asked_cover_that_changes_no_count(cover):
    """The pairs are those that a module is asked, in the same batches; beside them lie composites of other classes and natural samples."""
    data, options = FakeData(per_class=30), {"budget": 60, "batch_pairs": 5, "cover": cover}
    box, thief = Watching(Thief(KEY, share=0.05)), Counting(KEY, share=0.05)
    hidden = SequentialTest(KEY, data, **options).run(box)
    plain = SequentialTest(KEY, data, **{**options, "budget": 2 * hidden.pairs}).run(thief)
    assert hidden.pairs == 60 // (2 + cover)
    assert hidden.queries == (2 + cover) * hidden.pairs == sum(map(len, box.batches))
    assert (hidden.only_trigger, hidden.only_control, hidden.log_e) == (
        plain.only_trigger,
        plain.only_control,
        plain.log_e,
    )
    natural, pairs = set(rows(data.tensors("test")[0])), rows(torch.cat(thief.batches))
    asked = [rows(batch) for batch in box.batches]
    everything = [row for batch in asked for row in batch]
    assert len(set(everything)) == len(everything)  # nothing twice
    assert set(pairs) <= set(everything)
    assert sum(row in natural for row in everything) == cover * hidden.pairs // 2
    if cover:
        others = [row for row in everything if row not in natural and row not in set(pairs)]
        assert len(others) == cover * hidden.pairs - cover * hidden.pairs // 2
        first = [[row in set(pairs) for row in batch] for batch in asked]
        assert any(not all(batch[: 2 * 5]) for batch in first)  # mixed, not appended


@pytest.mark.filterwarnings("ignore:Class . has 12 sample")
def test_where_natural_samples_end_cover_ends():
    box = Watching(Independent())
    result = SequentialTest(KEY, FakeData(), budget=2000, batch_pairs=8, cover=4).run(box)
    # 144 pairs of 12 samples a class; 84 natural samples instead of 288
    assert result.pairs == 144
    assert result.queries == 288 + 288 + 84


def test_the_same_seed_asks_the_same():
    runs = []
    for seed in (0, 0, 1):
        thief = Counting(KEY, share=0.5)
        result = SequentialTest(KEY, FakeData(per_class=30), seed=seed).run(thief)
        runs.append((result, torch.cat(thief.batches)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1][:16], runs[2][1][:16])


@pytest.mark.filterwarnings("ignore:Class . has 12 sample")
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="alpha=0"):
        SequentialTest(KEY, FakeData(), alpha=0)
    with pytest.raises(ValueError, match="budget=1"):
        SequentialTest(KEY, FakeData(), budget=1)
    with pytest.raises(ValueError, match="prior"):
        SequentialTest(KEY, FakeData(), prior=(0.0, 1.0))
    with pytest.raises(ValueError, match="at least 0"):
        log_e_value(-1, 0)
    with pytest.raises(ValueError, match="shape"):
        e_process([True], [True, False])

    class Nan(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 7), float("nan"))

    with pytest.raises(ValueError, match="no valid answer"):
        SequentialTest(KEY, FakeData()).run(Nan())
