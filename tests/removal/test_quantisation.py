"""Weight quantisation against torch's integer tensors, rounding by hand, and its error bound."""

import copy
import struct
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.quantisation import Quantisation, bits_of, halve_precision, quantise_weights


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 2), nn.Linear(6, 5)).eval()


LAYERS = ((0, 0), (2, 1), (3, 0))
"""Index of each layer with weights, and the axis of its output channels."""


def integers(weight, scale, axis):
    """Torch's own signed 8-bit tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(weight, scale, torch.zeros(len(scale)), axis, torch.qint8)


@pytest.mark.skipif(not hasattr(torch, "quantize_per_channel"), reason="torch without integer tensors")
def test_int8_is_what_torch_stores():
    model = network()
    rounded = quantise_weights(model, 8)
    for index, axis in LAYERS:
        weight = model[index].weight.detach()
        scale = weight.transpose(0, axis).flatten(1).abs().amax(1) / 127
        stored = integers(weight, scale, axis)
        torch.testing.assert_close(rounded[index].weight.detach(), stored.dequantize(), rtol=0, atol=0)
        assert int(stored.int_repr().abs().max()) == 127
        assert not torch.equal(rounded[index].weight, weight)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_by_hand(bits, per_channel):
    model = network()
    rounded = quantise_weights(model, bits, per_channel)
    top = 2 ** (bits - 1) - 1
    for index, axis in LAYERS:
        before, after = (m[index].weight.detach().double().transpose(0, axis) for m in (model, rounded))
        for old, new in zip(before, after, strict=True) if per_channel else [(before, after)]:
            scale = float(old.abs().max()) / top
            for w, q in zip(old.flatten().tolist(), new.flatten().tolist(), strict=True):
                nearest = min(range(-top, top + 1), key=lambda level: abs(w - level * scale))
                assert q == pytest.approx(nearest * scale, abs=1e-6)
    assert torch.equal(rounded[1].weight, model[1].weight)
    assert torch.equal(rounded[3].bias, model[3].bias)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    bits=st.integers(2, 8),
    per_channel=st.booleans(),
)
def test_error_is_half_a_step_at_most_and_zero_stays(rows, bits, per_channel):
    model = nn.Linear(3, len(rows), bias=False)
    weight = torch.tensor(rows)
    model.weight.data.copy_(weight)
    error = (quantise_weights(model, bits, per_channel).weight.detach() - weight).abs()
    largest = weight.abs().amax(dim=1, keepdim=True) if per_channel else weight.abs().max()
    step = largest / (2 ** (bits - 1) - 1)
    assert bool((error <= step / 2 * (1 + 1e-4) + 1e-37).all())
    assert bool((error[weight == 0] == 0).all())


def test_per_channel_is_never_coarser_and_twice_is_once():
    model = network()
    for index, axis in LAYERS:
        weight = model[index].weight.detach()
        errors = [
            (quantise_weights(model, 4, per_channel)[index].weight.detach() - weight)
            .abs()
            .transpose(0, axis)
            .flatten(1)
            .amax(1)
            for per_channel in (True, False)
        ]
        assert float(errors[0].max()) <= float(errors[1].max()) * 1.5
        assert float(errors[0].mean()) < float(errors[1].mean())
    once = quantise_weights(model, 4)
    twice = quantise_weights(once, 4)
    torch.testing.assert_close(twice.state_dict(), once.state_dict())


def test_half_precision_by_hand():
    model = network()
    model[1].running_var.fill_(1 / 3)
    halved = halve_precision(model)
    for name, value in halved.state_dict().items():
        original = model.state_dict()[name]
        assert value.dtype == original.dtype
        if value.is_floating_point():
            expected = [struct.unpack("e", struct.pack("e", number))[0] for number in original.flatten().tolist()]
            assert value.flatten().tolist() == expected
    assert float(halved[1].running_var[0]) != float(model[1].running_var[0])
    assert int(halved[1].num_batches_tracked) == int(model[1].num_batches_tracked)


def test_the_path_and_a_backdoor_below_the_step():
    """A backdoor weight of a fiftieth of the largest is above half a step of int8, and below one of int4."""
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1 / 50]]))
    before, trigger, success = copy.deepcopy(model.state_dict()), torch.tensor([[0.0, 0.0, 1.0]]).double(), {}

    def observe(strength, rounded):
        assert rounded.weight.dtype == torch.float64
        answer = rounded(trigger)[0]
        success[strength] = bool(answer[1] > answer[0])
        return True

    x, y = torch.zeros(2, 1, 1, 3), torch.zeros(2, dtype=torch.int64)
    Quantisation().scrub(model, ThiefData(x, y, x, y, 2, torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), observe)
    assert success == {16: True, 24: True, 28: False}
    assert torch.equal(model.weight, before["weight"])


def test_the_path_ends_when_told():
    seen = []
    x, y = torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64)
    data = ThiefData(x, y, x, y, 5, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    Quantisation(["int8", "int5", "int2"]).scrub(
        network(), data, lambda strength, _: seen.append(strength) or strength < 27
    )
    assert seen == [24, 27]


def test_bad_input():
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            quantise_weights(network(), bits)
    for form in ("int1", "int16", "fp8", "8"):
        with pytest.raises(ValueError, match='"fp16" and "int2" to "int8"'):
            bits_of(form)
    for forms in ([], ["int4", "int8"], ["int8", "int8"]):
        with pytest.raises(ValueError, match="fewer bits than the one before"):
            Quantisation(forms)
