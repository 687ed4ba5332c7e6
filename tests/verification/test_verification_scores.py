"""The statistic of every key at once: exact, indifferent to names and to the order of the queries, and better than single cells."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scores_by_hand import leaning, statistic
from verification_fakes import KEY, FakeData, Thief, key_at

from meadef_lightning.verification import VerificationDataModule, judge
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.scores import key_scores, possible_targets, reversed_pairs
from meadef_lightning.verification.statistics import randomisation_p_value
from meadef_lightning.watermark import DEFAULT_COMBINERS, KeySpace

SPACE = KeySpace(5, DEFAULT_COMBINERS[:2])  # 120 keys


def all_pairs(classes):
    return torch.tensor([(a, b) for a in range(classes) for b in range(classes) if a != b])


def whole_space(counts):
    """The p-value of every key of the space in turn, were it the true one."""
    tables = [DecoyTable(key_at(SPACE, index)) for index in range(SPACE.size)]
    return np.array([randomisation_p_value(*table.statistics(table.shares(counts))) for table in tables])


some_pairs = st.sets(st.sampled_from(all_pairs(11).tolist()).map(tuple), min_size=1, max_size=60).map(sorted)


@settings(max_examples=30, deadline=None)
@given(some_pairs, st.integers(2, 4), st.sampled_from([0.0, 1.0, 2.0, 3.5]), st.integers(0, 2**32))
def test_every_key_of_any_asked_pairs_has_the_statistic_that_is_documented(pairs, ways, weight, seed):
    """Whole rows or single pairs, reversed ones asked or not: against loops."""
    pairs = torch.tensor(pairs)
    table = torch.from_numpy(np.random.default_rng(seed).random((len(pairs), ways, 11)))
    cells = torch.cat([pairs.repeat_interleave(ways, 0), torch.arange(ways).repeat(len(pairs))[:, None]], dim=1)
    leans, found = leaning(cells, table.flatten(0, 1)), key_scores(table, pairs, weight)
    for row, (a, b) in enumerate(pairs.tolist()):
        for target in {*range(11)} - {a, b}:
            for way in range(ways):
                expected = statistic(leans, (a, b, target, way), weight)
                assert float(found[row, way, target]) == pytest.approx(expected, abs=1e-12)
    some = torch.tensor([2, 3, 7, 10])
    torch.testing.assert_close(key_scores(table[..., some], pairs, weight, some), found[..., some])


@given(some_pairs)
def test_reversed_pairs_are_found_or_known_to_be_missing(pairs):
    rows, there = reversed_pairs(torch.tensor(pairs))
    for (a, b), row, found in zip(pairs, rows.tolist(), there.tolist(), strict=True):
        assert found == ((b, a) in pairs)
        assert not found or pairs[row] == (b, a)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_p_values_of_all_keys_are_uniform_where_nothing_ties(seed):
    """Exactness by enumeration: with a uniform key, each of 1/N … N/N has probability 1/N, whatever the suspect answers."""
    cells = len(DecoyTable(key_at(SPACE, 0)).cells)
    generator = np.random.default_rng(seed)
    counts = torch.from_numpy(generator.multinomial(10**9, generator.dirichlet(np.ones(5), size=cells)))
    ranks, whole = np.sort(whole_space(counts) * SPACE.size), np.arange(1, SPACE.size + 1)
    assert (ranks >= whole - 1e-6).all()
    assert (ranks > whole + 1e-6).sum() <= 2  # two keys may come so near that they count as tied, against both


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3]))
def test_p_values_of_all_keys_are_conservative_where_keys_tie(seed, samples):
    """Few answers a cell tie a lot. A tie must count against every key in it: no p-value is below the rank that it stands for."""
    cells = len(DecoyTable(key_at(SPACE, 0)).cells)
    counts = torch.from_numpy(np.random.default_rng(seed).multinomial(samples, [0.9, 0.1, 0, 0, 0], size=cells))
    p = np.sort(whole_space(counts))
    assert (p >= np.arange(1, SPACE.size + 1) / SPACE.size - 1e-12).all()
    assert len(np.unique(p)) < SPACE.size


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.permutations(range(3)), st.integers(0, 2**32))
def test_renamed_classes_and_ways_give_the_renamed_scores(classes, ways, seed):
    pairs = all_pairs(6)
    shares = torch.from_numpy(np.random.default_rng(seed).random((30, 3, 6)))
    classes, ways = torch.tensor(classes), torch.tensor(ways)
    place = {tuple(pair): i for i, pair in enumerate(pairs.tolist())}
    to = torch.tensor([place[tuple(pair)] for pair in classes[pairs].tolist()])
    renamed = torch.empty_like(shares)
    renamed[to[:, None, None], ways[:, None], classes] = shares
    scores = key_scores(renamed, pairs)[to[:, None, None], ways[:, None], classes]
    mask = possible_targets(pairs, 6)[:, None].expand(30, 3, 6)
    torch.testing.assert_close(scores[mask], key_scores(shares, pairs)[mask])


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_verdict_does_not_depend_on_the_order_of_the_queries(random):
    thief = Thief(KEY, share=0.6)
    questions = VerificationDataModule(KEY, FakeData(), samples=40, decoy_samples=2)
    questions.setup("predict")

    def asked(shuffle):
        answers = []
        for loader in questions.predict_dataloader():
            items = list(range(len(loader.dataset)))
            if shuffle:
                random.shuffle(items)
            size = random.randint(50, 200) if shuffle else len(items)
            answer = torch.empty(len(items), dtype=torch.int64)
            for start in range(0, len(items), size):
                x, places = loader.dataset.__getitems__(items[start : start + size])
                answer[places] = thief(x).argmax(1)
            answers.append(answer)
        return judge(questions.responses(answers), KEY)

    assert asked(shuffle=True) == asked(shuffle=False)


def test_scores_are_bounded_and_come_near_their_bounds():
    pairs = all_pairs(12)
    shares = torch.zeros(132, 2, 12, dtype=torch.float64)
    shares[(pairs == torch.tensor([0, 1])).any(1), 0, 5] = 1.0  # a full cross
    scores = key_scores(shares, pairs)
    centre, reverse = (int((pairs == torch.tensor(pair)).all(1).nonzero()) for pair in ([0, 1], [1, 0]))
    assert float(scores[centre, 0, 5]) == float(scores.max())
    mean = (2 * 11 - 1 - 2) / 110  # pairs of the cross without class 5, of all those without it
    assert float(scores[centre, 0, 5]) == pytest.approx((1 - mean + 4 * (1 - mean / 2)) / 7)
    shares[reverse, 1, 5] = 1.0  # and the reversed sources in the only other way
    best = (1 - mean + 4 * (1 - mean / 2) + 2 * (1 - 1 / 110)) / 7
    assert best > 0.92
    scores = key_scores(shares, pairs)
    assert float(scores[centre, 0, 5]) == float(scores.max()) == pytest.approx(best)
    assert float(key_scores(1 - shares, pairs)[centre, 0, 5]) == pytest.approx(-best)


@given(some_pairs, st.integers(2, 3), st.floats(0, 1), st.integers(0, 2**32))
def test_scores_of_extreme_tables_stay_in_their_bounds(pairs, ways, share, seed):
    table = torch.from_numpy(np.random.default_rng(seed).random((len(pairs), ways, 11)) < share).double()
    assert float(key_scores(table, torch.tensor(pairs)).abs().max()) <= 1 + 1e-12


@given(some_pairs, st.integers(0, 2**32))
def test_a_reversed_pair_counts_in_other_ways_alone(pairs, seed):
    """What it says in the key's own way is left out: there it is another key's cell."""
    a, b = pairs[seed % len(pairs)]
    pairs = sorted({*pairs, (b, a)})
    row, back = pairs.index((a, b)), pairs.index((b, a))
    table = torch.from_numpy(np.random.default_rng(seed).random((len(pairs), 3, 11)))
    target = next(t for t in range(11) if t not in (a, b))
    asked = sum(target not in pair for pair in pairs)
    before = key_scores(table, torch.tensor(pairs))[row, 1, target]
    beside = [sum(pair[i] == (a, b)[i] and target not in pair for pair in pairs) - 1 for i in (0, 1)]
    mean = (
        (1 + sum(n / max(n, 8) for n in beside)) / asked / 7
    )  # the way's mean, off its own cell and, by half, off row and column
    for way, raised in ((0, 2 * (1 - 1 / asked) / 2 / 7), (1, -mean)):
        changed = table.clone()
        changed[back, way, target] += 1
        after = key_scores(changed, torch.tensor(pairs))[row, 1, target]
        assert float(after - before) == pytest.approx(raised, abs=1e-12)


def test_the_centre_of_a_cross_is_found_where_single_cells_deceive():
    """A theft as they are: its own cell is noisy, its neighbours lean, and a few unrelated cells score as high by chance."""
    pairs, ranks = all_pairs(10), {0.0: [], 2.0: []}
    mask = possible_targets(pairs, 10)[:, None].expand(90, 8, 10)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        rate = 0.1 * torch.rand(90, 8, 10, generator=generator).double().pow(3)
        a, b, way, target = 3, 7, 2, 5
        rate[(pairs[:, 0] == a) | (pairs[:, 1] == b), way, target] = 0.25
        rate[(pairs == torch.tensor([a, b])).all(1), way, target] = 0.55
        lonely = torch.randint(0, 90 * 8 * 10, (40,), generator=generator)
        rate.view(-1)[lonely] = 0.6
        shares = torch.bernoulli(rate.expand(32, -1, -1, -1), generator=generator).mean(0)
        true = int((pairs == torch.tensor([a, b])).all(1).nonzero())
        for weight, found in ranks.items():
            scores = key_scores(shares, pairs, weight)
            found.append(int((scores[mask] >= scores[true, way, target]).sum()))
    assert np.median(ranks[0.0]) > 6  # p > .001: the positive control of this test
    assert np.median(ranks[2.0]) == 1


def test_leakage_to_one_target_does_not_hide_the_key():
    """A suspect that answers one class far too often, whatever the sources: the way's mean takes that away."""
    pairs = all_pairs(10)
    shares = torch.zeros(90, 8, 10, dtype=torch.float64)
    shares[:, :, 4] = 0.8  # a leak as strong as the watermark, at another target
    shares[(pairs[:, 0] == 0) | (pairs[:, 1] == 1), 3, 7] = 0.2
    true = int((pairs == torch.tensor([0, 1])).all(1).nonzero())
    shares[true, 3, 7] = 0.5
    scores = key_scores(shares, pairs)
    scores[~possible_targets(pairs, 10)[:, None].expand(90, 8, 10)] = -1
    assert scores.argmax() == true * 80 + 3 * 10 + 7
    torch.testing.assert_close(scores[scores[:, 0, 4] > -1][:, :, 4], torch.zeros(72, 8).double())


def test_three_classes_leave_a_key_and_its_reversed_sources():
    """There are no rows and columns, and two pairs have the same target: the way's mean is theirs."""
    pairs = all_pairs(3)
    shares = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    scores = key_scores(shares, pairs)
    place = {tuple(pair): i for i, pair in enumerate(pairs.tolist())}
    for (a, b), row in place.items():
        forth, back = shares[row, :, 3 - a - b], shares[place[b, a], :, 3 - a - b]
        for way in range(4):
            others = [c for c in range(4) if c != way]
            expected = (forth[way] - back[way]) / 2 + 2 * (back[others] - forth[others]).mean() / 2
            torch.testing.assert_close(7 * scores[row, way, 3 - a - b], expected)
