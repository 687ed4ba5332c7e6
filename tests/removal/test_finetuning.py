"""Fine-tuning: what each mode changes and what it may not, against a loop written by hand, and a backdoor that it can remove."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from thief_models import Keep, changed, patch_success, patched_model, stamped, test_accuracy, thief, weights
from torch import nn

from meadef_lightning.data.loading import epoch_order
from meadef_lightning.removal.base import Removal, accuracy, classes_of
from meadef_lightning.removal.finetuning import FineTuning


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def scrub(model=None, data=None, seed=0, **options):
    keep = Keep()
    FineTuning(**options).scrub(model or patched_model(), data or thief(), keep, seed)
    return keep


def last_names(model):
    """Names of the last linear layer's parameters: of these networks, the last that was registered."""
    return set(list(model.state_dict())[-2:])


@pytest.mark.parametrize("mode", ["FTLL", "RTLL"])
def test_last_layer_modes_change_the_last_layer_only_bit_for_bit(mode):
    model = patched_model()
    before = weights(model)
    keep = scrub(mode=mode, epochs=2)
    assert keep.strengths == [1, 2]
    for after in keep.models:
        assert changed(before, after) == last_names(model)  # running statistics are part of the state, too
    assert not changed(before, weights(model))


@pytest.mark.parametrize("mode", ["FTAL", "RTAL"])
def test_the_other_modes_change_everything(mode):
    before = weights(patched_model())
    assert changed(before, scrub(mode=mode, epochs=1).models[0]) == set(before)
    assert not changed(before, weights(patched_model()))


@pytest.mark.parametrize("mode", ["FTAL", "FTLL", "RTAL", "RTLL"])
def test_rt_begins_with_a_last_layer_that_knows_nothing(mode):
    """With a learning rate of 0 one sees where a mode begins."""
    data = thief()
    keep = scrub(mode=mode, epochs=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    began = accuracy(keep.last, data.validation_x, data.validation_y)
    assert FineTuning(mode).from_scratch == mode.startswith("RT")
    assert began < 0.4 if mode.startswith("RT") else began > 0.9
    other = scrub(mode=mode, epochs=1, seed=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    same = all(torch.equal(keep.models[0][name], other.models[0][name]) for name in last_names(keep.last))
    assert same != mode.startswith("RT")


def by_hand(model, x, y, parameters, epochs):
    """The same in plain torch: an order for each epoch, whole batches only."""
    optimizer = sgd(parameters)
    for epoch in range(epochs):
        for rows in epoch_order(len(x), 3, epoch).split(64)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


def test_all_layers_against_a_loop_written_by_hand():
    data = thief()
    keep = scrub(mode="FTAL", epochs=2, optimizer=sgd, seed=3)
    model = copy.deepcopy(patched_model()).train()
    expected = by_hand(model, data.x, data.y, model.parameters(), 2)
    assert not changed(weights(expected), keep.models[1])


def test_the_last_layer_against_a_linear_model_on_its_features():
    data, model = thief(), patched_model()
    keep = scrub(mode="FTLL", epochs=2, optimizer=sgd, seed=3)
    features = []
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _layer, inputs: features.append(inputs[0].detach()))
    classes_of(model, data.x)
    hook.remove()
    linear = copy.deepcopy(last)
    expected = by_hand(linear, torch.cat(features), data.y, linear.parameters(), 2)
    for name, value in zip(sorted(last_names(model)), (expected.bias, expected.weight), strict=True):
        torch.testing.assert_close(keep.models[1][name], value.detach(), rtol=1e-4, atol=1e-6)


def test_pseudo_labels_are_the_answers_of_the_untouched_model():
    """Tuning with the model's labels is tuning with true labels that happen to be the model's answers."""
    model, data = patched_model(), thief()
    odd = replace(
        data, x=torch.cat([data.x[:96], stamped(data.x[:96])]), y=data.y[:96].repeat(2)
    )  # wrong on the stamped
    answers = classes_of(model, odd.x)
    assert (answers != odd.y).float().mean() > 0.3
    ours = scrub(data=odd, mode="FTAL", labels="model", epochs=1)
    told = scrub(data=replace(odd, y=answers), mode="FTAL", labels="true", epochs=1)
    true = scrub(data=odd, mode="FTAL", labels="true", epochs=1)
    assert not changed(ours.models[0], told.models[0])
    assert changed(ours.models[0], true.models[0])


def test_modes_bring_their_published_settings():
    settings = {mode: (FineTuning(mode).labels, FineTuning(mode).epochs) for mode in ("FTAL", "FTLL", "RTAL", "RTLL")}
    assert settings == {"FTAL": ("true", 5), "FTLL": ("true", 5), "RTAL": ("model", 5), "RTLL": ("model", 10)}


def test_positive_control_a_patch_goes_at_a_large_learning_rate_and_stays_at_a_small_one():
    """What removes the backdoor is how far the weights move; so the attack that leaves it has not failed for a bug."""
    model = patched_model()
    hot = scrub(epochs=8, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9))
    gentle = scrub(epochs=3)
    assert patch_success(model) > 0.9
    assert patch_success(hot.last) < 0.3
    assert patch_success(gentle.last) > 0.7
    assert test_accuracy(hot.last) > test_accuracy(model) - 0.15
    assert test_accuracy(gentle.last) > test_accuracy(model) - 0.02


def test_a_configuration_names_mode_and_optimiser():
    parser = ArgumentParser()
    parser.add_argument("--removal", type=Removal)
    removal = {
        "class_path": "meadef_lightning.removal.finetuning.FineTuning",
        "init_args": {"mode": "RTLL", "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}},
    }
    made = parser.instantiate(parser.parse_object({"removal": removal})).removal
    optimizer = made.optimizer([nn.Parameter(torch.zeros(1))])
    assert (made.mode, type(optimizer), optimizer.defaults["lr"]) == ("RTLL", torch.optim.SGD, 0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "ALL"}, "mode='ALL' must be one of"),
        ({"labels": "soft"}, "labels='soft' must be 'true', 'model'"),
        ({"epochs": 0}, "epochs=0 and batch_size=64 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FineTuning(**wrong)
