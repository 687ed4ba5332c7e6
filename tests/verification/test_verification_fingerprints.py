"""Fingerprints of weights and samples: the same for the same, others for others."""

import hashlib
import json

import pytest
import torch
from torch import nn

from meadef_lightning.verification import model_fingerprint
from meadef_lightning.verification.fingerprints import tensors_fingerprint


def test_model_fingerprint_is_about_weights_only():
    def net(seed, dtype=torch.float32):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)

    class Compiled(nn.Module):
        """Names its tensors as torch.compile does."""

        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    first = model_fingerprint(net(0))
    assert first == model_fingerprint(net(0).eval()) == model_fingerprint(Compiled(net(0)))
    assert first != model_fingerprint(net(1))
    assert first != model_fingerprint(net(0, torch.bfloat16))
    changed = net(0)
    changed[1].running_mean[0] = 1e-7
    assert first != model_fingerprint(changed)
    swapped = nn.Sequential(net(0)[1], net(0)[0])
    assert first != model_fingerprint(swapped)


def test_tensors_fingerprint_is_what_its_documentation_says():
    """By hand: for every tensor its place, type and shape as JSON, then its bytes."""
    x, y = torch.tensor([[1.0, -2.0]]), torch.tensor([3])
    expected = hashlib.sha256()
    for place, tensor, kind in ((0, x, "torch.float32"), (1, y, "torch.int64")):
        expected.update(json.dumps([str(place), kind, list(tensor.shape)], separators=(",", ":")).encode())
        expected.update(tensor.numpy().tobytes())
    assert tensors_fingerprint(x, y) == expected.hexdigest()


@pytest.mark.parametrize(
    "changed", [torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, -2.0]), torch.tensor([[1.0, -2.0]]).double()]
)
def test_tensors_fingerprint_tells_values_shapes_and_types_apart(changed):
    assert tensors_fingerprint(changed) != tensors_fingerprint(torch.tensor([[1.0, -2.0]]))
