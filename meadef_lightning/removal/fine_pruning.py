"""Fine-pruning: remove the channels that clean images leave dormant, then tune what is left.

**Source.** Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks" (RAID 2018): the pruning
defence and its combination with fine-tuning.

**Algorithm.** 1. Rank the channels of the last convolution by their mean activation on the thief's clean images. 2. Remove the least active ones,
up to a share of them. 3. Fine-tune all weights on the clean images with their labels, the removed channels staying removed. Each share on the
path is one whole run of 2 and 3 from the untouched model, and the path ends at the first one that costs too much.

An activation is what a channel hands on: the convolution's output after normalisation and activation modules that directly follow it,
averaged over images and positions. A channel is removed by setting to 0 its kernel and its bias, and its scale, shift and running mean in
the normalisations in between, so that it is exactly 0 in training and in evaluation. After every step they are set to 0 again, whatever
the optimiser's momentum or weight decay did.

**Cost.** A forward pass over the thief's images, then for every share ``epochs`` passes of training.

**Defaults.** The last convolution that runs, as in the paper. Shares of 20 to 95 %, 10 epochs of SGD at 0.01 with momentum 0.9, batches of 64. The
paper goes on pruning until accuracy on held-out images falls and tunes once; here every cut is tuned, and the thief's accuracy budget
judges the tuned model, which is what he would use. ``epochs: 0`` is the paper's pruning defence without tuning.

**Pitfalls.** Ranking raw convolution outputs in front of batch normalisation ranks something else than activity. A kernel at 0 in front of batch
normalisation is no removed channel: it still hands on its shift. Ranking on test images, or images with triggers, uses what a thief does not
have. An activation that is a function rather than a module cannot be seen: the outputs in front of it are ranked with negative values
as 0, as after a ReLU. In a residual block, a removed channel still carries the block's input. Channels that serve both the
watermark and the task are active on clean images, and are kept: a watermark made of the task's own features is meant to survive this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, device_of, growing, train_path
from meadef_lightning.removal.finetuning import Tuner
from meadef_lightning.watermark.tilt import evaluating

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (_NormBase, nn.GroupNorm)
# all map 0 to 0, so that a removed channel is 0 behind them as well
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh)  # fmt: skip


@dataclass
class _Trail:
    """A convolution's output on its way: the tensor it has become, and the modules with values of each channel it has passed."""

    output: Tensor
    modules: list[str]
    activated: bool = False


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one convolution.

    Args:
        modules: Names of the convolution and of the normalisations that directly follow it.
        activity: Mean activation of each channel on clean images, shape ``(C,)``.
    """

    modules: tuple[str, ...]
    activity: Tensor = field(repr=False)

    def dormant(self, share: float) -> Tensor:
        """Returns the indices of the least active share, int64; at least one channel is left."""
        count = min(round(share * len(self.activity)), len(self.activity) - 1)
        return self.activity.argsort(stable=True)[:count]


def _trails(model: nn.Module, x: Tensor, names: Mapping[nn.Module, str]) -> dict[str, _Trail]:
    """Runs a model and follows the outputs of the named convolutions; the one that ran last comes last."""
    trails: dict[str, _Trail] = {}
    watched: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, _NORMALISATIONS + _ACTIVATIONS)
    }

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module in names:
            trails.pop(names[module], None)
            trails[names[module]] = _Trail(output, [names[module]])
            return
        for trail in trails.values():
            if not trail.activated and inputs and inputs[0] is trail.output:
                trail.output = output
                trail.activated = isinstance(module, _ACTIVATIONS)
                if not trail.activated:
                    trail.modules.append(watched[module])

    handles = [module.register_forward_hook(after) for module in (*names, *watched)]
    try:
        with evaluating(model):
            model(x.to(device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return trails


def channel_activity(
    model: nn.Module, x: Tensor, layers: Sequence[str] = (), batch_size: int = 256
) -> tuple[Channels, ...]:
    """Measures how active the channels of convolutions are on clean images.

    Args:
        model: Maps ``(B, C, H, W)`` to anything; its flags are left as they are.
        x: Clean images, ``(N, C, H, W)``.
        layers: Names of convolutions in the model; by default the one that runs last.
        batch_size: Images at a time.

    Returns:
        One entry for each layer, on the CPU.

    Raises:
        ValueError: If a name is that of no convolution, or none runs.
    """
    found: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)
    }
    ran = list(_trails(model, x[:1], {module: name for name, module in found.items()}))
    if not ran:
        raise ValueError(f"{type(model).__name__} ran no convolution, so it has no channels to remove.")
    unknown = sorted(set(layers) - set(ran))
    if unknown:
        raise ValueError(f"layers={list(layers)}: {unknown} are no convolutions that run. Those are {ran}.")
    chosen = {found[name]: name for name in (layers or ran[-1:])}
    sums: dict[str, Tensor] = {}
    modules: dict[str, tuple[str, ...]] = {}
    for part in torch.split(x, batch_size):
        for name, trail in _trails(model, part, chosen).items():
            output = trail.output if trail.activated else trail.output.relu()
            total = output.float().flatten(2).mean(dim=2).sum(dim=0).cpu()
            sums[name] = sums[name] + total if name in sums else total
            modules[name] = tuple(trail.modules)
    return tuple(Channels(modules[name], sums[name] / len(x)) for name in chosen.values())


@torch.no_grad()
def remove_channels(model: nn.Module, modules: Sequence[str], channels: Tensor) -> None:
    """Sets all that makes some channels other than 0 to 0, in place.

    Args:
        model: Has the modules.
        modules: Names of a convolution and of the normalisations that follow it.
        channels: Indices, int64.
    """
    for name in modules:
        module = model.get_submodule(name)
        for values in (module.weight, module.bias, getattr(module, "running_mean", None)):
            if isinstance(values, Tensor):
                values[channels.to(values.device)] = 0


class _KeepRemoved(Callback):
    """Undoes after every step what it did to removed channels."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Sets the removed channels to 0 again."""
        self.remove()


class FinePruning(Removal):
    """Removes more and more dormant channels, and tunes the model after each cut.

    Args:
        shares: Shares of each layer's channels that are removed, in ``(0, 1)``, growing.
        layers: Names of the convolutions that lose channels; by default the one that runs last.
        epochs: Passes of tuning after each cut; 0 for none.
        batch_size: Images in a step.
        optimizer: Makes the optimiser from the parameters.

    Raises:
        ValueError: If a number is out of range, or the shares do not grow.
    """

    unit = "pruned share of channels"

    def __init__(
        self,
        shares: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95),
        layers: Sequence[str] = (),
        epochs: int = 10,
        batch_size: int = 64,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    ) -> None:
        if epochs < 0 or batch_size < 1:
            raise ValueError(f"epochs={epochs} must be 0 or more, and batch_size={batch_size} 1 or more.")
        self.shares = growing("shares", shares, below=1)
        self.layers, self.epochs, self.batch_size, self.optimizer = tuple(layers), epochs, batch_size, optimizer

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        """Shows, for every share, a copy without these channels and tuned."""
        layers = channel_activity(model, data.x, self.layers)
        for share in self.shares:
            if not observe(share, self._without(model, data, layers, share, seed)):
                return

    def _without(
        self, model: nn.Module, data: ThiefData, layers: Sequence[Channels], share: float, seed: int
    ) -> nn.Module:
        pruned = copy.deepcopy(model).requires_grad_(True).train()

        def remove() -> None:
            for layer in layers:
                remove_channels(pruned, layer.modules, layer.dormant(share))

        remove()
        if self.epochs:
            train_path(
                Tuner(pruned, self.optimizer),
                pruned,
                (data.x, data.y),
                lambda *_: True,  # only the tuned model is a point of the path
                epochs=self.epochs,
                batch_size=self.batch_size,
                seed=seed,
                callbacks=[_KeepRemoved(remove)],
            )
        return pruned.eval()
