"""Encoders behind an API: asked in a secret order, and judged as in the plain one; keys that were not drawn support no claim."""

import dataclasses

import pytest
import torch
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.verification import CamouflagedDataModule, VerificationDataModule, feature_verdict
from meadef_lightning.verification.features import feature_answers

OPTIONS = {"samples": 40, "decoy_samples": 4, "batch_size": 100}


class Scattered(nn.Module):
    """Features by the last bits of each image: one sample out of place, and they differ."""

    def forward(self, x):
        bits = (x.double().flatten(1).sum(1) * 1e5).long()[:, None]
        return torch.sin(bits * torch.arange(1, 9)).double()


class Box:
    """A black box that keeps what it is asked."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def query(self, x):
        self.batches.append([row.numpy().tobytes() for row in x])
        return self.model(x)


@pytest.mark.parametrize("options", [{}, {"samples": 2}, {"decoys": 30}, {"batch_size": 7}, {"batch_size": 10_000}])
def test_answers_are_those_of_the_plain_order(options):
    asking = {**OPTIONS, **options}
    plain = feature_answers(Scattered(), VerificationDataModule(KEY, FakeData(), **asking))
    hidden = feature_answers(Box(Scattered()), CamouflagedDataModule(KEY, FakeData(), **asking))
    for name in ("scores", "trigger", "control"):
        torch.testing.assert_close(getattr(hidden, name), getattr(plain, name), rtol=0, atol=1e-12)
    assert hidden.natural_accuracy == plain.natural_accuracy
    assert float(plain.scores.abs().max()) > 0.1


def test_a_black_box_sees_natural_samples_and_then_batches_that_hold_every_kind():
    box, data = Box(Thief(KEY)), FakeData()
    verdict = feature_verdict(box, KEY, data, Independent(), **OPTIONS)
    openly = feature_verdict(Thief(KEY), KEY, data, Independent(), **OPTIONS)
    # sums in another order are rounded to other numbers
    summary = pytest.approx(openly.decoy_summary, abs=1e-12)
    assert verdict == dataclasses.replace(openly, decoy_summary=summary, statistic=pytest.approx(openly.statistic))
    assert (verdict.verdict, verdict.reference) == ("supported", True)
    sources = [row.numpy().tobytes() for row in data.tensors("verification")[0]]
    plain = VerificationDataModule(KEY, data, **OPTIONS)
    plain.setup("predict")
    kinds = [{row.numpy().tobytes() for x, _ in loader for row in x} for loader in plain.predict_dataloader()]
    kinds[2] -= kinds[0] | kinds[1]
    assert box.batches[0] == sources[:84] == sources
    mixed = box.batches[1:]
    assert len({len(batch) for batch in mixed}) == 1
    assert len(mixed) > 10
    # in any half of the requests: no batch betrays which composites belong together
    for half in (mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]):
        seen = {row for batch in half for row in batch}
        assert all(kind & seen and kind - seen for kind in kinds)
    asked = [row for batch in mixed for row in batch]
    assert all(asked.count(row) == 1 for row in kinds[0] | kinds[1])
    assert set(asked) - set(sources) == set().union(*kinds)


def test_a_key_picked_by_hand_is_inconclusive_at_most():
    picked = dataclasses.replace(KEY, drawn_uniformly=False)
    drawn, found = (feature_verdict(Thief(KEY), key, FakeData(), **OPTIONS) for key in (KEY, picked))
    assert (drawn.verdict, found.verdict) == ("supported", "inconclusive")
    assert "meadef key draw" in found.reason
    numbers = {name: value for name, value in drawn.to_dict().items() if name not in ("verdict", "reason", "exact")}
    assert numbers.items() <= found.to_dict().items()
    innocent = feature_verdict(Independent(), picked, FakeData(), **OPTIONS)
    assert innocent.verdict == "not supported"
    assert "no innocence" in innocent.reason
