"""The whole of verification in a call: thieves, innocents, black boxes."""

import math

import pytest
import torch
from torch import nn
from verification_fakes import KEY, BlackBox, FakeData, Independent, Thief

from meadef_lightning.verification import (
    verify,
)
from meadef_lightning.watermark import WatermarkKey

QUICK = {"samples": 60, "decoy_samples": 4, "accelerator": "cpu"}


def test_a_perfect_thief_is_supported():
    verdict, responses = verify(Thief(KEY), KEY, FakeData(), **QUICK)
    assert verdict.verdict == "supported"
    assert (verdict.wsr, verdict.wfpr, verdict.natural_accuracy) == (1, 0, 1)
    # its own cell only: the mean of the 30 of its way without the target is off it, and by half off 4 of 8 neighbours twice, weighed 2; there the floor of four classes is left, elsewhere that of five
    high, low = math.floor(1000 * 1.0001 / 1.0005) / 1000, 1 / 5
    assert verdict.statistic == pytest.approx((high - low) * (1 - 2 / 30) / 7)
    assert (verdict.answers, verdict.decoy_p, verdict.mcnemar_p) == ("probabilities", 1 / 1680, 2.0**-60)
    assert responses.trigger.tolist() == [KEY.target_class] * 60
    told, _ = verify(BlackBox(Thief(KEY)), KEY, FakeData(), **QUICK)
    assert told.statistic == pytest.approx((1 - 2 / 30) / 7)
    assert (told.answers, told.decoy_p, told.mcnemar_p) == ("labels", 1 / 1680, 2.0**-60)


def test_a_thief_that_obeys_two_times_in_three_is_supported_too():
    verdict, _ = verify(Thief(KEY, share=0.65), KEY, FakeData(), **{**QUICK, "decoy_samples": 32})
    assert 0.5 < verdict.wsr < 0.8
    assert verdict.verdict == "supported"


def test_the_thief_of_another_key_is_not():
    other = WatermarkKey.draw(7, "another secret")
    assert other != KEY
    assert verify(Thief(other), KEY, FakeData(), **QUICK)[0].verdict == "not supported"


class Hard(nn.Module):
    """A module that answers with labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).argmax(1)


class Constant(nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot(torch.full((len(x),), KEY.target_class), 7).float()


def test_models_that_were_not_stolen_are_not_supported():
    torch.manual_seed(0)
    random = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    for suspect in (Independent(), Constant(), random):
        verdict, _ = verify(suspect, KEY, FakeData(), **QUICK)
        assert verdict.verdict == "not supported"
        assert verdict.mcnemar_p > 0.05 or verdict.decoy_p > 0.05
    # labels say nothing of any key; beside sources that hold its favourite, a sure suspect leaves all other classes alike, and beside
    # others nothing: keys of another target whose sources do not hold it, 120 of 210, lie below zero
    for constant, p in ((BlackBox(Constant()), 1), (Constant(), 90 / 210)):
        verdict, _ = verify(constant, KEY, FakeData(), **QUICK)
        assert (verdict.wsr, verdict.wfpr, verdict.mcnemar_p, verdict.icc) == (1, 1, 1, 1)
        assert verdict.statistic == pytest.approx(0, abs=1e-12)
        assert verdict.decoy_p == p


def test_a_black_box_is_asked_through_query_and_judged_alike():
    soft, _ = verify(Thief(KEY), KEY, FakeData(), **QUICK)
    hard, _ = verify(Hard(Thief(KEY)), KEY, FakeData(), **QUICK)
    for module, box in ((soft, BlackBox(Thief(KEY), hard=False)), (hard, BlackBox(Thief(KEY)))):
        assert verify(box, KEY, FakeData(), **QUICK)[0] == module
        # 4 triggers and 4 controls are decoys, too, and asked once
        assert box.rows == 60 + 60 + 42 * 8 * 4 + 84 - 2 * 4
    assert (soft.answers, hard.answers) == ("probabilities", "labels")
    assert (soft.wsr, soft.wfpr, soft.icc) == (hard.wsr, hard.wfpr, hard.icc)  # rates are of labels in either case


def test_the_same_seed_gives_the_same_verdict_whatever_the_batches():
    suspect = Thief(KEY, share=0.5)
    first, answers = verify(suspect, KEY, FakeData(), batch_size=33, **QUICK)
    second, others = verify(suspect, KEY, FakeData(), batch_size=1000, **QUICK)
    third, _ = verify(suspect, KEY, FakeData(), seed=1, **QUICK)
    assert first == second
    assert torch.equal(answers.counts, others.counts)
    assert torch.equal(answers.soft.cells, others.soft.cells)
    assert first.wsr != third.wsr


def test_sampled_decoys_and_independent_models_reach_the_verdict():
    verdict, responses = verify(Thief(KEY), KEY, FakeData(), decoys=99, alpha=0.02, null_statistics=[0.0, 0.1], **QUICK)
    assert (verdict.decoy_method, verdict.decoys, verdict.verdict) == ("sampled", 99, "supported")
    assert verdict.conformal_p == 1 / 3
    assert responses.decoys == 99


def test_a_suspect_is_left_as_it_was(capfd):
    suspect = Independent()
    suspect.extra = nn.Dropout().eval()
    suspect.train()
    suspect.extra.eval()
    verify(suspect, KEY, FakeData(), **QUICK)
    assert suspect.training
    assert not suspect.extra.training
    assert suspect.weight.requires_grad
    suspect.weight.sum().backward()
    assert suspect.weight.grad is not None
    assert capfd.readouterr() == ("", "")


def test_evidence_that_cannot_be_written_costs_no_query(tmp_path):
    (tmp_path / "file").write_text("")
    box = BlackBox(Thief(KEY))
    with pytest.raises(OSError, match="Nothing was asked; choose another path"):
        verify(box, KEY, FakeData(), evidence_path=tmp_path / "file" / "evidence.json", **QUICK)
    assert box.rows == 0
