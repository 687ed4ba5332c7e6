"""Several reference encoders: they weigh as a classifier's do, and the p-value stays exact."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.features import FeatureAnswers, judge_features
from meadef_lightning.watermark import DEFAULT_COMBINERS, KeySpace

sys.path.append(str(Path(__file__).parents[1] / "verification"))
from scores_by_hand import above, leaning, statistic
from verification_fakes import key_at

SPACE = KeySpace(4, DEFAULT_COMBINERS[:3])  # 72 keys


def answers(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4 * 3 * 3, 4, generator=generator, dtype=torch.float64)
    trigger, control = torch.rand(2, 20, generator=generator, dtype=torch.float64)
    return FeatureAnswers(scores, trigger, control, 1.0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**6), min_size=1, max_size=3))
def test_several_weigh_as_a_classifiers_and_p_stays_exact(suspect, seeds):
    known, p_values = [answers(seed) for seed in seeds], []
    cells = DecoyTable(key_at(SPACE, 0)).cells
    own, *others = (leaning(cells, each.scores) for each in (answers(suspect), *known))
    leans = above(own, others)
    for index in range(SPACE.size):
        verdict = judge_features(answers(suspect), DecoyTable(key_at(SPACE, index)), known)
        assert verdict.reference
        assert verdict.statistic == pytest.approx(statistic(leans, SPACE.key_at(index)), abs=1e-12)
        p_values.append(verdict.p_value)
    for level in (1 / 72, 0.05, 0.2, 0.5):
        assert sum(p <= level + 1e-12 for p in p_values) <= level * SPACE.size + 1e-9


def test_one_in_a_sequence_is_that_one_and_none_is_an_error():
    table = DecoyTable(key_at(SPACE, 5))
    assert judge_features(answers(0), table, [answers(1)]) == judge_features(answers(0), table, answers(1))
    with pytest.raises(ValueError, match="no reference encoder in the sequence"):
        judge_features(answers(0), table, [])
    other = FeatureAnswers(torch.zeros(5, 4, dtype=torch.float64), torch.zeros(20), torch.zeros(20), 1.0)
    with pytest.raises(ValueError, match="asked other questions"):
        judge_features(answers(0), table, [answers(1), other])
