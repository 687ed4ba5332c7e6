"""Keys ranked by what probabilities leave beside the sources: against loops, and with an exact p over whole key spaces."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scores_by_hand import above, leaning, statistic, thousandths
from verification_fakes import key_at

from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.remaining import remaining_shares
from meadef_lightning.verification.responses import Reference, Responses, SoftAnswers
from meadef_lightning.verification.statistics import randomisation_p_value
from meadef_lightning.verification.verdict import decoy_statistics, judge
from meadef_lightning.watermark import DEFAULT_COMBINERS, KeySpace, WatermarkKey

SMALL = KeySpace(4, DEFAULT_COMBINERS[:3])  # 72 keys
SAMPLES = 3
seeds = st.integers(0, 2**32)


def probabilities(cells, classes, seed, sure):
    """Random answers to the composites of each cell; sure suspects leave next to nothing, and hence ties."""
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((cells, 1, classes)) + generator.standard_normal((cells, SAMPLES, classes))
    return torch.from_numpy((60 if sure else 2) * logits).softmax(2)


def asked(cells, classes, seed, sure=False):
    """Counts and sums of remaining shares of one model."""
    answers = probabilities(len(cells), classes, seed, sure)
    sources = cells[:, :2].repeat_interleave(SAMPLES, 0)
    shares = remaining_shares(answers.flatten(0, 1), sources).reshape(-1, SAMPLES, classes).sum(1)
    return torch.nn.functional.one_hot(answers.argmax(2), classes).sum(1), shares


def told(table, suspect, references, sure=False):
    """Everything that a suspect and references answered to a key's questions."""
    classes = table.key.num_classes
    counts, shares = asked(table.cells, classes, suspect, sure)
    known = tuple(
        Reference(*(part[0], None, part[1])) for part in (asked(table.cells, classes, s, sure) for s in references)
    )
    one, soft = torch.zeros(5, dtype=torch.int64), SoftAnswers(*torch.zeros(2, 5, dtype=torch.int64), shares)
    return Responses(one, one, table.cells, counts, one, one, table.decoys, table.seed, references=known, soft=soft)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 9), seeds, st.booleans())
def test_thousandths_are_those_of_a_loop(classes, seed, sure):
    answers = probabilities(20, classes, seed, sure).flatten(0, 1)
    generator = np.random.default_rng(seed)
    sources = torch.from_numpy(np.stack([generator.permutation(classes)[:2] for _ in answers]))
    found = remaining_shares(answers, sources)
    for row, probability, pair in zip(found.tolist(), answers.tolist(), sources.tolist(), strict=True):
        assert row == pytest.approx(thousandths(probability, pair), abs=1)  # a whole number may fall to either side
        assert row[pair[0]] == row[pair[1]] == 0
        assert 1000 - classes < sum(row) <= 1000


@settings(max_examples=10, deadline=None)
@given(seeds, st.lists(seeds, max_size=3), st.booleans())
def test_every_key_has_the_statistic_of_a_loop_and_p_is_exact(suspect, references, sure):
    """With the key uniform at most a share a of the keys gets p <= a, whatever all the models answer."""
    whole = DecoyTable(key_at(SMALL, 0))
    responses = told(whole, suspect, references, sure)
    leans, *known = (
        leaning(whole.cells, sums.double() / (1000 * SAMPLES))
        for sums in (responses.soft.cells, *(one.soft for one in responses.references))
    )
    leans = above(leans, known) if known else leans
    expected = [statistic(leans, SMALL.key_at(index)) for index in range(SMALL.size)]
    p = []
    for index in range(SMALL.size):
        true, decoys = decoy_statistics(responses, key_at(SMALL, index))
        assert true == pytest.approx(expected[index], abs=1e-12)
        assert sorted([true, *decoys.tolist()]) == pytest.approx(sorted(expected), abs=1e-12)
        p.append(randomisation_p_value(true, decoys))
    assert (np.sort(p) >= np.arange(1, 73) / 72 - 1e-12).all()


@settings(max_examples=5, deadline=None)
@given(seeds, seeds, seeds)
def test_one_reference_with_labels_makes_labels_of_all(suspect, soft, hard):
    whole = DecoyTable(key_at(SMALL, 0))
    responses = told(whole, suspect, [soft, hard])
    assert responses.by_probabilities
    first, second = responses.references
    mixed = replace(responses, references=(first, Reference(second.counts)))
    assert not mixed.by_probabilities
    leans, *known = (
        leaning(whole.cells, counts.double() / SAMPLES)
        for counts in (mixed.counts, *(one.counts for one in mixed.references))
    )
    leans, p = above(leans, known), []
    for index in range(SMALL.size):
        true, decoys = decoy_statistics(mixed, key_at(SMALL, index))
        assert true == pytest.approx(statistic(leans, SMALL.key_at(index)), abs=1e-12)
        p.append(randomisation_p_value(true, decoys))
    assert (np.sort(p) >= np.arange(1, 73) / 72 - 1e-12).all()
    assert judge(mixed, key_at(SMALL, 0)).answers == "labels"
    assert judge(responses, key_at(SMALL, 0)).answers == "probabilities"


@pytest.mark.parametrize("references", [(), (1,), (1, 2, 3)])
def test_drawn_decoys_have_the_statistics_of_a_loop(references):
    """Pairs whose reversed sources were not asked among them; the usual variance is that of all asked cells."""
    key = WatermarkKey.draw(12, "secret")
    table = DecoyTable(key, 60, 3)
    present = {tuple(pair) for pair in table.pairs.tolist()}
    missing = [(b, a) not in present for a, b, *_ in table.drawn.tolist()]
    assert 5 < sum(missing) < 55
    responses = told(table, 0, references)
    leans, *known = (
        leaning(table.cells, sums.double() / (1000 * SAMPLES))
        for sums in (responses.soft.cells, *(one.soft for one in responses.references))
    )
    leans = above(leans, known) if known else leans
    true, decoys = decoy_statistics(responses, key)
    own = (*key.source_classes, key.target_class, table.way)
    assert true == pytest.approx(statistic(leans, own), abs=1e-12)
    assert decoys.tolist() == pytest.approx([statistic(leans, tuple(one)) for one in table.drawn.tolist()], abs=1e-12)


@pytest.mark.parametrize("references", [0, 3])
def test_p_is_valid_with_drawn_decoys(references):
    """1,500 uniform keys, each with decoys of its own, against one fixed suspect above fixed references."""
    generator, whole = np.random.default_rng(5), DecoyTable(key_at(SMALL, 0))
    shares, *known = (asked(whole.cells, 4, seed)[1].double() / (1000 * SAMPLES) for seed in range(1 + references))
    shares[3] = torch.eye(4, dtype=torch.float64)[2]  # one favourite
    row = {tuple(cell): i for i, cell in enumerate(whole.cells.tolist())}
    p = []
    for _ in range(1500):
        table = DecoyTable(key_at(SMALL, int(generator.integers(SMALL.size)), salt=generator.bytes(16).hex()), 9)
        rows = [row[tuple(cell)] for cell in table.cells.tolist()]
        assert len(rows) < len(row)
        p.append(randomisation_p_value(*table.statistics(shares[rows], [one[rows] for one in known])))
    for level in (0.1, 0.2, 0.5):
        share = np.mean(np.array(p) <= level + 1e-12)
        assert level / 3 <= share <= level + 4 * (level * (1 - level) / 1500) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda soft: soft[1:], r"int64 of shape \(36, 4\)"),
        (lambda soft: soft.double(), "must be int64"),
        (lambda soft: soft - 1, "at least 0"),
        (lambda soft: soft + 1000, "3000 thousandths"),
    ],
)
def test_sums_that_cannot_be_are_refused(change, message):
    table = DecoyTable(key_at(SMALL, 0))
    good = told(table, 0, [1])
    (known,) = good.references
    for bad in (
        replace(good, soft=replace(good.soft, cells=change(good.soft.cells))),
        replace(good, references=(replace(known, soft=change(known.soft)),)),
    ):
        with pytest.raises(ValueError, match=message):
            judge(bad, table.key)
