import dataclasses
import json
import math

import pytest
import torch
from verification_fakes import KEY

from meadef_lightning.verification import Responses, decoy_statistics, judge
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.responses import Reference, SoftAnswers
from meadef_lightning.watermark import DEFAULT_COMBINERS, CombinerSpec, WatermarkKey

A, B = KEY.source_classes
TARGET = KEY.target_class


def answers(key=KEY, cell_hits=0, hits=0, false_hits=0, n=100, cell_size=20, neighbours=(), **options):
    """A suspect that answers the first source, but for so many hits on triggers, on controls, and in the key's cell.

    ``neighbours`` are hits in cells of other source pairs at the same target and way.
    """
    table = DecoyTable(key, options.get("decoys", 9999), options.get("seed", 0))
    a, b, target = *key.source_classes, key.target_class
    cells = table.cells
    counts = torch.zeros(len(cells), key.num_classes, dtype=torch.int64)
    counts[torch.arange(len(cells)), cells[:, 0]] = cell_size

    def hit(cell, number):
        row = (cells == torch.tensor(cell)).all(1)
        counts[row, cell[0]] -= number
        counts[row, target] += number

    hit((a, b, table.way), cell_hits)
    others = [(x, y) for x, y in table.pairs.tolist() if (x, y) != (a, b) and target not in (x, y)]
    for (x, y), number in zip(others, neighbours, strict=False):
        hit((x, y, table.way), number)

    def labels(number):
        return torch.where(torch.arange(n) < number, target, a)

    return Responses(
        trigger=labels(hits),
        control=labels(false_hits).flip(0),
        cells=cells,
        counts=counts,
        natural=torch.tensor([0, 1, 2, 2]),
        natural_labels=torch.tensor([0, 1, 2, 0]),
        decoys=table.decoys,
        seed=table.seed,
    )


def test_a_clear_case_is_supported_with_all_its_numbers():
    verdict = judge(answers(cell_hits=15, hits=80, false_hits=5), KEY)
    assert verdict.verdict == "supported"
    size = 7 * 6 * 5 * 8
    assert verdict.decoy_method == "enumerated"
    assert (verdict.decoys, verdict.decoy_p, verdict.smallest_p) == (size - 1, 1 / size, 1 / size)
    # alone in a world of zeros: the mean of the 30 cells of its way is off it, and by half off 4 of 8 neighbours twice, weighed 2
    assert verdict.statistic == pytest.approx(0.75 * (1 - 2 / 30) / 7)
    assert verdict.answers == "labels"
    assert (verdict.wsr, verdict.wfpr, verdict.samples) == (0.8, 0.05, 100)
    assert verdict.wsr_ci[0] < 0.8 < verdict.wsr_ci[1]
    assert verdict.wfpr_ci[0] < 0.05 < verdict.wfpr_ci[1]
    assert (verdict.only_trigger, verdict.only_control) == (80, 5)
    assert verdict.mcnemar_p == pytest.approx(sum(math.comb(85, i) for i in range(80, 86)) / 2**85)
    assert verdict.natural_accuracy == 0.75
    assert verdict.exact
    assert verdict.icc == 0
    assert verdict.effective_samples == 100
    assert verdict.paper_threshold == {"threshold": 0.3, "exceeded": True}
    assert verdict.conformal_p is None
    assert "80.0%" in verdict.reason


def test_pairs_hit_twice_do_not_count_for_mcnemar():
    both = answers(cell_hits=15, hits=80, false_hits=40)
    verdict = judge(both, KEY)
    assert (verdict.only_trigger, verdict.only_control) == (60, 20)


def test_of_probabilities_a_sample_counts_that_gives_the_target_most_of_the_rest():
    """By hand: of 100 pairs 40 with the trigger alone above half, 5 with the control alone; and rates are of labels."""
    told = answers(cell_hits=15, hits=80, false_hits=5)
    cases = [(501, 500, 25), (1000, 0, 15), (500, 501, 2), (12, 700, 3), (900, 600, 35), (500, 500, 11), (499, 20, 9)]
    trigger, control = (torch.tensor([pair[side] for *pair, number in cases for _ in range(number)]) for side in (0, 1))
    cells = 50 * told.counts  # a twentieth of the weight, so that ranks stay
    verdict = judge(dataclasses.replace(told, soft=SoftAnswers(trigger, control, cells)), KEY)
    assert (verdict.only_trigger, verdict.only_control) == (40, 5)
    assert verdict.mcnemar_p == pytest.approx(sum(math.comb(45, i) for i in range(40, 46)) / 2**45)
    assert (verdict.answers, verdict.wsr, verdict.wfpr) == ("probabilities", 0.8, 0.05)
    labelled = judge(told, KEY)
    assert verdict.statistic == pytest.approx(labelled.statistic / 20)
    assert (verdict.decoy_p, verdict.icc) == (labelled.decoy_p, labelled.icc)
    assert all(f"McNemar p = {one.mcnemar_p:.2g}" in one.reason for one in (verdict, labelled))
    # a reference of which only labels are known leaves no more of the suspect
    reference = Reference(answers().counts)
    both = judge(dataclasses.replace(told, soft=SoftAnswers(trigger, control, cells), references=(reference,)), KEY)
    assert both == judge(dataclasses.replace(told, references=(reference,)), KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trigger": torch.zeros(99, dtype=torch.int64)}, r"soft.trigger must be int64 of shape \(100,\)"),
        ({"control": torch.zeros(100)}, "soft.control must be int64"),
        ({"control": torch.full((100,), 1001)}, "soft.control holds shares outside 0 to 1000"),
        ({"trigger": torch.full((100,), -1)}, "soft.trigger holds shares outside"),
        ({"cells": torch.zeros(336, 6, dtype=torch.int64)}, r"soft.cells must be int64 of shape \(336, 7\)"),
        ({"cells": torch.zeros(336, 7)}, "soft.cells must be int64"),
        ({"cells": torch.full((336, 7), -1)}, "soft.cells: .* at least 0"),
        ({"cells": torch.full((336, 7), 2858)}, "soft.cells: .* sum to 20000 thousandths at most"),  # 20,006
    ],
)
def test_remaining_shares_that_cannot_be_are_refused(change, message):
    good = SoftAnswers(*torch.zeros(2, 100, dtype=torch.int64), torch.zeros(336, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        judge(dataclasses.replace(answers(), soft=dataclasses.replace(good, **change)), KEY)


def test_a_high_success_rate_alone_supports_nothing():
    """Above the paper's threshold, but so it is in the controls, and other keys do as well."""
    verdict = judge(answers(cell_hits=20, hits=90, false_hits=90, neighbours=[20] * 20), KEY)
    assert verdict.paper_threshold["exceeded"]
    assert verdict.verdict == "not supported"
    assert "never proves innocence" in verdict.reason
    assert verdict.icc > 0.9
    assert verdict.effective_samples < 1.2


@pytest.mark.parametrize(
    ("case", "decision", "reason"),
    [
        # both at 0.01, but the key is only one of ten that look alike
        ({"cell_hits": 10, "hits": 60, "neighbours": [10] * 9}, "inconclusive", "lean towards the key"),
        # the key is unique but its controls do nearly as well
        ({"cell_hits": 10, "hits": 18, "false_hits": 4}, "inconclusive", "lean towards the key"),
        # the key is unique, but its controls do as well as its triggers
        ({"cell_hits": 10, "hits": 60, "false_hits": 55}, "not supported", "does not prefer"),
        ({"cell_hits": 10, "hits": 10, "false_hits": 10}, "not supported", "does not prefer"),
        ({"cell_hits": 0, "hits": 60}, "not supported", "does not prefer"),
        ({"cell_hits": 10, "hits": 9, "n": 9}, "inconclusive", "use more samples"),
    ],
)
def test_decisions(case, decision, reason):
    verdict = judge(answers(**case), KEY)
    assert (verdict.verdict, reason in verdict.reason) == (decision, True), verdict


def test_a_small_key_space_or_few_decoys_cannot_support():
    small = WatermarkKey.draw(3, "secret")
    verdict = judge(answers(small, cell_hits=20, hits=100), small)
    assert (verdict.smallest_p, verdict.verdict) == (1 / 48, "inconclusive")
    assert "larger key space" in verdict.reason
    few = judge(answers(cell_hits=20, hits=100, decoys=99), KEY)
    assert (few.decoy_method, few.decoys, few.smallest_p) == ("sampled", 99, 0.01)
    assert (few.verdict, few.decoy_p) == ("inconclusive", 0.01)
    assert "more decoys" in few.reason
    assert judge(answers(cell_hits=20, hits=100, decoys=99), KEY, alpha=0.01).verdict == "supported"


def test_alpha_decides():
    responses = answers(cell_hits=10, hits=60, neighbours=[10] * 9)
    assert judge(responses, KEY, alpha=0.01).verdict == "supported"
    assert judge(responses, KEY, alpha=0.001).verdict == "inconclusive"


def test_independent_models_are_ranked_beside():
    tie = judge(answers(cell_hits=10), KEY).statistic
    verdict = judge(answers(cell_hits=10, hits=60), KEY, null_statistics=[0.0, 0.05, tie, -0.2])
    assert verdict.conformal_p == 2 / 5  # the tie counts
    assert verdict.null_models == 4
    upper = verdict.null_rate_upper
    assert (1 - upper) ** 4 + 4 * upper * (1 - upper) ** 3 == pytest.approx(0.05)
    assert any("conformal" in note for note in verdict.notes)


def test_a_hand_picked_key_is_inconclusive_at_most_and_all_its_numbers_are_told():
    picked = WatermarkKey((0, 1), 2, 7)
    drawn = dataclasses.replace(picked, drawn_uniformly=True)
    for hits in ({"cell_hits": 20, "hits": 90}, {"cell_hits": 0, "hits": 60}, {"cell_hits": 10, "hits": 9, "n": 9}):
        verdict, other = (judge(answers(key, **hits), key) for key in (picked, drawn))
        assert other.exact
        assert not verdict.exact
        assert any("picked by hand" in note for note in verdict.notes)
        assert verdict.verdict == ("inconclusive" if other.verdict == "supported" else other.verdict)
        same = {"verdict", "reason", "notes", "exact"}
        left, right = ({k: v for k, v in one.to_dict().items() if k not in same} for one in (verdict, other))
        assert left == right
        if other.verdict == "supported":
            assert f"decoy-key p = {verdict.decoy_p:.2g}" in verdict.reason
            assert "not drawn" in verdict.reason
            assert "meadef key draw" in verdict.reason
        else:
            assert verdict.reason == other.reason


@pytest.mark.parametrize("alpha", [0.001, 0.5, 0.999])
def test_no_level_and_no_independent_models_support_a_hand_picked_key(alpha):
    picked = WatermarkKey((0, 1), 2, 7)
    verdict = judge(answers(picked, cell_hits=20, hits=90), picked, alpha, null_statistics=[-1.0] * 2000)
    assert (verdict.verdict, verdict.conformal_p) == ("inconclusive", 1 / 2001)


def test_a_way_outside_the_space_is_inconclusive_at_most():
    band = CombinerSpec("meadef_lightning.watermark.combiners.Band", {})
    outside = WatermarkKey((0, 1), 2, 7, combiner=band)
    verdict = judge(answers(outside, cell_hits=20, hits=90), outside)
    assert verdict.decoys == 7 * 6 * 5 * 9 - 1
    assert verdict.verdict == "inconclusive"
    assert any("not in its declared key space" in note for note in verdict.notes)
    assert not any("Band" in note for note in verdict.notes)


def test_verdict_is_json_and_names_neither_class_nor_way():
    verdict = judge(answers(cell_hits=10, hits=60), KEY, null_statistics=[0.1])
    value = json.loads(json.dumps(verdict.to_dict()))
    assert value["wsr_ci"] == list(verdict.wsr_ci)
    assert value.keys() == {field.name for field in dataclasses.fields(verdict)}
    assert "combiners" not in str(value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.wsr = 1.0


def test_statistics_for_a_histogram():
    responses = answers(cell_hits=10, hits=60, neighbours=[4, 3])
    true, decoys = decoy_statistics(responses, KEY)
    assert len(decoys) == 7 * 6 * 5 * 8 - 1
    assert true == judge(responses, KEY).statistic > float(decoys.max())
    zero, others = decoy_statistics(dataclasses.replace(responses, references=(Reference(responses.counts),)), KEY)
    assert (zero, float(others.abs().max())) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trigger": torch.zeros(100)}, "trigger must be int64"),
        ({"control": torch.zeros(3, dtype=torch.int64)}, "trigger and control must be equally long, got 100 and 3"),
        ({"natural": torch.tensor([0, 1, 2, 7])}, "natural holds answers outside 0 to 6"),
        ({"trigger": torch.full((100,), -1)}, "trigger holds answers outside"),
        ({"natural_labels": torch.zeros(0, dtype=torch.int64)}, "natural_labels must be int64"),
        ({"cells": torch.zeros(336, 3, dtype=torch.int64)}, "cells are not the ones"),
        ({"decoys": 99}, "cells are not the ones|table of answers"),
    ],
)
def test_answers_of_other_questions_are_refused(change, message):
    key = WatermarkKey.draw(7, "secret", combiners=DEFAULT_COMBINERS)
    base = answers(key, cell_hits=10, hits=60)
    if "decoys" in change:  # 99 decoys reach every pair of seven classes unless there are few of them
        change = {"decoys": 2}
    with pytest.raises(ValueError, match=message):
        judge(dataclasses.replace(base, **change), key)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha="):
        judge(answers(), KEY, alpha=alpha)


def test_empty_null_statistics():
    with pytest.raises(ValueError, match="at least one independent model"):
        judge(answers(), KEY, null_statistics=[])
