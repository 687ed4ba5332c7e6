from functools import partial

import pytest
import torch
from thief_models import TARGET, Keep, changed, digits, patch_success, patched_model, test_accuracy, thief, weights

from meadef_lightning.removal.base import classes_of
from meadef_lightning.removal.finetuning import FineTuning
from meadef_lightning.removal.gan_unlearning import GANUnlearning, Reversal, reverse_triggers


@pytest.fixture(scope="module")
def reversal() -> Reversal:
    return GANUnlearning().reverse(patched_model(), thief())


def test_the_planted_class_stands_out(reversal):
    sizes = reversal.sizes
    assert int(sizes.argmin()) == TARGET
    assert float(reversal.index[TARGET]) < -1.8
    assert float(sizes[TARGET]) < 0.6 * float(sizes[torch.arange(10) != TARGET].min())


def test_its_triggers_lie_where_the_patch_is_and_turn_images_that_nobody_trained_on(reversal):
    masks = reversal.masks.mean(1)[:, 0]
    # the patch, which covers 13 to 15, and what a convolution sees of it
    corner = masks[:, 11:, 11:].mean((1, 2)) / masks.mean((1, 2))
    assert float(corner[TARGET]) > 2
    assert int(corner.argmax()) == TARGET
    x, y = digits().tensors("test")
    x = x[y != TARGET]
    drawn = torch.arange(len(x)) % len(reversal.masks[TARGET])
    stamped = torch.lerp(x, reversal.patterns[TARGET][drawn], reversal.masks[TARGET][drawn])
    assert (classes_of(patched_model(), x) == TARGET).float().mean() < 0.05
    assert (classes_of(patched_model(), stamped) == TARGET).float().mean() > 0.7


def test_masks_and_patterns_are_in_range(reversal):
    assert reversal.masks.shape == (10, 16, 1, 16, 16)
    assert reversal.patterns.shape == (10, 16, 1, 16, 16)
    assert reversal.pictures.shape == (10, 1, 16, 16)
    assert reversal.turned.shape == (10,)
    assert 0 <= float(reversal.masks.min()) <= float(reversal.masks.max()) <= 1
    assert float(thief().low.min()) <= float(reversal.patterns.min())
    assert float(reversal.patterns.max()) <= float(thief().high.max())
    expected = (reversal.masks[3] * reversal.patterns[3]).mean(0)
    torch.testing.assert_close(reversal.pictures[3], expected)


def made_up(sizes: list[float], turned: list[float]) -> Reversal:
    masks = torch.tensor(sizes)[:, None, None, None, None].expand(-1, 2, 1, 4, 4)
    return Reversal(masks, torch.zeros(len(sizes), 2, 3, 4, 4), torch.tensor(turned))


def test_a_mask_that_turns_nothing_counts_as_a_full_one():
    found = made_up([0.5, 0.01, 0.4], [1.0, 0.49, 0.5])
    assert found.sizes.tolist() == pytest.approx([0.5, 1.0, 0.4])


def test_index_by_hand_and_flags():
    found = made_up([0.30, 0.34, 0.26, 0.30, 0.02, 0.32], [1.0] * 6)
    # median 0.30; distances 0, 0.04, 0.04, 0, 0.28, 0.02; their median 0.03
    assert float(found.index[4]) == pytest.approx(-0.28 / (1.4826 * 0.03), rel=1e-4)
    assert GANUnlearning().flagged(found) == [4]
    # large ones are not suspicious
    assert GANUnlearning().flagged(made_up([0.30, 0.34, 0.26, 0.30, 0.98, 0.32], [1.0] * 6)) == [2]


def test_without_a_flagged_class_the_smallest_is_unlearnt_and_a_message_says_so(monkeypatch):
    said = []
    monkeypatch.setattr("meadef_lightning.removal.gan_unlearning.rank_zero_info", said.append)
    assert GANUnlearning().flagged(made_up([0.3, 0.34, 0.28, 0.31], [1.0] * 4)) == [2]
    assert "smallest score, 2" in said[0]


class KnownTriggers(GANUnlearning):
    """Skips a search that was made before."""

    def __init__(self, found: Reversal, **arguments: float) -> None:
        super().__init__(**arguments)
        self.found = found

    def reverse(self, model, data, seed=0):
        return self.found


def test_it_removes_a_patch_backdoor_and_tuning_alone_does_not(reversal):
    model = patched_model()
    assert patch_success(model) > 0.95
    before, state, keep, control = weights(model), torch.get_rng_state(), Keep(), Keep()
    KnownTriggers(reversal).scrub(model, thief(), keep)
    assert GANUnlearning.from_scratch
    assert keep.strengths == list(range(1, 11))
    assert test_accuracy(keep.last) >= test_accuracy(model) - 0.04
    assert patch_success(keep.last) < 0.4
    assert not changed(before, weights(model))
    assert torch.equal(state, torch.get_rng_state())
    tune = FineTuning("FTAL", epochs=10, batch_size=32, optimizer=partial(torch.optim.Adam, lr=2e-3))
    tune.scrub(model, thief(), control)
    assert patch_success(control.last) > 0.6


def test_equal_seeds_give_equal_triggers_and_weights():
    model, state = patched_model(), torch.get_rng_state()
    before = weights(model)
    first, again, other = (reverse_triggers(model, thief(), seed, steps=2, images=4, at_once=4) for seed in (0, 0, 1))
    assert first.masks.shape == (10, 4, 1, 16, 16)
    assert torch.equal(first.masks, again.masks)
    assert torch.equal(first.patterns, again.patterns)
    assert not torch.equal(first.masks, other.masks)
    runs = [Keep(most=1), Keep(most=1)]
    for keep in runs:
        GANUnlearning(steps=2, images=2, epochs=3).scrub(model, thief(), keep)
    assert runs[0].strengths == [1]
    assert not changed(runs[0].models[0], runs[1].models[0])
    assert not changed(before, weights(model))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"threshold": 0.0},
        {"steps": 0},
        {"images": 0},
        {"weight": 0.0},
        {"success": 1.5},
        {"realism": -1.0},
        {"at_once": 0},
        {"batch_size": 0},
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GANUnlearning(**arguments)
