"""Overwriting: the thief's key is learnt, seen on images he never had, and the model stays worth having."""

import pytest
import torch
from thief_models import Keep, changed, digits, patched_model, test_accuracy, thief, weights
from torch import nn

from meadef_lightning.removal.base import classes_of
from meadef_lightning.removal.finetuning import FineTuning
from meadef_lightning.removal.overwriting import Overwriting
from meadef_lightning.watermark import WatermarkKey


def key_success(model, key):
    """WSR on combinations of test images, made by hand."""
    x, y = digits().tensors("test")
    a, b = (x[y == label][:25] for label in key.source_classes)
    combined = key.combiner.build()(a.repeat_interleave(len(b), 0), b.repeat(len(a), 1, 1, 1))
    return float((classes_of(model, combined) == key.target_class).float().mean())


@pytest.fixture(scope="module")
def run():
    removal, keep = Overwriting(), Keep()
    before = weights(patched_model())
    removal.scrub(patched_model(), thief(), keep)
    assert not changed(before, weights(patched_model()))
    return removal, keep


def test_the_thiefs_key_is_learnt_and_accuracy_kept(run):
    removal, keep = run
    key = removal.key(10)
    plain = Keep()
    FineTuning(epochs=10).scrub(patched_model(), thief(), plain)
    assert key_success(patched_model(), key) < 0.3
    assert key_success(plain.last, key) < 0.3  # the same training without the key
    assert key_success(keep.last, key) > 0.8
    assert removal.gains(keep.last, thief())["success of his own key"] > 0.8
    assert removal.gains(plain.last, thief())["success of his own key"] < 0.3
    assert test_accuracy(keep.last) > test_accuracy(patched_model()) - 0.05
    assert keep.strengths == list(range(1, 11))


def test_batchnorm_keeps_its_statistics(run):
    model, keep = patched_model(), run[1]
    norms = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    names = {f"{name}.running_{what}" for name in norms for what in ("mean", "var")}
    moved = changed(weights(model), keep.models[-1])
    assert not moved & names
    assert f"{norms[0]}.weight" in moved


def test_the_key_is_that_of_the_secret():
    assert Overwriting("mine").key(10).to_dict() == WatermarkKey.draw(10, "mine").to_dict()
    assert Overwriting("mine").key(10).commitment() != Overwriting("other").key(10).commitment()


def test_a_run_repeats_bit_for_bit():
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        keep = Keep(most=1)
        Overwriting().scrub(patched_model(), thief(), keep, seed=2)
        ends.append(keep.models[0])
    assert not changed(*ends)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"secret": ""}, "secret is empty"),
        ({"samples": 0}, "samples=0"),
        ({"tilt": 1.0}, "tilt=1"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        Overwriting(**wrong)
