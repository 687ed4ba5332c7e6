"""Finding samples, labels and logits in whatever a loader yields or a model answers."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from meadef_lightning.watermark.batches import pick

Pair = namedtuple("Pair", "image label")


@dataclass
class Sample:
    image: str = "x"
    label: str = "y"


class Slotted:
    __slots__ = ("image",)

    def __init__(self):
        self.image = "x"


@pytest.mark.parametrize(
    ("container", "key", "found"),
    [
        (("x", "y"), 0, "x"),
        (["x", "y"], 1, "y"),
        (("x", "y"), -1, "y"),
        (Pair("x", "y"), 1, "y"),
        (Pair("x", "y"), "image", "x"),
        ({"image": "x", 3: "y"}, "image", "x"),
        ({"image": "x", 3: "y"}, 3, "y"),
        ({"keys": "x"}, "keys", "x"),  # the entry, not the method
        (OrderedDict(image="x"), "image", "x"),
        (Sample(), "label", "y"),
        (SimpleNamespace(logits="x"), "logits", "x"),
        (Slotted(), "image", "x"),
        ({"a": {"b": "x"}}, lambda batch: batch["a"]["b"], "x"),
        (("x", "y"), None, ("x", "y")),
    ],
)
def test_pick_finds(container, key, found):
    assert pick(container, key, "input_key") == found


def test_pick_copies_nothing():
    x, y = torch.randn(3, 2), torch.arange(3)
    assert pick((x, y), 0, "input_key") is x
    assert pick(x, None, "output_key") is x


@pytest.mark.parametrize(
    ("container", "key", "message"),
    [
        (("x",), 1, r"target_key=1 points to nothing: got a tuple of 1 parts"),
        (["x"], "label", r"target_key='label' points to nothing: got a list of 1 parts"),
        ({"image": 1, "y": 2}, "label", r"a mapping with the keys \['image', 'y'\]"),
        ({"image": 1}, 0, r"target_key=0 .* a mapping with the keys \['image'\]"),
        (Sample(), "labels", r"a Sample with \['image', 'label'\]"),
        (Sample(), 0, r"a Sample with"),
        (Slotted(), "label", r"got a Slotted\. Give an index, a key, an attribute or a function"),
        (None, 1, "got a NoneType"),
    ],
)
def test_pick_says_what_there_is(container, key, message):
    with pytest.raises(ValueError, match=message):
        pick(container, key, "target_key")


def test_errors_inside_a_users_function_are_the_users():
    with pytest.raises(KeyError, match="nope"):
        pick({}, lambda batch: batch["nope"], "input_key")
