"""What a commitment says of a key, and what repeating a draw does not show."""

import dataclasses
import json

import pytest
from verification_fakes import KEY

from meadef_lightning.verification import Commitment, EvidenceError, repeat_draw
from meadef_lightning.verification.commitment import free_choices
from meadef_lightning.verification.signing import render, sign
from meadef_lightning.watermark import DEFAULT_COMBINERS, WatermarkKey

SECRET = b"an owner secret"


@pytest.mark.parametrize(("name", "value"), [("space_size", 10**9), ("num_classes", 8), ("drawn_uniformly", False)])
def test_what_it_says_of_the_key_must_be_true(name, value):
    """The owner signs what he likes; whoever holds the key can tell."""
    content = json.loads(Commitment.make(KEY, secret=SECRET).document)
    content["key"][name] = value
    changed = Commitment.parse(render(sign(content, None)), "the commitment")
    with pytest.raises(EvidenceError, match=rf"key\.{name} differs: the commitment says something else"):
        changed.check(KEY)
    Commitment.make(KEY).check(KEY)
    with pytest.raises(EvidenceError, match=r"key\.commitment differs.*another key"):
        Commitment.make(KEY).check(dataclasses.replace(KEY, seed=KEY.seed + 1))


def test_a_key_space_can_be_ground_after_the_beacon_and_a_judge_is_told():
    """Orders of the same ways draw different keys from one secret and beacon, and each draw can be repeated."""
    made = []
    for turn in range(4):
        ways = DEFAULT_COMBINERS[turn:] + DEFAULT_COMBINERS[:turn]
        key = WatermarkKey.draw(7, SECRET, "block 1234567", ways)
        repeat_draw(key, SECRET, "block 1234567")
        made.append((key.source_classes, key.target_class, key.combiner))
        notes = free_choices(key)
        assert len(notes) == (turn > 0)
        assert not turn or "The 8 ways of combining in the key's space are not this package's" in notes[0]
    assert len(set(made)) == 4


def test_a_secret_that_is_no_text_draws_the_key_of_its_bytes():
    """As an environment variable gives it to Python."""
    raw = b"\xff\xfe secret bytes \x80"
    assert WatermarkKey.draw(7, raw.decode(errors="surrogateescape")) == WatermarkKey.draw(7, raw)
    assert WatermarkKey.draw(7, "gr\u00fcn") == WatermarkKey.draw(7, "gr\u00fcn".encode())
