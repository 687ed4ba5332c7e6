"""Adversarial fine-tuning: pairs, labels and combinations as they are drawn, and a plain watermark that does not survive it."""

from dataclasses import replace

import pytest
import torch
from thief_models import SOURCES, TARGET, Keep, changed, digits, mix_success, mixed_model, thief, weights

from meadef_lightning.removal.adversarial import AdversarialFineTuning, _MixTuner, class_pairs, mix_labels
from meadef_lightning.removal.base import accuracy
from meadef_lightning.removal.finetuning import FineTuning
from meadef_lightning.watermark import CropPaste, PixelBlend


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_ordered_pair_of_classes_is_as_likely_whatever_the_classes_sizes():
    y = torch.tensor([0] * 50 + [2] * 3 + [3] * 10)[torch.randperm(63, generator=generator())]
    first, second = class_pairs(y, 60_000, generator(1))
    counts = torch.bincount(y[first] * 4 + y[second], minlength=16).reshape(4, 4)
    assert counts.diagonal().sum() == 0
    present = counts[counts > 0]
    assert len(present) == 6  # class 1 has no sample
    assert (present - 10_000).abs().max() < 500  # five standard deviations and more
    rare = torch.bincount(first, minlength=63)[y == 2]
    assert (rare / rare.sum() - 1 / 3).abs().max() < 0.03


def test_one_class_cannot_be_paired():
    with pytest.raises(ValueError, match="the thief has 1"):
        class_pairs(torch.zeros(5, dtype=torch.int64), 3, generator())


@pytest.mark.parametrize(("labels", "allowed"), [("wrong", {0, 2, 4}), ("random", {0, 1, 2, 3, 4}), ("source", {1, 3})])
def test_labels_are_uniform_over_the_classes_they_may_be(labels, allowed):
    for first, second in ((1, 3), (3, 1)):
        drawn = mix_labels(torch.full((9000,), first), torch.full((9000,), second), 5, labels, generator())
        counts = torch.bincount(drawn, minlength=5)
        assert set(counts.nonzero().flatten().tolist()) == allowed
        assert (counts[counts > 0] / 9000 - 1 / len(allowed)).abs().max() < 0.03


def tuner(labels="source", combiners=None, seed=0):
    ways = [CropPaste(), PixelBlend()] if combiners is None else combiners
    return _MixTuner(mixed_model(), torch.optim.SGD, thief(), ways, 0.5, labels, seed)


def test_a_combination_is_made_of_two_of_the_thiefs_images_and_wears_their_label():
    data = thief()
    x, y = tuner(combiners=[CropPaste()]).mixes(40, torch.device("cpu"))
    half = data.x.shape[-1] // 2
    left = (x[:, None, ..., :half] == data.x[None, ..., :half]).flatten(2).all(-1)
    right = (x[:, None, ..., half:] == data.x[None, ..., half:]).flatten(2).all(-1)
    assert left.any(1).all()
    assert right.any(1).all()
    sources = torch.stack([data.y[side.float().argmax(1)] for side in (left, right)])
    assert (sources[0] != sources[1]).all()
    assert ((y == sources[0]) | (y == sources[1])).all()


def test_combinations_are_fresh_and_repeat_with_the_seed():
    one = tuner()
    first, second = (one.mixes(20, torch.device("cpu")) for _ in range(2))
    again = tuner().mixes(20, torch.device("cpu"))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])


def test_a_step_is_the_mean_over_clean_images_and_their_share_of_combinations():
    data, one = thief(), tuner()
    x, y = data.x[:10], data.y[:10]
    loss = one.training_step((x, y))
    mixed, target = tuner().mixes(5, torch.device("cpu"))
    log_p = one.model(torch.cat([x, mixed])).log_softmax(-1)
    expected = -log_p[torch.arange(15), torch.cat([y, target])].mean()
    torch.testing.assert_close(loss, expected)


def small(data):
    """A task of three classes, where every sixth combination in the owner's way is of his sources in his order."""
    mine = torch.isin(data.y, torch.tensor([*SOURCES, TARGET]))
    return replace(data, x=data.x[mine], y=data.y[mine])


@pytest.fixture(scope="module")
def tuned():
    before, data = weights(mixed_model()), small(thief())
    removals = {
        labels: AdversarialFineTuning(labels, combiners=[CropPaste()], batch_size=16) for labels in ("wrong", "source")
    }
    ends = {}
    for name, removal in (removals | {"clean": FineTuning(epochs=10, batch_size=16)}).items():
        keep = Keep()
        removal.scrub(mixed_model(), data, keep)
        assert keep.strengths == list(range(1, 11))
        ends[name] = keep.last
    assert not changed(before, weights(mixed_model()))
    return ends


@pytest.mark.parametrize("labels", ["wrong", "source"])
def test_positive_control_a_plain_watermark_does_not_survive(tuned, labels):
    """Clean fine-tuning of as many epochs on the same images is the control."""
    x, y = digits().tensors("test")
    mine = torch.isin(y, torch.tensor([*SOURCES, TARGET]))
    assert mix_success(mixed_model()) > 0.9
    assert mix_success(tuned["clean"]) > 0.6
    assert mix_success(tuned[labels]) < 0.3
    assert accuracy(tuned[labels], x[mine], y[mine]) > 0.8


def test_runs_repeat_bit_for_bit():
    ends = []
    for _ in range(2):
        keep = Keep(most=1)
        torch.manual_seed(len(ends))
        AdversarialFineTuning("random", ratio=0.3).scrub(mixed_model(), thief(), keep, seed=4)
        ends.append(keep.models)
    assert len(ends[0]) == 1
    assert not changed(*[models[0] for models in ends])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": "true"}, "labels='true' must be one of"),
        ({"ratio": 0.0}, r"ratio=0\.0 must be positive"),
        ({"combiners": []}, "leaves no way to combine"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        AdversarialFineTuning(**wrong)
