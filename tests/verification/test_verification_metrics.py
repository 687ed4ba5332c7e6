import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meadef_lightning.verification import FalsePositiveRate, Fidelity, WatermarkSuccessRate, metrics

labels = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def test_docstring_examples_run():
    result = doctest.testmod(metrics)
    assert result.attempted > 6
    assert result.failed == 0


@pytest.mark.parametrize("metric", [WatermarkSuccessRate, FalsePositiveRate])
@given(batches=st.lists(labels, min_size=1, max_size=4))
def test_rates_are_shares_over_all_batches(metric, batches):
    by_labels, by_scores = metric(target=2), metric(target=2)
    for batch in batches:
        by_labels.update(torch.tensor(batch))
        by_scores.update(torch.nn.functional.one_hot(torch.tensor(batch), 4).half())
    everything = [label for batch in batches for label in batch]
    expected = everything.count(2) / len(everything)
    assert by_labels.compute().item() == pytest.approx(expected)
    assert by_scores.compute().item() == pytest.approx(expected)


def test_fidelity_counts_agreement_of_scores_with_labels():
    fidelity = Fidelity()
    fidelity.update(torch.tensor([0, 1, 2]), torch.eye(3))
    fidelity.update(torch.eye(3)[[1, 1]], torch.tensor([0, 1]))
    assert fidelity.compute().item() == pytest.approx(4 / 5)


def test_states_of_two_processes_add_up():
    first, second = WatermarkSuccessRate(1), WatermarkSuccessRate(1)
    first.update(torch.tensor([1, 1, 0]))
    second.update(torch.tensor([0]))
    for name, state in first._defaults.items():
        assert first._reductions[name](torch.stack([torch.tensor(3), torch.tensor(4)])) == 7
        assert state == 0
    first.merge_state(second)
    assert first.compute() == 0.5


@pytest.mark.parametrize(
    "bad", [torch.rand(3), torch.ones(2, 3, dtype=torch.long), torch.rand(2, 3, 4), torch.ones(2) > 0]
)
def test_other_forms_are_refused(bad):
    with pytest.raises(ValueError, match=r"shape \(B, K\), or integer labels"):
        WatermarkSuccessRate(0).update(bad)


def test_fidelity_needs_the_same_samples():
    with pytest.raises(ValueError, match="got 2 and 3"):
        Fidelity().update(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
