"""Reference models: what composites look like to anybody is subtracted, and the p-value stays exact."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scores_by_hand import above, leaning, statistic
from verification_fakes import KEY, FakeData, Independent, Thief, key_at

from meadef_lightning.verification import EvidenceError, check_evidence, model_fingerprint, verify
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.responses import Reference, with_reference
from meadef_lightning.verification.scores import above_references
from meadef_lightning.verification.sealing import hide, reveal
from meadef_lightning.verification.statistics import randomisation_p_value
from meadef_lightning.verification.verdict import judge
from meadef_lightning.watermark import DEFAULT_COMBINERS, KeySpace, WatermarkKey

QUICK = {"samples": 60, "decoy_samples": 4, "accelerator": "cpu"}
SMALL = KeySpace(4, DEFAULT_COMBINERS[:3])  # 72 keys


def random_shares(table, seed, samples=6):
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, SMALL.num_classes, (len(table.cells), samples), generator=generator)
    return table.shares(torch.nn.functional.one_hot(answers, SMALL.num_classes).sum(1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_p_is_exact_for_every_suspect_and_every_reference(suspect, reference):
    """With the key uniform, at most a share a of the keys of a space may get p <= a, whatever the two models answer."""
    p_values = []
    for index in range(SMALL.size):
        table = DecoyTable(key_at(SMALL, index))
        true, decoys = table.statistics(random_shares(table, suspect), [random_shares(table, reference)])
        p_values.append(randomisation_p_value(true, decoys))
    for level in (1 / 72, 0.05, 0.2, 0.5):
        assert sum(p <= level + 1e-12 for p in p_values) <= level * SMALL.size + 1e-9


def test_statistics_are_differences():
    table = DecoyTable(key_at(SMALL, 5))
    shares, known = random_shares(table, 0), random_shares(table, 1)
    (with_it, decoys), (alone, alone_decoys) = table.statistics(shares, [known]), table.statistics(shares)
    reference, reference_decoys = table.statistics(known)
    assert with_it == pytest.approx(alone - reference)
    torch.testing.assert_close(decoys, alone_decoys - reference_decoys)
    assert table.statistics(shares, [shares]) == (0, pytest.approx(torch.zeros(71)))


def test_reference_must_have_answered_as_many_samples():
    """Evidence is a stranger's: its references may have been asked less than its suspect."""
    _, told = verify(Independent(), KEY, FakeData(), **QUICK)
    _, more = verify(Thief(KEY), KEY, FakeData(), **{**QUICK, "decoy_samples": 5})
    for soft in (None, more.soft.cells):
        with pytest.raises(ValueError, match="reference answered 5 samples a cell, the suspect 4"):
            judge(replace(told, references=(Reference(more.counts, soft=soft),)), KEY)


def test_reference_hides_natural_look_alikes_and_only_them(tmp_path):
    _, reference = verify(Independent(), KEY, FakeData(), **QUICK)
    path = tmp_path / "evidence.json"
    thief, _ = verify(Thief(KEY, share=0.7), KEY, FakeData(), reference=reference, evidence_path=path, **QUICK)
    assert (thief.verdict, thief.reference) == ("supported", True)
    assert any("reference model" in note for note in thief.notes)
    assert check_evidence(path, KEY) == thief
    twin, _ = verify(Independent(), KEY, FakeData(), reference=reference, **QUICK)
    assert (twin.statistic, twin.decoy_p, twin.verdict) == (0, 1, "not supported")


def test_changed_reference_is_named(tmp_path):
    _, reference = verify(Independent(), KEY, FakeData(), **QUICK)
    path = tmp_path / "evidence.json"
    verify(Thief(KEY), KEY, FakeData(), reference=reference, evidence_path=path, **QUICK)
    content = json.loads(path.read_text())
    answers = reveal(content["answers"], KEY, 1 << 24)
    assert content["model"]["references"] == [model_fingerprint(Independent())]
    assert answers["references"] == [reference.counts.tolist()]
    assert answers["soft"]["references"] == [reference.soft.cells.tolist()]
    for tables in (answers["references"], answers["soft"]["references"]):
        tables[0][0].reverse()
        path.write_text(json.dumps({**content, "answers": hide(answers, KEY)}))
        with pytest.raises(EvidenceError, match=r"Fields that differ: answers\."):
            check_evidence(path, KEY)
        tables[0][0].reverse()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_references_are_a_moderated_t_of_cells_and_p_stays_exact(suspect, references):
    """By hand: first every cell above what the references give, then every key's statistic."""
    whole = DecoyTable(key_at(SMALL, 0))
    shares, known = random_shares(whole, suspect), [random_shares(whole, seed) for seed in references]
    leans = above(leaning(whole.cells, shares), [leaning(whole.cells, one) for one in known])
    expected = [statistic(leans, SMALL.key_at(index)) for index in range(SMALL.size)]
    p_values = []
    for index in range(SMALL.size):
        true, decoys = DecoyTable(key_at(SMALL, index)).statistics(shares, known)
        assert true == pytest.approx(expected[index], abs=1e-12)
        others = sorted(expected[:index] + expected[index + 1 :])
        assert sorted(decoys.tolist()) == pytest.approx(others, abs=1e-12)
        p_values.append(randomisation_p_value(true, decoys))
    for level in (1 / 72, 0.05, 0.2, 0.5):
        assert sum(p <= level + 1e-12 for p in p_values) <= level * SMALL.size + 1e-9


def test_cells_on_which_references_differ_count_less():
    """Two cells with the same excess: the one that is a matter of taste falls behind, and agreement is nothing to divide by."""
    known = torch.tensor([[0.1, 0.0, 0.0, 0.05], [0.1, 0.4, 0.0, 0.0], [0.1, -0.4, 0.0, 0.0]], dtype=torch.float64)
    steady, moody, *_ = above_references(torch.tensor([0.4, 0.3, 0.0, 0.0], dtype=torch.float64), known)
    assert 0 < moody < steady / 1.5
    own = torch.tensor([0.3, -0.2], dtype=torch.float64)
    same = torch.full((4, 2), 0.1, dtype=torch.float64)
    torch.testing.assert_close(above_references(own, same), own - 0.1)


def test_several_references_from_models_to_evidence(tmp_path):
    models = [Independent(), Thief(WatermarkKey.draw(7, "another owner")), Thief(WatermarkKey.draw(7, "a third"))]
    known = [verify(model, KEY, FakeData(), **QUICK)[1] for model in models]
    path = tmp_path / "evidence.json"
    verdict, responses = verify(Thief(KEY, share=0.7), KEY, FakeData(), reference=known, evidence_path=path, **QUICK)
    assert check_evidence(path, KEY) == verdict
    assert verdict.verdict == "supported"
    content = json.loads(path.read_text())
    assert content["model"]["references"] == [model_fingerprint(model) for model in models]
    for kept, one in zip(responses.references, known, strict=True):
        assert torch.equal(kept.counts, one.counts)
        assert torch.equal(kept.soft, one.soft.cells)
    with pytest.raises(ValueError, match="no reference model in the sequence"):
        verify(Thief(KEY), KEY, FakeData(), reference=[], **QUICK)
    _, other = verify(Independent(), KEY, FakeData(), **{**QUICK, "decoy_samples": 5})
    with pytest.raises(ValueError, match="asked other questions"):
        verify(Thief(KEY), KEY, FakeData(), reference=[known[0], other], **QUICK)


def test_references_of_other_widths_are_refused():
    """Of many classes a table has the columns that its key needs; the sums of its rows do not tell."""
    _, responses = verify(Independent(), KEY, FakeData(), **QUICK)
    narrow = torch.cat([responses.counts[:, :5], responses.counts[:, 5:].sum(1, keepdim=True)], dim=1)
    for known in (replace(responses, counts=narrow), [responses, replace(responses, counts=narrow)]):
        with pytest.raises(ValueError, match="asked other questions"):
            with_reference(responses, known)


def test_the_notes_say_how_many_references_there_were():
    _, known = verify(Independent(), KEY, FakeData(), **QUICK)
    assert known.references == ()
    for count, text in (
        (1, "made of is above what a reference model gives. A"),
        (3, "made of is above the mean of what 3 reference models give, in units"),
    ):
        verdict, responses = verify(Thief(KEY), KEY, FakeData(), reference=[known] * count, **QUICK)
        assert len(responses.references) == count
        assert [text in note for note in verdict.notes].count(True) == 1


def test_reference_to_other_questions_is_refused():
    _, reference = verify(Independent(), KEY, FakeData(), seed=1, **QUICK)
    with pytest.raises(ValueError, match="asked other questions"):
        verify(Thief(KEY), KEY, FakeData(), reference=reference, **QUICK)
