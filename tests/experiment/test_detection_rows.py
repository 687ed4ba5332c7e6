"""What a report says of searches, from what they found; seed by seed by hand."""

import itertools

import pytest
import torch

from meadef_lightning.detection.answer_lean import joint_leans
from meadef_lightning.detection.mixture_scan import MixtureFinding
from meadef_lightning.experiment.robustness import detection_rows
from meadef_lightning.experiment.robustness_stages import key_rank
from meadef_lightning.watermark import WatermarkKey

CLEAN = ["clean", "independent"]
KEY = WatermarkKey.draw(6, "a secret of these tests")


def searched(name, flagged, score=1.0, target=3, **more):
    return "abs", name, {"score": score, "threshold": 2.0, "decision": bool(flagged), "classes": [], "flagged": flagged, "target": target, **more}  # fmt: skip


def screened(name, auc, true_rate):
    return "lof", name, {"score": 1.0, "threshold": 2.0, "decision": true_rate > 0.5, "auc": auc, "true_rate": true_rate, "false_rate": 0.1, "target": 3}  # fmt: skip


def rows_of(*findings):
    return {(row.attack, row.target): row for row in detection_rows(list(findings), CLEAN)}


def test_a_model_that_is_called_marked_for_another_class_is_found_by_nobody():
    rows = rows_of(
        searched("victim", [5], score=9.0),
        searched("patched", [5, 1], score=9.0, target=1),
        searched("soft", [], score=0.5),
        searched("clean", [3]),
        searched("independent", []),
    )
    victim, patched, soft = (rows["abs", name] for name in ("victim", "patched", "soft"))
    assert (victim.decision, victim.true_rate, victim.auc, victim.named_target) == (True, 1.0, 1.0, 0.0)
    assert (patched.decision, patched.true_rate, patched.named_target) == (True, 1.0, 1.0)
    assert (soft.decision, soft.true_rate, soft.named_target) == (False, 0.0, 0.0)
    assert victim.false_rate == 0.5
    assert {target for _, target in rows} == {"victim", "patched", "soft"}  # clean ones are their controls


def test_shares_and_ranks_are_over_seeds():
    flags, ranks = ([5], [3, 5], [], [3]), (2.0, 40.0, 1.0, 7.0)
    seeds = [searched("victim", flagged, key_rank=rank) for flagged, rank in zip(flags, ranks, strict=True)]
    row = rows_of(*seeds, searched("clean", []))["abs", "victim"]
    assert (row.true_rate, row.named_target, row.key_rank) == (0.75, 0.5, 4.5)


def test_a_seed_without_a_rank_leaves_the_row_without():
    row = rows_of(searched("victim", [3], key_rank=2.0), searched("victim", [3]), searched("clean", []))[
        "abs", "victim"
    ]
    assert (row.named_target, row.key_rank) == (1.0, None)


def test_samples_that_stand_out_at_a_clean_model_have_a_row_that_says_so():
    found = [screened("victim", 1.0, 0.9), screened("clean", 1.0, 0.8), screened("clean", 0.9, 0.6)]
    rows = rows_of(*found, searched("victim", [3]), searched("clean", []))
    assert set(rows) == {("lof", "victim"), ("lof", "clean"), ("abs", "victim")}
    clean = rows["lof", "clean"]
    assert (clean.level, clean.decision) == ("inputs", True)
    assert (clean.auc, clean.true_rate, clean.false_rate) == pytest.approx((0.95, 0.7, 0.1))
    assert (clean.named_target, clean.key_rank) == (None, None)
    assert rows["abs", "victim"].false_rate == 0.0  # of the search of models alone


def finding(pairs):
    return MixtureFinding(0.0, 0.0, False, torch.zeros(6), (), None, pairs)


def test_the_rank_is_the_place_in_the_sorted_list_of_all_keys():
    (a, b), target = KEY.source_classes, KEY.target_class
    keys = list(itertools.permutations(range(6), 3))
    pairs = torch.full((6, 6, 6), -torch.inf)
    for key, score in zip(keys, torch.randperm(len(keys), generator=torch.Generator().manual_seed(0)), strict=True):
        pairs[key] = float(score)
    order = sorted(keys, key=lambda key: -float(pairs[key]))
    assert key_rank(finding(pairs), KEY) == 1 + order.index((a, b, target))
    pairs[a, b, target] = 1e3
    assert key_rank(finding(pairs), KEY) == 1


def test_where_sources_have_no_order_the_rank_is_among_pairs_without_one():
    lean = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    lean = lean - lean.T
    (a, b), target = KEY.source_classes, KEY.target_class
    keys = [(*pair, t) for pair in itertools.combinations(range(6), 2) for t in range(6) if t not in pair]
    score = {key: float(min(lean[key[0], key[2]], lean[key[1], key[2]])) for key in keys}
    assert len(set(score.values())) < len(keys)  # other pairs may share their smaller lean
    mine = score[min(a, b), max(a, b), target]
    others = list(score.values())
    between = 1 + sum(value > mine for value in others) + (others.count(mine) - 1) / 2
    assert key_rank(finding(joint_leans(lean)), KEY) == between
    lean[[a, b], target], lean[target, [a, b]] = 50.0, -50.0
    assert key_rank(finding(joint_leans(lean)), KEY) == 1
