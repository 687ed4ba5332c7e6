"""Blinding, which only the key's holder can undo, and seals, which only he can make."""

import dataclasses
import hashlib
import hmac
import json

import pytest
import torch
from verification_fakes import KEY, FakeData, Thief

from meadef_lightning.verification import Evidence, judge, verify
from meadef_lightning.verification.sealing import Blinding, seals

QUICK = {"samples": 60, "decoy_samples": 4, "accelerator": "cpu"}


def test_answers_and_cells_are_blinded_differently_for_every_salt():
    """The published statistic and the favourite answer must not point at the key: over salts the names are uniform."""
    _, responses = verify(Thief(KEY, share=0.7), KEY, FakeData(), **{**QUICK, "decoy_samples": 8})
    targets, places = [], []
    for i in range(70):
        key = dataclasses.replace(KEY, salt=f"{i:032x}")
        verdict = judge(responses, key)
        evidence = Evidence.collect(
            verdict, responses, key, model_sha256=None, data_sha256={"verification": "0" * 64, "test": "0" * 64}
        )
        assert evidence.check(key) == verdict
        trigger = evidence.answers["trigger"]
        targets.append(max(set(trigger), key=trigger.count))
        # this thief's answers differ within no cell but the key's
        [place] = [row for row, counts in enumerate(evidence.answers["cells"]) if max(counts) < 8]
        places.append(place)
    counts = torch.bincount(torch.tensor(targets), minlength=7)
    assert float(((counts - 10) ** 2 / 10).sum()) < 22.5  # chi-squared, 6 degrees of freedom, p = .001
    assert len(set(places)) > 50  # of 70 draws among 336 places
    assert 336 / 3 < sum(places) / 70 < 336 * 2 / 3


@pytest.mark.parametrize("width", [7, 4])
def test_what_is_hidden_is_revealed_and_the_names_are_those_of_the_columns(width):
    blinding = Blinding.of(KEY, 3, 5, width)
    labels, table = torch.tensor([6, 0, 3, 3]), torch.arange(5 * width).reshape(5, width)
    assert torch.equal(blinding.reveal_labels(blinding.hide_labels(labels)), labels)
    assert torch.equal(blinding.reveal_table(blinding.hide_table(table)), table)
    written = blinding.hide_table(table)
    for row, column in ((0, 0), (4, width - 1)):
        place = blinding.hide_labels(torch.tensor(column)) if width == 7 else blinding.places[column]
        assert written[blinding.rows.tolist().index(row), place] == table[row, column]


def test_seals_are_an_hmac_of_every_field():
    """By hand, from the salt and the canonical JSON of path and value."""
    made = seals({"a": {"b": [1, None]}, "c": "x"}, KEY)
    secret = f"meadef_lightning evidence 3 {KEY.salt}".encode()
    for path, value in (("a.b", [1, None]), ("c", "x")):
        text = json.dumps([path, value], separators=(",", ":")).encode()
        assert made[path] == hmac.new(secret, text, hashlib.sha256).hexdigest()
    assert made.keys() == {"a.b", "c"}
    assert seals({"c": "x"}, dataclasses.replace(KEY, salt="0" * 32))["c"] != made["c"]
