"""torch.compile in all the ways Lightning knows, against uncompiled twins (the eager backend computes the same numbers)."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._functorch import config
from user_modules import UserModule, assert_clean, assert_equals_twin, callback, fit, make

from meadef_lightning.watermark import MGDA, LastLayerMGDA

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module: UserModule) -> nn.Module:
    return torch.compile(module, backend="eager")


def compiled_forward(module: UserModule) -> UserModule:
    module.compile(backend="eager")
    return module


class CompiledBody(UserModule):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__(dropout)
        self.body.compile(backend="eager")


class NoBatchIndex(UserModule):
    def training_step(self, batch):
        return self.loss(batch)


def test_the_whole_module():
    module = assert_equals_twin(UserModule, {"start": 0.5}, range(6, 12), around=compiled)
    assert module.training_step is not None
    assert_clean(module)


def test_the_whole_module_without_batch_index():
    """Lightning must still find the user's signature behind the compiled step."""
    module = make(NoBatchIndex)
    fit(compiled(module), [callback()], max_epochs=1)
    assert torch.isfinite(module.head.weight).all()


def test_the_forward_of_the_module():
    assert_equals_twin(UserModule, around=compiled_forward)


def test_a_submodule():
    assert_equals_twin(CompiledBody)


def test_after_fit_a_compiled_module_has_its_compiled_step_again():
    module = make(UserModule)
    optimized = compiled(module)
    fit(optimized, [callback()], max_epochs=1)
    step = module.training_step
    assert hasattr(step, "_torchdynamo_orig_callable")
    fit(optimized, [callback()], max_epochs=1)
    assert hasattr(module.training_step, "_torchdynamo_orig_callable")


@pytest.mark.parametrize("how", [compiled, compiled_forward, lambda module: module])
@pytest.mark.parametrize("balancing", [MGDA(), LastLayerMGDA()], ids=["MGDA", "LastLayerMGDA"])
def test_gradient_based_balancing_is_refused_before_the_training_and_not_in_its_middle(how, balancing):
    kind = CompiledBody if how not in (compiled, compiled_forward) else UserModule
    with (
        config.patch("donated_buffer", True),
        pytest.raises(MisconfigurationException, match=r"Set torch\._functorch\.config\.donated_buffer = False"),
    ):
        fit(how(make(kind)), [callback(balancing=balancing)])


def test_gradient_based_balancing_works_with_the_switch_that_the_error_names():
    """AOT autograd gives buffers away in a backward pass that comes before the watermark's turn."""
    module, reference = make(UserModule), make(UserModule)
    with config.patch("donated_buffer", False):
        fit(torch.compile(module, backend="aot_eager"), [callback(balancing=MGDA(), start=0.5)])
    fit(reference, [callback(balancing=MGDA(), start=0.5)])
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=0, atol=1e-4, msg=name)


def test_fixed_weights_need_no_switch():
    with config.patch("donated_buffer", True):
        fit(torch.compile(make(UserModule), backend="aot_eager"), [callback(start=0.5)])
