"""Verification by features: every statistic against a brute force over all keys, planted keys, and independent encoders."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meadef_lightning.oracle import Oracle
from meadef_lightning.oracle.policies import Features
from meadef_lightning.verification.assignments import class_directions, class_shares, cosines
from meadef_lightning.verification.datamodule import VerificationDataModule, source_pairs
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.features import (
    FeatureAnswers,
    feature_answers,
    feature_verdict,
    judge_features,
)
from meadef_lightning.verification.statistics import randomisation_p_value
from meadef_lightning.watermark import KeySpace
from meadef_lightning.watermark.combiner_spec import DEFAULT_COMBINERS

sys.path.append(str(Path(__file__).parents[1] / "verification"))
from scores_by_hand import statistic as by_hand
from verification_fakes import KEY, FakeData, Independent, Thief, key_at

SPACE = KeySpace(4, DEFAULT_COMBINERS[:4])  # 4·3·2·4 = 96 keys
OPTIONS = {"samples": 20, "decoys": 10_000, "decoy_samples": 3, "seed": 5, "batch_size": 17}


class Random(nn.Module):
    """Random features of log-brightness, which is not linear in the pixels."""

    def __init__(self, seed=0, size=8, shift=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(size * size, 24, generator=generator) / 8)
        self.second = nn.Parameter(torch.randn(24, 10, generator=generator))
        self.shift = shift

    def forward(self, x):
        return (
            torch.tanh(x.double().flatten(1).clamp_min(0.1).log() @ self.first.double()) @ self.second.double()
            + self.shift
        )


def brute_force(model, data):
    """T of all 96 keys by loops, from the definition."""
    x, labels = data.tensors("verification")

    def features(samples):
        with torch.no_grad():
            return model(samples).double().numpy()

    natural = features(x)
    means = np.stack([natural[labels.numpy() == c].mean(0) for c in range(4)])
    middle = means.mean(0)

    def assigned(f, t):
        f, directions = f - middle, means - middle
        weights = np.exp(5 * directions @ f / np.linalg.norm(f) / np.linalg.norm(directions, axis=1))
        return float(weights[t] / weights.sum())

    score = {}
    for a in range(4):
        for b in {0, 1, 2, 3} - {a}:
            first, second = source_pairs(labels, a, b, OPTIONS["decoy_samples"], OPTIONS["seed"])
            for way, spec in enumerate(SPACE.combiners):
                made = features(spec.build()(x[first], x[second], torch.Generator()))
                for t in {0, 1, 2, 3} - {a, b}:
                    score[a, b, t, way] = np.mean([assigned(f, t) for f in made])
    leans = {}
    for (a, b, t, way), value in score.items():
        leans.setdefault((a, b, way), {})[t] = value
    return {key: by_hand(leans, key) for key in score}


def test_every_key_against_brute_force():
    data, model = FakeData(4), Random()
    expected = brute_force(model, data)
    assert len(expected) == SPACE.size == 96
    for index in (0, 37, 95):
        key = key_at(SPACE, index)
        questions = VerificationDataModule(key, data, *OPTIONS.values())
        answers = feature_answers(model, questions)
        statistic, decoys = questions.table.statistics(answers.scores)
        own = expected.pop(SPACE.key_at(index))
        assert statistic == pytest.approx(own, abs=1e-9)
        np.testing.assert_allclose(np.sort(decoys), np.sort(list(expected.values())), atol=1e-9)
        verdict = feature_verdict(model, key, data, **OPTIONS)
        assert verdict.statistic == statistic
        assert verdict.p_value == (1 + sum(value >= own - 1e-9 for value in expected.values())) / 96
        assert (verdict.decoys, verdict.decoy_method, verdict.exact) == (95, "enumerated", True)
        expected[SPACE.key_at(index)] = own


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_p_values_of_all_keys_are_uniform_and_where_keys_tie_conservative(seed, tie):
    """Exactness by enumeration, whatever the features say: with a uniform key each of 1/N … N/N has probability 1/N, or less with ties."""
    generator = np.random.default_rng(seed)
    scores = torch.from_numpy(generator.uniform(-1, 1, (48, 4)))
    scores = scores.round() if tie else scores + 0.5 * torch.from_numpy(generator.standard_t(1, (48, 4))).clamp(-9, 9)
    tables = [DecoyTable(key_at(SPACE, index), 10_000, 5) for index in range(96)]
    p = np.sort([randomisation_p_value(*table.statistics(scores)) for table in tables])
    if tie:
        assert len(np.unique(p)) < 96
        assert (p >= np.arange(1, 97) / 96 - 1e-12).all()
    else:
        np.testing.assert_allclose(p, np.arange(1, 97) / 96)


def test_neighbours_find_a_key_whose_own_cell_others_reach():
    """A leaky theft: the key's row and column lean to the target, and so do lonely cells elsewhere, as far as its own."""
    key = key_at(KeySpace(10, DEFAULT_COMBINERS), 1234)
    table = DecoyTable(key, 10_000)
    (a, b), target = key.source_classes, key.target_class
    generator = torch.Generator().manual_seed(0)
    scores = 0.05 * torch.randn(720, 10, generator=generator).double()
    cells, own = table.cells, None
    for row, (first, second, way) in enumerate(cells.tolist()):
        if way == table.way and target not in (first, second) and (first == a or second == b):
            own = row if (first, second) == (a, b) else own
            scores[row, target] += 0.6 if (first, second) == (a, b) else 0.3
    for row in torch.randperm(720, generator=generator)[:30].tolist():
        free = [t for t in range(10) if t not in cells[row, :2] and (row, t) != (own, target)]
        scores[row, free[row % len(free)]] += 0.7
    statistic, decoys = table.statistics(scores)
    assert randomisation_p_value(statistic, decoys) == 1 / 5760
    ways = scores.reshape(90, 8, 10)
    alone = ((8 * ways - ways.sum(1, keepdim=True)) / 7).reshape(720, 10)
    assert int((alone >= alone[own, target]).sum()) > 6  # the control: p > 0.001 by its own cell


def test_p_values_of_an_independent_encoder_are_uniform_over_the_draw_of_the_key():
    questions = VerificationDataModule(key_at(SPACE, 0), FakeData(4), *OPTIONS.values())
    for seed in range(3):
        scores = feature_answers(Random(seed), questions).scores
        p = np.array(
            [
                randomisation_p_value(*DecoyTable(key_at(SPACE, index), 10_000, 5).statistics(scores))
                for index in range(96)
            ]
        )
        np.testing.assert_allclose(np.sort(p), np.arange(1, 97) / 96)  # no ties: exactly uniform


@pytest.mark.filterwarnings("ignore:Class . has 12 sample")
def test_planted_key_is_supported_and_an_independent_model_is_not():
    data = FakeData()
    planted = feature_verdict(Thief(KEY), KEY, data, decoy_samples=4)
    assert planted.verdict == "supported"
    assert planted.p_value == planted.smallest_p < 1e-3
    assert planted.trigger_cosine == pytest.approx(1)
    assert planted.trigger_cosine - planted.control_cosine > 0.8
    assert planted.natural_accuracy == 1
    assert json.loads(json.dumps(planted.to_dict())) == planted.to_dict()
    other = feature_verdict(Independent(), KEY, data, decoy_samples=4)
    assert other.verdict == "not supported"
    assert other.p_value > 0.05
    half, whole = (
        feature_verdict(Thief(KEY, share), KEY, data, Independent(), decoy_samples=40) for share in (0.5, 1.0)
    )
    assert half.verdict == "supported"
    assert half.reference
    assert 0.35 < half.statistic / whole.statistic < 0.65


def test_a_shift_of_all_features_hides_nothing():
    data, key = FakeData(4), key_at(SPACE, 11)
    plain, shifted = (feature_verdict(Random(shift=shift), key, data, **OPTIONS) for shift in (0.0, 1000.0))
    assert shifted.statistic == pytest.approx(plain.statistic, abs=1e-3)
    assert shifted.trigger_cosine == pytest.approx(plain.trigger_cosine, abs=1e-3)


def test_a_constant_encoder_and_the_reference_itself_get_p_one():
    data, key = FakeData(4), key_at(SPACE, 3)
    constant = feature_verdict(Independent(1), key, data, **OPTIONS)
    assert (constant.p_value, constant.sign_p) == (1, 1)
    assert constant.statistic == pytest.approx(0, abs=1e-15)
    assert constant.verdict == "inconclusive"  # 96 keys cannot reach 1e-3
    reference = feature_answers(Random(), VerificationDataModule(key, data, *OPTIONS.values()))
    same = feature_verdict(Random(), key, data, reference, **OPTIONS)
    assert (same.statistic, same.p_value) == (0, 1)


def test_black_boxes_flags_and_random_numbers():
    data, key = FakeData(4), key_at(SPACE, 50)
    model = nn.Sequential(Random(), nn.Dropout(0.5), nn.BatchNorm1d(10, affine=False).double())
    state, module_flags = torch.get_rng_state(), [module.training for module in model.modules()]
    direct = feature_verdict(model, key, data, **{**OPTIONS, "decoys": 40})
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == module_flags
    asked = feature_verdict(Oracle(model, Features()), key, data, **{**OPTIONS, "decoys": 40})
    assert asked.statistic == pytest.approx(direct.statistic, abs=1e-6)
    assert (asked.p_value, asked.decoy_method, asked.decoys) == (direct.p_value, "sampled", 40)


def test_directions_by_hand():
    features = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    middle, directions = class_directions(features, torch.tensor([0, 0, 1]), 2)
    assert middle.tolist() == [1.5, 1.5]
    torch.testing.assert_close(directions, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5)


def test_shares_by_hand():
    directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    middle = torch.tensor([2.0, 2.0], dtype=torch.float64)
    features = middle + torch.tensor([[3.0, 0.0], [0.0, -1e-3], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[5.0, -5.0, 0.0], [0.0, 0.0, -5.0], [0.0, 0.0, 0.0]], dtype=torch.float64).exp()
    shares = class_shares(cosines(features, middle, directions))
    torch.testing.assert_close(shares, expected / expected.sum(1, keepdim=True))


def test_composites_that_only_turn_towards_a_class_hide_no_key():
    """A leaning encoder: many cells turn all their composites by a little, the key's sends some all the way."""
    key = key_at(KeySpace(10, DEFAULT_COMBINERS), 1234)
    table = DecoyTable(key, 10_000)
    directions = F.normalize(torch.eye(10, dtype=torch.float64) - 0.1, dim=1)
    generator = torch.Generator().manual_seed(0)
    leaning = table.cells[:, 0]  # composites look like their first source, and turn to another class, 0.75 of the way
    turned = torch.randint(10, (720,), generator=generator)
    own = (table.cells == torch.tensor([*key.source_classes, table.way])).all(1)
    features = (directions[leaning] + 0.75 * directions[turned])[:, None].repeat(1, 8, 1)
    (a, b), beside = key.source_classes, table.cells[:, 2] == table.way
    beside &= ((table.cells[:, 0] == a) | (table.cells[:, 1] == b)) & (table.cells[:, :2] != key.target_class).all(1)
    features[beside, :2] = directions[key.target_class]  # and keys beside it send a quarter of theirs
    features[own, :5] = directions[key.target_class]
    features[own, 5:] = directions[a]
    towards = cosines(features.flatten(0, 1), torch.zeros(10).double(), directions)
    shares, plain = (scores.reshape(720, 8, 10).mean(1) for scores in (class_shares(towards), towards))
    assert randomisation_p_value(*table.statistics(shares)) == 1 / 5760
    assert randomisation_p_value(*table.statistics(plain)) > 0.001  # the control: plain cosines do not see it


class Odd(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.flatten(1).argmax(1), r"int64 of shape \(17,\); it must give features"),
        (lambda x: (x,), "17 samples with tuple"),
        (lambda x: x.flatten(1) * float("nan"), "NaN or infinite"),
    ],
)
def test_answers_that_are_no_features(answer, message):
    with pytest.raises(ValueError, match=message):
        feature_verdict(Odd(answer), key_at(SPACE, 0), FakeData(4), **OPTIONS)


def test_wrong_tables():
    table = DecoyTable(key_at(SPACE, 0), 10_000)
    with pytest.raises(ValueError, match=r"finite float64 of shape \(48, 4\)"):
        table.statistics(torch.zeros(48, 4))
    good, small = (FeatureAnswers(torch.zeros(n, 4).double(), torch.zeros(5), torch.zeros(5), 1.0) for n in (48, 12))
    with pytest.raises(ValueError, match="asked other questions"):
        judge_features(good, table, small)
    with pytest.raises(ValueError, match="alpha=0"):
        judge_features(good, table, alpha=0)
    assert "triggers" in repr(good)
    assert "tensor" not in repr(good)
