"""Distilling again: a network that knows nothing learns the model's answers, and nothing that these do not say."""

import pytest
import torch
from thief_models import Keep, changed, mixed_model, patch_success, patched_model, test_accuracy, thief, weights
from torch import nn

from meadef_lightning.data.augmentation import RandomShiftFlip
from meadef_lightning.extraction.student import distillation_loss
from meadef_lightning.removal.base import classes_of, logits_of
from meadef_lightning.removal.distil_again import DistilAgain
from meadef_lightning.victims.networks import MLP, DigitsCNN


def scrub(model=None, seed=0, most=10**6, **options):
    keep = Keep(most)
    DistilAgain(**options).scrub(model or patched_model(), thief(), keep, seed)
    return keep


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_it_begins_with_new_weights_that_follow_from_the_seed():
    before = weights(patched_model())
    one, again, other = (scrub(seed=seed, epochs=1, optimizer=still).models[0] for seed in (1, 1, 2))
    learnt = {name for name, _ in patched_model().named_parameters()}
    assert learnt <= changed(before, one)
    assert not changed(one, again)
    assert {name for name in learnt if name.endswith("weight") and one[name].ndim > 1} <= changed(one, other)
    # the start owes nothing to the model it was copied from
    assert not changed(one, scrub(mixed_model(), seed=1, epochs=1, optimizer=still).models[0]) & learnt
    assert not changed(before, weights(patched_model()))


@pytest.fixture(scope="module")
def run():
    return scrub(epochs=15)


def test_the_students_loss_falls_on_the_models_own_answers(run):
    data = thief()
    answers = logits_of(patched_model(), data.validation_x).softmax(-1)
    assert run.strengths == list(range(1, 16))
    network, losses = DigitsCNN(10, 1, width=8, hidden=32).eval(), []
    for state in (run.models[0], run.models[-1]):
        network.load_state_dict(state)
        losses.append(float(distillation_loss(logits_of(network, data.validation_x), answers)))
    assert losses[1] < 0.5 * losses[0]


def test_positive_control_accuracy_comes_along_and_a_patch_does_not(run):
    assert patch_success(patched_model()) > 0.9
    assert patch_success(run.last) < 0.2
    assert test_accuracy(run.last) > test_accuracy(patched_model()) - 0.1


def test_hard_answers_are_the_models_classes():
    """A model that calls everything class 4 teaches just that."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DigitsCNN(10, 1, width=8, hidden=32)

        def forward(self, x):
            return self.inner(x) * 0 + 5 * nn.functional.one_hot(torch.tensor(4), 10)

    keep = Keep()
    removal = DistilAgain(network=lambda k, c: MLP(k, c, hidden=(16,)), answers="hard", epochs=8)
    removal.scrub(Constant(), thief(), keep)
    assert (classes_of(keep.last, thief().validation_x) == 4).all()


def test_another_network_is_made_in_the_tasks_sizes():
    asked = []

    def network(num_classes, in_channels):
        asked.append((num_classes, in_channels))
        return MLP(num_classes, in_channels, hidden=(32,))

    removal, model = DistilAgain(network=network, epochs=1), patched_model()
    keep = Keep()
    removal.scrub(model, thief(), keep)
    shell = removal.prepare(model)
    assert asked == [(10, 1), (10, 1)]
    shell.load_state_dict(keep.models[0])
    assert DistilAgain().prepare(model) is model
    with pytest.raises(ValueError, match="Flatten does not tell its numbers"):
        removal.prepare(nn.Flatten())


def test_the_augmentation_acts_on_training_images_only():
    seen = []

    class Spy(RandomShiftFlip):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    plain, moved = scrub(epochs=1), scrub(epochs=1, augmentation=Spy(shift=2))
    assert seen == [64] * 6
    assert changed(plain.models[0], moved.models[0])


def test_a_run_repeats_bit_for_bit_and_stops_when_told():
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        keep = scrub(seed=3, most=2, epochs=4, augmentation=RandomShiftFlip())
        assert keep.strengths == [1, 2]
        ends.append(keep.models[1])
    assert not changed(*ends)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answers": "top1"}, "answers='top1' must be 'soft' or 'hard'"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be positive"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistilAgain(**wrong)
