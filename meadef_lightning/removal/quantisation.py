"""Weight quantisation: every weight is rounded to one of few values, which may be coarser than what carries a watermark.

**Source.** Uniform symmetric quantisation as in Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (CVPR 2018), §2, with one scale for each output channel (Krishnamoorthi, arXiv 1806.08342); as an
attack on watermarks, Lukas et al., "SoK: How Robust is Image Classification Deep Neural Network Watermarking?" (S&P 2022).

**Algorithm.** ``int8``, ``int4`` and other widths ``b``: for the weights of each output channel of each convolution and linear layer, 1. scale
``s = max|w| / (2^(b−1) − 1)``; 2. ``q = clamp(round(w / s))`` within ``±(2^(b−1) − 1)``; 3. the weight becomes ``s · q``, at most ``s / 2`` from
where it was. ``fp16``: all parameters and buffers are rounded to half precision and back, as ``model.half()`` stores them.

**Why simulated.** Stored back as floats, a rounded model has its old architecture: it runs on any device, is measured, saved, attacked and verified
like any other. Its weights are exactly those that an integer file would hold. Integer kernels exist for some layers on some
devices only, need calibrated activations, and change speed, not which weights there are. Activations are not rounded here.

**Cost.** One pass over the weights a point, no training and no data.

**Defaults.** ``fp16``, ``int8``, ``int4``, one scale for each output channel. The strength counts the bits by which a weight of 32 got shorter.

**Pitfalls.** One scale for a whole layer (``per_channel: false``) lets one large weight cost all others their precision, so that int4 often destroys
accuracy before anything else. In half precision values beyond 65,504 become infinite; a running variance that large makes a
channel constant. Rounding to integers of asymmetric range moves zero, and sparse models are no longer sparse.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal
from meadef_lightning.removal.pruning import weighted_layers


@torch.no_grad()
def quantise_weights(model: nn.Module, bits: int = 8, per_channel: bool = True) -> nn.Module:
    """Returns a copy whose weights are integers of some width times a scale.

    Args:
        model: Has convolutions or linear layers; not changed.
        bits: Width of the integers, sign included, 2 to 8.
        per_channel: Whether each output channel has a scale of its own, or each layer one.

    Returns:
        The copy, its weights in the dtype that they had; biases, normalisation and buffers stay.

    Raises:
        ValueError: If ``bits`` is out of range, or the model has no such layers.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be 2 to 8; wider formats hardly round anything.")
    quantised = copy.deepcopy(model)
    largest = 2 ** (bits - 1) - 1
    for layer in weighted_layers(quantised):
        # one scale for the layer is one channel with all its weights
        weight = layer.weight.float() if per_channel else layer.weight.float().reshape(1, -1)
        axis = int(
            per_channel and isinstance(layer, _ConvTransposeNd)
        )  # (in, out, ...) there, (out, in, ...) otherwise
        others = [dimension for dimension in range(weight.ndim) if dimension != axis]
        # a channel of zeros would have scale 0
        scale = (weight.abs().amax(dim=others) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -largest, largest)
        layer.weight.copy_(rounded.view_as(layer.weight))
    return quantised


@torch.no_grad()
def halve_precision(model: nn.Module) -> nn.Module:
    """Returns a copy whose floating-point parameters and buffers went to half precision and back to their own dtype."""
    halved = copy.deepcopy(model)
    for values in chain(halved.parameters(), halved.buffers()):
        if values.is_floating_point():
            values.copy_(values.half())
    return halved


def bits_of(form: str) -> int:
    """Returns the bits of a weight in a form, ``"fp16"`` or ``"int2"`` to ``"int8"``.

    Raises:
        ValueError: If the form is another.
    """
    if form == "fp16":
        return 16
    if not re.fullmatch("int[2-8]", form):
        raise ValueError(f'forms: "{form}" is not known. There are "fp16" and "int2" to "int8".')
    return int(form[3:])


class Quantisation(Removal):
    """Stores the untouched model's weights in coarser and coarser forms.

    Args:
        forms: ``"fp16"`` and ``"int2"`` to ``"int8"``, the finest first.
        per_channel: Whether each output channel has a scale of its own, for integers.

    Raises:
        ValueError: If a form is not known, or one is not coarser than the one before.
    """

    unit = "bits removed from each weight"

    def __init__(self, forms: Sequence[str] = ("fp16", "int8", "int4"), per_channel: bool = True) -> None:
        bits = [bits_of(form) for form in forms]
        if not bits or any(after >= before for before, after in pairwise(bits)):
            raise ValueError(f"forms={list(forms)} must be one or more, each with fewer bits than the one before.")
        self.forms, self.per_channel = tuple(forms), per_channel

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        """Shows a rounded copy for every form; nothing is random, and no data are used."""
        for form in self.forms:
            bits = bits_of(form)
            rounded = halve_precision(model) if form == "fp16" else quantise_weights(model, bits, self.per_channel)
            if not observe(32 - bits, rounded.eval()):
                return
