"""What a suspect's labels stand for, in evidence and bundles: derived again, named where it was changed, told anew by a judge."""

import json

import pytest
import torch
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.verification import (
    Bundle,
    EvidenceError,
    LabelMap,
    align_labels,
    check_evidence,
    relabelled,
    verify,
)
from meadef_lightning.verification import labels as module
from meadef_lightning.verification.relabelling import RelabelledModule
from meadef_lightning.verification.sealing import seals

OPTIONS = {"samples": 140, "decoys": 1500, "decoy_samples": 8, "accelerator": "cpu", "alpha": 0.01}
SHUFFLED = [3, 5, 0, 6, 1, 4, 2]
OTHER = next(k for k in range(7) if k not in (*KEY.source_classes, KEY.target_class))
MERGED = [KEY.target_class if k == OTHER else k for k in range(7)]


class Told(nn.Module):
    """A model that answers ``names[k]`` for class ``k``."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, torch.tensor(names)

    def forward(self, x):
        return self.names[self.model(x).argmax(1)]


class Box:
    def __init__(self, model):
        self.query = model


def judged(names, path, box=False):
    """Judges a thief that numbers classes its own way; returns verdict and map."""
    told = Told(Thief(KEY), names)
    suspect, labels = relabelled(Box(told) if box else told, FakeData().tensors("test"), 7)
    reference = None
    if labels.merged:
        _, reference = verify(RelabelledModule(Independent(), labels.coarsening()), KEY, FakeData(), **OPTIONS)
    verdict, _ = verify(suspect, KEY, FakeData(), reference=reference, evidence_path=path, **OPTIONS)
    return verdict, labels


@pytest.fixture(scope="module", params=["permuted", "merged", "permuted black box"])
def case(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "evidence.json"
    names = MERGED if request.param == "merged" else SHUFFLED
    return path, *judged(names, path, "box" in request.param)


def test_the_verdict_follows_and_the_map_is_told(case):
    path, verdict, labels = case
    assert verdict.verdict == "supported"
    assert check_evidence(path, KEY) == verdict
    content = json.loads(path.read_text())
    assert content["procedure"]["labels"] == labels.to_dict()
    bundle = Bundle.make(path.read_bytes(), KEY)
    assert torch.equal(bundle.evidence.labels.classes, labels.classes)
    for key in (KEY, None):
        assert labels.describe() in bundle.check(key).notes
    assert KEY.salt not in path.read_text()


def test_without_a_map_nothing_is_said(tmp_path):
    path = tmp_path / "evidence.json"
    verify(Thief(KEY), KEY, FakeData(), evidence_path=path, **OPTIONS)
    bundle = Bundle.make(path.read_bytes(), KEY)
    assert bundle.evidence.labels is None
    assert not any("labels" in note or "numbers" in note for note in bundle.check(KEY).notes)


def changed(content, change):
    labels = json.loads(json.dumps(content["procedure"]["labels"]))
    change(labels)
    return {**content, "procedure": {**content["procedure"], "labels": labels}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda labels: labels["classes"].reverse(), "classes"),
        (lambda labels: labels["classes"][0].append(6), "classes"),
        (lambda labels: labels.update(kind="identity"), "kind"),
        (lambda labels: labels.update(agreement=0.99), "agreement"),
        (lambda labels: labels.update(samples=85), "samples"),
        (lambda labels: labels["counts"].pop(), "agreement|samples"),
        (lambda labels: labels["counts"].reverse(), "counts"),
    ],
)
def test_a_map_that_does_not_follow_is_named_even_with_a_valid_seal_and_without_a_key(case, change, field, tmp_path):
    content = json.loads(case[0].read_text())
    forged = changed(content, change)
    path = tmp_path / "forged.json"
    path.write_text(json.dumps(forged))
    with pytest.raises(EvidenceError, match=r"Fields that differ: procedure\.labels"):
        check_evidence(path, KEY)
    sealed = {**forged, "seal": seals({k: v for k, v in forged.items() if k != "seal"}, KEY)}
    path.write_text(json.dumps(sealed))
    with pytest.raises(EvidenceError, match=rf"procedure\.labels cannot be used: the map does not follow .*({field})"):
        check_evidence(path, KEY)
    with pytest.raises(EvidenceError, match=r"procedure\.labels cannot be used"):
        Bundle.make(json.dumps(sealed).encode(), KEY)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "has the fields"),
        ({"classes": 3}, "classes must list"),
        ({"classes": []}, "classes must list"),
        ({"classes": [[0]] * 100_001}, "classes must list"),
        ({"counts": None}, "counts must be"),
        ({"counts": []}, "counts must be"),
        ({"counts": [[0, 0]]}, "counts must be"),
        ({"counts": [[0, 0, 0]]}, "counts must be"),
        ({"counts": [[7, 0, 1]]}, "counts must be"),
        ({"counts": [[0, 7, 1]]}, "counts must be"),
        ({"counts": [[-1, 0, 1]]}, "counts must be"),
        ({"counts": [[0, 0, 1 << 40]]}, "counts must be"),
        ({"counts": [[0, 0, True]]}, "counts must be"),
        ({"counts": [["0", 0, 1]]}, "counts must be"),
    ],
)
def test_malformed_maps_are_refused(value, message):
    good = align_labels(torch.arange(7), torch.arange(7), 7).to_dict()
    with pytest.raises(ValueError, match=message):
        LabelMap.from_dict({**good, **value} if value else value, 7)


def test_maps_read_back_and_large_ones_take_no_memory(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(5).repeat(40)
    for labels in (3, 5, 8):
        found = align_labels(
            (truth % labels + (torch.rand(200, generator=generator) < 0.1)) % labels, truth, 5, num_labels=labels
        )
        again = LabelMap.from_dict(json.loads(json.dumps(found.to_dict())), 5)
        assert torch.equal(again.classes, found.classes)
        assert torch.equal(again.counts, found.counts)
    monkeypatch.setattr(module, "MOST_COUNTS", 34)
    with pytest.raises(ValueError, match="classes must list"):
        LabelMap.from_dict(align_labels(torch.arange(5), torch.arange(5), 5).to_dict(), 7)
    with pytest.raises(ValueError, match="too large a table"):
        align_labels(truth, truth, 5, num_labels=7)
