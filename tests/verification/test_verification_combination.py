import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verification_fakes import FakeData, Independent, Thief, key_at

from meadef_lightning.verification import verify
from meadef_lightning.verification.combination import combine_fisher, holm, judge_keys
from meadef_lightning.verification.planning import decoy_power, mcnemar_power, power, smallest_plan
from meadef_lightning.verification.statistics import mcnemar_exact
from meadef_lightning.watermark import KeySpace

p_values = st.lists(st.floats(1e-6, 1), min_size=1, max_size=6)


@given(p_values)
def test_fisher_equals_its_closed_form(values):
    """The sum of R exponentials is Erlang: P = q·Σ (-ln q)^i / i!, with q the product."""
    q = math.prod(values)
    expected = q * sum((-math.log(q)) ** i / math.factorial(i) for i in range(len(values)))
    assert combine_fisher(values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [(3,), (4, 7), (2, 3, 5), (6, 6, 6)])
def test_fisher_of_ranks_holds_every_level(sizes):
    """Exact, by enumeration: independent ranks 1/N … N/N under the null."""
    combined = np.array(
        [combine_fisher([r / n for r, n in zip(ranks, sizes, strict=True)]) for ranks in itertools.product(*(range(1, n + 1) for n in sizes))]
    )  # fmt: skip
    for level in np.unique(combined):
        assert (combined <= level + 1e-12).mean() <= level + 1e-9


def closed_testing(values, i):
    """Holm is the closed test of Bonferroni's: the largest Bonferroni p-value among all sets of questions with i in them."""
    others = [j for j in range(len(values)) if j != i]
    return max(
        min(1.0, len(chosen) * min(values[j] for j in chosen))
        for size in range(len(values))
        for rest in itertools.combinations(others, size)
        for chosen in [(i, *rest)]
    )


@given(p_values)
def test_holm_is_the_closed_test(values):
    assert holm(values).tolist() == pytest.approx([closed_testing(values, i) for i in range(len(values))])


def test_holm_keeps_the_shape_of_suspects_and_keys():
    values = np.array([[0.01, 0.04, 1.0], [0.005, 0.5, 0.04]])
    adjusted = holm(values)
    assert adjusted.tolist() == [[0.05, 0.16, 1.0], [0.03, 1.0, 0.16]]


@pytest.mark.parametrize("values", [[], [0.0], [1.1], [math.nan], [0.5, -0.1]])
def test_what_is_no_p_value_is_refused(values):
    with pytest.raises(ValueError, match="must lie in"):
        combine_fisher(values)
    with pytest.raises(ValueError, match="must lie in"):
        holm(values)


SPACE = KeySpace(7)
KEYS = [key_at(SPACE, index, salt=f"{index:032x}") for index in (100, 900, 1500)]
QUICK = {"samples": 40, "decoy_samples": 4, "accelerator": "cpu"}


def cases(keys, suspect, **options):
    return [(verify(suspect, key, FakeData(), **{**QUICK, **options})[1], key) for key in keys]


def test_keys_that_are_too_small_alone_are_enough_together():
    class Copy(Independent):
        """A thief of a model with two keys."""

        def forward(self, x):
            first, second = (Thief(key) for key in KEYS[:2])
            answers = torch.where(first.labels(x) != Independent.labels(self, x), first.labels(x), second.labels(x))
            return torch.nn.functional.one_hot(answers.clamp(0, 6), 7).float()

    two = cases(KEYS[:2], Copy(), decoys=99)
    joint = judge_keys(two, alpha=0.002)
    assert [verdict.verdict for verdict in joint.verdicts] == ["inconclusive"] * 2
    assert [verdict.decoy_p for verdict in joint.verdicts] == [0.01, 0.01]
    assert joint.decoy_p == pytest.approx(1e-4 * (1 - math.log(1e-4)))
    assert (joint.smallest_p, joint.verdict, joint.exact) == (joint.decoy_p, "supported", True)
    assert joint.adjusted_p == (0.02, 0.02)
    value = json.loads(json.dumps(joint.to_dict()))
    assert not {"target_class", "source_classes", "salt"} & set(str(value).split("'"))
    assert judge_keys(two, alpha=1e-4).verdict == "inconclusive"
    assert "more keys" in judge_keys(two, alpha=1e-4).reason
    # one key among them that was picked by hand takes the claim away, and nothing else
    picked = judge_keys([(two[0][0], dataclasses.replace(KEYS[0], drawn_uniformly=False)), two[1]], alpha=0.002)
    assert (picked.verdict, picked.exact, picked.decoy_p) == ("inconclusive", False, joint.decoy_p)
    assert "meadef key draw" in picked.reason


def test_an_independent_model_carries_no_key():
    joint = judge_keys(cases(KEYS, Independent()))
    assert joint.verdict == "not supported"
    assert "never proves innocence" in joint.reason


def test_the_same_key_counts_once():
    [case] = cases(KEYS[:1], Thief(KEYS[0]))
    with pytest.raises(ValueError, match="share their salt"):
        judge_keys([case, case])
    with pytest.raises(ValueError, match="at least one key"):
        judge_keys([])
    alone = judge_keys([case])
    assert alone.decoy_p == pytest.approx(alone.verdicts[0].decoy_p)
    other = dataclasses.replace(KEYS[1], salt="f" * 32)
    assert judge_keys([case, *cases([other], Thief(KEYS[0]))]).adjusted_p[0] == pytest.approx(2 * alone.decoy_p)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 9), st.sampled_from([0.01, 0.05, 0.3]))
def test_mcnemar_power_is_the_sum_over_all_outcomes(wsr, wfpr, n, alpha):
    wsr, wfpr = wsr / 20, wfpr / 20
    first, second = wsr * (1 - wfpr), wfpr * (1 - wsr)
    total = 0.0
    for s, f in itertools.product(range(n + 1), repeat=2):
        if s + f <= n and mcnemar_exact(s, f) <= alpha:
            ways = math.factorial(n) // (math.factorial(s) * math.factorial(f) * math.factorial(n - s - f))
            total += ways * first**s * second**f * max(1 - first - second, 0.0) ** (n - s - f)
    assert mcnemar_power(wsr, wfpr, n, alpha) == pytest.approx(total, abs=1e-9)


def test_correlated_answers_count_as_fewer():
    assert mcnemar_power(0.5, 0.1, 100, rho=0.05) == mcnemar_power(0.5, 0.1, 16)  # 100 / 5.95
    assert mcnemar_power(0.5, 0.1, 100, rho=1.0) == 0


@pytest.mark.parametrize(
    ("rivals", "decoys", "alpha"), [(0.01, 99, 0.05), (0.002, 999, 0.01), (0.0, 999, 0.001), (0.5, 9, 0.1)]
)
def test_decoy_power_is_the_chance_of_few_rivals(rivals, decoys, alpha):
    most = round(alpha * (decoys + 1)) - 1
    expected = sum(math.comb(decoys, i) * rivals**i * (1 - rivals) ** (decoys - i) for i in range(most + 1))
    assert decoy_power(rivals, decoys, alpha) == pytest.approx(expected)


def test_decoys_that_cannot_reach_alpha_have_no_power():
    assert decoy_power(0.0, 998, 0.001) == 0
    assert decoy_power(4 / 5759, 5760, 0.001, space=5760) == 1  # p = 5 / 5,760
    assert decoy_power(5 / 5759, 5760, 0.001, space=5760) == 0
    stated = power(0.6, 0.1, samples=9, decoys=9999, space=5760, rivals=0.0)
    assert (stated.smallest_mcnemar_p, stated.smallest_decoy_p, stated.both) == (2**-9, 1 / 5760, 0)


def test_a_plan_is_as_small_as_can_be():
    samples, decoys = smallest_plan(0.5, 0.1, rivals=5e-4, target=0.9)
    assert mcnemar_power(0.5, 0.1, samples) >= 0.95 > mcnemar_power(0.5, 0.1, samples - 1)
    assert (decoys + 1) % 1000 == 0
    assert decoy_power(5e-4, decoys) >= 0.95 > decoy_power(5e-4, decoys - 1000)
    assert power(0.5, 0.1, samples, decoys).both >= 0.9
    assert smallest_plan(0.9, 0.0, rivals=0.0)[1] == 999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wsr": 0.1, "wfpr": 0.1}, "effect is too small"),
        ({"wsr": 0.9, "rho": 0.2}, "too few independent"),
        ({"wsr": 0.9, "rivals": 0.002}, "Combine several keys"),
        ({"wsr": 1.5}, "wsr=1.5"),
        ({"wsr": 0.5, "alpha": 0}, "alpha=0"),
        ({"wsr": 0.5, "target": 1}, "target=1"),
    ],
)
def test_plans_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        smallest_plan(**options)
