"""Policies against NumPy, and the rules of their composition."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meadef_lightning.oracle import Compose, HardLabel, Policy, Rounded, Soft, Temperature, TopK

K = 6
LOGITS = hnp.arrays(np.float32, (5, K), elements=st.floats(-20, 20, width=32))


def softmax(z):
    z = z.astype(np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@settings(deadline=None)
@given(LOGITS, st.floats(0.1, 20))
def test_soft_and_temperature(z, t):
    np.testing.assert_allclose(Soft()(torch.from_numpy(z)), softmax(z), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(Temperature(t)(torch.from_numpy(z)), softmax(z / t), rtol=1e-3, atol=1e-6)


@settings(deadline=None)
@given(LOGITS, st.integers(1, K))
def test_top_k_keeps_the_largest_as_they_are(z, k):
    full, kept = Soft()(torch.from_numpy(z)).numpy(), TopK(k)(torch.from_numpy(z)).numpy()
    np.testing.assert_array_equal(np.sort(kept, axis=1)[:, ::-1][:, :k], np.sort(full, axis=1)[:, ::-1][:, :k])
    assert np.all((kept == full) | (kept == 0))
    assert np.all((kept > 0).sum(axis=1) <= k)


@settings(deadline=None)
@given(LOGITS, st.integers(0, 6))
def test_rounding(z, decimals):
    answers = Rounded(decimals)(torch.from_numpy(z)).numpy()
    full = Soft()(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(answers, np.round(full, decimals), atol=2e-7)
    steps = answers.astype(np.float64) * 10**decimals
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-7 * 10**decimals + 1e-6)


@settings(deadline=None)
@given(LOGITS)
def test_hard_label_is_the_arg_max_of_the_logits(z):
    labels = HardLabel()(torch.from_numpy(z))
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels, z.argmax(axis=1))


def test_hard_label_sees_a_difference_that_the_softmax_loses():
    logits = torch.tensor([[0.0, 1e-8]])
    assert Soft()(logits).unique().numel() == 1
    assert HardLabel()(logits).tolist() == [1]


def test_half_precision_logits_give_float32_answers():
    assert Soft()(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


@settings(deadline=None)
@given(LOGITS, st.integers(1, K))
def test_chain_equals_the_steps_by_hand(z, k):
    chain = Compose([Temperature(3.0), Compose([Soft(), TopK(k)]), Rounded(3)])
    expected = Rounded(3).transform(TopK(k).transform(Temperature(3.0)(torch.from_numpy(z))))
    assert torch.equal(chain(torch.from_numpy(z)), expected)
    assert [type(stage) for stage in chain.stages] == [Temperature, Soft, TopK, Rounded]


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        (Soft(), "soft"),
        (Rounded(2), "soft"),
        (TopK(2), "topk"),
        (HardLabel(), "hard"),
        (Compose([Temperature(2), Rounded(1)]), "soft"),
        (Compose([TopK(2), Rounded(1)]), "topk"),
        (Compose([TopK(2), HardLabel()]), "hard"),
        (Compose([Temperature(2)]), "soft"),
    ],
)
def test_kind(policy, kind):
    assert policy.kind == kind
    answers = policy(torch.randn(3, K))
    assert answers.shape == ((3,) if kind == "hard" else (3, K))


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([HardLabel(), TopK(2)], r"TopK\(k=2\) takes probabilities, but HardLabel\(\) before it gives labels"),
        ([HardLabel(), HardLabel()], "HardLabel.* before it gives labels"),
        (
            [TopK(2), Temperature(2)],
            r"Temperature\(temperature=2.0\) takes logits, but TopK\(k=2\) before it gives prob",
        ),
        (
            [Rounded(2), Soft()],
            r"Soft\(\) takes logits, but Rounded\(decimals=2\) .* Order the policies as Temperature",
        ),
        ([], "at least one policy"),
    ],
)
def test_wrong_order(chain, message):
    with pytest.raises(ValueError, match=message):
        Compose(chain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Temperature(0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: Temperature(float("nan")), "temperature must be positive"),
        (lambda: TopK(0), "k must be at least 1, got 0"),
        (lambda: Rounded(8), r"decimals must lie in 0\.\.7, got 8"),
        (lambda: TopK(7)(torch.zeros(1, 3)), "k=7 classes, but the victim has 3"),
    ],
)
def test_wrong_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_digest_tells_policies_apart_and_is_stable():
    policies = [
        Soft(), HardLabel(), TopK(2), TopK(3), Rounded(2), Temperature(2), Compose([TopK(2), Rounded(2)]),
        Compose([Rounded(2), TopK(2)]),
    ]  # fmt: skip
    assert len({policy.digest() for policy in policies}) == len(policies)
    assert TopK(3).digest() == TopK(3).digest() == Compose([TopK(3)]).digest()


class Perturbed(Policy):
    """A defence as a user would write it."""

    def __init__(self, shift, extra=None):
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        if extra is not None:
            self.extra = extra

    def transform(self, values):
        return (values + self.shift) / (1 + self.shift * values.shape[1])


def test_policy_of_a_user():
    chain = Compose([Perturbed(0.1), HardLabel()])
    assert chain(torch.tensor([[0.0, 3.0]])).tolist() == [1]
    assert Perturbed(0.1).digest() != Perturbed(0.2).digest()
    assert json.dumps(Perturbed(0.1, extra=[1]).config()) == '{"extra": [1]}'
    with pytest.raises(TypeError, match=r"configuration of Perturbed cannot be tied to a ledger.*override config\(\)"):
        Perturbed(0.1, extra=object()).digest()
    with pytest.raises(NotImplementedError, match=r"Policy does not define transform"):
        Policy()(torch.zeros(1, 2))
