import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scores_by_hand import leaning, statistic
from verification_fakes import key_at

from meadef_lightning.verification.decoys import DecoyTable, seeded_permutation, seeded_stream
from meadef_lightning.verification.statistics import (
    clopper_pearson_upper,
    conformal_p_value,
    effective_sample_size,
    intraclass_correlation,
    mcnemar_exact,
    randomisation_p_value,
    summary,
    wilson_interval,
)
from meadef_lightning.watermark import DEFAULT_COMBINERS, CombinerSpec, KeySpace, WatermarkKey

SMALL = KeySpace(4, DEFAULT_COMBINERS[:3])  # 72 keys

shares = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(shares)
def test_wilson_interval_equals_its_closed_form(share):
    k, n = share
    z, p = 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson_interval(k, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


@given(shares, st.sampled_from([0.9, 0.95, 0.999]))
def test_clopper_pearson_upper_is_where_so_few_successes_become_too_rare(share, confidence):
    k, n = share
    upper = clopper_pearson_upper(k, n, confidence)
    if k == n:
        assert upper == 1
    else:
        below = sum(math.comb(n, i) * upper**i * (1 - upper) ** (n - i) for i in range(k + 1))
        assert below == pytest.approx(1 - confidence, rel=1e-6)


def test_clopper_pearson_upper_of_a_threshold_never_exceeded_in_200_models():
    assert clopper_pearson_upper(0, 200) == pytest.approx(1 - 0.05 ** (1 / 200))
    assert round(clopper_pearson_upper(0, 200), 4) == 0.0149


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_the_binomial_sum(first, second):
    n = first + second
    expected = sum(math.comb(n, i) for i in range(first, n + 1)) / 2**n
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_discordant_pairs_says_nothing():
    assert mcnemar_exact(0, 0) == 1


def test_randomisation_p_value_counts_ties_against_the_key():
    assert randomisation_p_value(0.5, [0.1, 0.5, 0.5, 0.7]) == 4 / 5
    assert randomisation_p_value(0.8, [0.1, 0.5, 0.5, 0.7]) == 1 / 5
    assert randomisation_p_value(-1, [0.1]) == 1


def test_rounding_does_not_break_ties():
    true = 0.1 + 0.2
    assert true > 0.3
    assert randomisation_p_value(true, [0.3, 0.0]) == 2 / 3


numbers = st.floats(-1, 1, width=16)


@given(numbers, st.lists(numbers, min_size=1, max_size=30), st.floats(0, 1), st.randoms())
def test_randomisation_p_value_is_a_monotone_rank(true, decoys, more, random):
    p = randomisation_p_value(true, decoys)
    assert p * (len(decoys) + 1) == pytest.approx(1 + sum(d >= true - 1e-9 for d in decoys))
    assert randomisation_p_value(true + more, decoys) <= p
    assert randomisation_p_value(true, [d + more for d in decoys]) >= p
    random.shuffle(decoys)
    assert randomisation_p_value(true, decoys) == p


def test_conformal_p_value_is_the_rank_among_models():
    assert conformal_p_value(0.9, [0.0, 0.1, 0.2]) == 1 / 4
    assert conformal_p_value(0.1, [0.0, 0.1, 0.2]) == 3 / 4


def test_correlation_recovers_the_one_of_a_beta_binomial():
    generator = np.random.default_rng(0)
    n, alpha, beta = 32, 2.0, 6.0
    hits = generator.binomial(n, generator.beta(alpha, beta, 20_000))
    assert intraclass_correlation(hits, n) == pytest.approx(1 / (alpha + beta + 1), abs=0.01)
    assert intraclass_correlation(generator.binomial(n, 0.3, 20_000), n) < 0.002


def test_correlation_at_its_ends():
    assert intraclass_correlation([0, 32, 0, 32], 32) == 1  # all answers of a cell agree
    assert intraclass_correlation([8, 8, 8], 32) == 0
    assert intraclass_correlation([0, 0, 0], 32) == 0
    assert intraclass_correlation([32, 32], 32) == 0


def test_a_thousand_correlated_answers_are_worth_few():
    assert effective_sample_size(1000, 0.05) == pytest.approx(19.63, abs=0.01)
    assert effective_sample_size(1000, 0.0) == 1000
    assert effective_sample_size(1000, 1.0) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 2), "3 successes in 2 trials"),
        (lambda: clopper_pearson_upper(0, 0), "trials >= 1"),
        (lambda: mcnemar_exact(-1, 2), "at least 0"),
        (lambda: randomisation_p_value(0.1, []), "B >= 1"),
        (lambda: randomisation_p_value(math.nan, [0.1]), "NaN"),
        (lambda: randomisation_p_value(0.1, [math.inf]), "NaN or infinite"),
        (lambda: conformal_p_value(0.1, []), "at least one independent model"),
        (lambda: intraclass_correlation([1], 5), "at least two cells"),
        (lambda: intraclass_correlation([1, 6], 5), "between 0 and 5"),
        (lambda: effective_sample_size(5, 1.5), "rho"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_seeded_stream_is_shake_256_of_its_context():
    expected = hashlib.shake_256(b'["pairs",3]').digest(16)
    assert seeded_stream(2, "pairs", 3).tolist() == [int.from_bytes(expected[i : i + 8], "little") for i in (0, 8)]
    assert sorted(seeded_permutation(50, "x").tolist()) == list(range(50))
    assert seeded_permutation(50, "x").tolist() != seeded_permutation(50, "y").tolist()


def test_summary_of_an_arithmetic_sequence():
    values = summary(torch.arange(101).double())
    assert values == pytest.approx(
        {"mean": 50, "std": math.sqrt((101**2 - 1) / 12), "median": 50, "q95": 95, "q99": 99, "max": 100}
    )


def random_counts(table, samples, seed, few_classes=False):
    """Random answers; concentrated ones give extreme statistics and many ties."""
    generator = np.random.default_rng(seed)
    cells, classes = len(table.cells), table.key.num_classes
    shares = generator.dirichlet(np.full(classes, 0.2 if few_classes else 2.0), size=cells)
    return torch.from_numpy(generator.multinomial(samples, shares)).long()


def by_hand(table, counts, key):
    """T of one key, from counts."""
    return statistic(leaning(table.cells, counts.double() / counts.sum(1, keepdim=True)), key)


@pytest.mark.parametrize("decoys", [72, 9999])
def test_enumerated_statistics_equal_the_definition_for_every_key(decoys):
    key = key_at(SMALL, 41)
    table = DecoyTable(key, decoys)
    assert table.enumerated
    counts = random_counts(table, 5, seed=1)
    true, others = table.statistics(table.shares(counts))
    assert true == pytest.approx(by_hand(table, counts, SMALL.key_at(41)))
    expected = [by_hand(table, counts, SMALL.key_at(i)) for i in range(SMALL.size) if i != 41]
    assert sorted(others.tolist()) == pytest.approx(sorted(expected))


def test_sampled_statistics_equal_the_definition_for_every_decoy():
    key = WatermarkKey.draw(30, "secret")
    table = DecoyTable(key, 100, seed=3)
    assert not table.enumerated
    assert table.drawn.shape == (100, 4)
    asked = {tuple(pair) for pair in table.pairs.tolist()}
    back = [(b, a) in asked for a, b, *_ in table.drawn.tolist()]
    assert 0 < sum(back) < 100  # with and without the reversed sources
    counts = random_counts(table, 4, seed=2)
    true, others = table.statistics(table.shares(counts))
    a, b = key.source_classes
    assert true == pytest.approx(by_hand(table, counts, (a, b, key.target_class, table.way)))
    assert others.tolist() == pytest.approx([by_hand(table, counts, decoy) for decoy in table.drawn.tolist()])


def test_cells_cover_the_key_and_the_decoys_in_sorted_order():
    key = WatermarkKey.draw(30, "secret")
    table = DecoyTable(key, 100, seed=3)
    cells = [tuple(cell) for cell in table.cells.tolist()]
    assert cells == sorted(set(cells))
    pairs = {tuple(pair) for pair in table.drawn[:, :2].tolist()} | {key.source_classes}
    assert set(cells) == {(a, b, way) for a, b in pairs for way in range(8)}
    assert len(DecoyTable(key_at(SMALL, 0)).cells) == 4 * 3 * 3


def test_decoys_depend_on_seed_and_salt_and_are_spread_over_the_space():
    space = KeySpace(30)
    key, other = key_at(space, 17), key_at(space, 17, salt="6" * 32)
    assert torch.equal(DecoyTable(key, 50, 1).drawn, DecoyTable(key, 50, 1).drawn)
    assert not torch.equal(DecoyTable(key, 50, 1).drawn, DecoyTable(key, 50, 2).drawn)
    assert not torch.equal(DecoyTable(key, 50, 1).drawn, DecoyTable(other, 50, 1).drawn)
    drawn = DecoyTable(key, 20_000).drawn
    ways = torch.bincount(drawn[:, 3], minlength=8)
    assert float(((ways - 2500) ** 2 / 2500).sum()) < 24.3  # chi-squared, 7 degrees of freedom, p = .001
    targets = torch.bincount(drawn[:, 2], minlength=30).double()
    assert float(((targets - 20_000 / 30) ** 2 / (20_000 / 30)).sum()) < 58.3  # 29 degrees of freedom


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 32]), st.booleans())
def test_p_is_exact_when_the_key_is_uniform_whatever_the_suspect_answers(seed, samples, few_classes):
    """Over all keys of the space, at most a share a of the p-values may be at or below a."""
    counts = random_counts(DecoyTable(key_at(SMALL, 0)), samples, seed, few_classes)
    tables = [DecoyTable(key_at(SMALL, i)) for i in range(SMALL.size)]
    p = np.array([randomisation_p_value(*table.statistics(table.shares(counts))) for table in tables])
    for rank in range(1, SMALL.size + 1):
        assert (p <= rank / SMALL.size + 1e-12).sum() <= rank


def test_p_is_exact_with_sampled_decoys():
    """2,000 uniform keys with their own decoys against one fixed suspect that has favourite answers."""
    generator = np.random.default_rng(5)
    whole = DecoyTable(key_at(SMALL, 0))
    counts = random_counts(whole, 8, 7, few_classes=True)
    row = {tuple(cell): i for i, cell in enumerate(whole.cells.tolist())}
    p = []
    for _ in range(2000):
        table = DecoyTable(key_at(SMALL, int(generator.integers(SMALL.size)), salt=generator.bytes(16).hex()), 19)
        asked = counts[[row[tuple(cell)] for cell in table.cells.tolist()]]
        p.append(randomisation_p_value(*table.statistics(table.shares(asked))))
    for level in (0.05, 0.1, 0.25, 0.5):
        share = np.mean(np.array(p) <= level + 1e-12)
        assert share <= level + 4 * math.sqrt(level * (1 - level) / 2000)
        assert share >= level / 3  # and it has not become a test that never rejects


def test_a_way_outside_the_space_is_added_and_no_longer_exact():
    band = CombinerSpec("meadef_lightning.watermark.combiners.Band", {})
    key = WatermarkKey((0, 1), 2, 4, combiner=band, space=DEFAULT_COMBINERS[:3])
    table = DecoyTable(key)
    assert table.space.combiners == (*DEFAULT_COMBINERS[:3], band)
    assert table.way == 3
    assert not table.exact
    assert not DecoyTable(WatermarkKey((0, 1), 2, 4)).exact
    assert DecoyTable(key_at(SMALL, 3)).exact


def test_correlation_leaves_the_true_key_out():
    key = key_at(SMALL, 41)
    table = DecoyTable(key)
    a, b, target, way = SMALL.key_at(41)
    counts = torch.zeros(len(table.cells), 4, dtype=torch.int64)
    counts[torch.arange(len(counts)), table.cells[:, 0]] = 6
    mine = (table.cells == torch.tensor([a, b, way])).all(1)
    counts[mine] = 6 * torch.nn.functional.one_hot(torch.tensor([target]), 4)
    assert table.correlation(counts) == 0  # nobody else ever answers anything but the first source
    assert table.correlation(counts // 6) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[1:], "shape"),
        (lambda c: c.double(), "int64"),
        (lambda c: c - c, "at least one"),
        (lambda c: torch.cat([c[:1] + 1, c[1:]]), "same number"),
        (lambda c: torch.cat([c[:1] + torch.tensor([5, -5, 0, 0]), c[1:]]), "same number"),
    ],
)
def test_bad_tables_are_refused(change, message):
    table = DecoyTable(key_at(SMALL, 0))
    counts = torch.ones(len(table.cells), 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        table.shares(change(counts))


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t[1:], lambda t: t / 0, lambda t: t.long()])
def test_tables_that_are_no_numbers_are_refused(change):
    table = DecoyTable(key_at(SMALL, 0))
    shares = table.shares(torch.ones(len(table.cells), 4, dtype=torch.int64))
    for bad in ((change(shares),), (shares, [shares, change(shares)])):
        with pytest.raises(ValueError, match=r"finite float64 of shape \(36, 4\)"):
            table.statistics(*bad)


def test_impossible_comparisons_are_refused():
    key = key_at(SMALL, 0)
    with pytest.raises(ValueError, match="decoys=0"):
        DecoyTable(key, 0)
    with pytest.raises(ValueError, match="seed=-1"):
        DecoyTable(key, 9, -1)
    with pytest.raises(ValueError, match="at least two ways"):
        DecoyTable(key_at(KeySpace(4, DEFAULT_COMBINERS[:1]), 0))
