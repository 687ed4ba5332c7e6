"""ABS, artificial brain stimulation: force each neuron to fire, see which drive one class, and ask what input makes them fire.

**Source.** Liu et al., "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation" (CCS 2019), §3–4.

**Algorithm.** 1. *Stimulation.* Take a clean image of every class. Force one neuron (of a convolution: a whole channel) of a chosen layer
to each of ``levels`` values from 0 to ``reach`` times the layer's largest clean activation, the rest of the layer left as it is, and
record the logits. 2. *Candidates.* A neuron's lift of a class is how far the logit rises at the best level, in the worst image of
another class. For each class the neurons that lift it most beyond every other class are candidates; a class that no neuron prefers has
none. 3. *Inversion.* For each candidate find a mask of a bounded number of pixels, and a pattern, that make the neuron fire and the model
answer the class. 4. *Verdict.* The share of clean images of other classes that the trigger turns, measured on images that
took no part, is its REASR (attack success rate of reverse-engineered trojan triggers). A class with a REASR above 0.88 is called a target.

**Cost.** ``neurons · levels · classes`` forward passes of single images for the sweep, in batches, then ``steps`` forward and backward
passes over ``K · candidates · batch_size`` images: all triggers are searched at once, since their losses share no parameter.

**Defaults.** The last convolution and the penultimate linear layer, each with the BatchNorm behind it if there is one; the paper sweeps
all layers. One image a class and a REASR of 0.88 as published. Two candidates of each class instead of the best of the model, so that every
class gets its REASR. A mask has 6 % of the image's pixels: the first half of the steps punishes a larger norm, the second is confined
to the pixels with the largest mask. The paper's term that keeps the layer's other neurons where they are is left out.

**Pitfalls.** A trojan neuron may be silent on all clean images, so the range of values comes from its layer and not from itself. Inputs
of a ReLU that works in place are overwritten before they are read, unless copied. Without a bound on its size some trigger turns any
model, and REASR says nothing; with one too generous for small images clean models have high ones, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import Finding, ModelDetector, without_training
from meadef_lightning.detection.neural_cleanse import OtherClasses, Triggers, TriggerWeights


@torch.no_grad()
def default_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names the last convolution and the last linear layer but one, in the order in which they run.

    Where a BatchNorm runs next, it stands for the layer, since it gives the neurons a common scale.

    Raises:
        ValueError: If ``model`` runs neither on the images ``x``.
    """
    ran: list[tuple[str, nn.Module]] = []
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [leaf[1].register_forward_hook(lambda *_, leaf=leaf: ran.append(leaf)) for leaf in leaves]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    convolutions = [i for i, (_, module) in enumerate(ran) if isinstance(module, nn.Conv2d)]
    linear = [i for i, (_, module) in enumerate(ran) if isinstance(module, nn.Linear)]
    places = convolutions[-1:] + linear[-2:-1]
    if not places:
        raise ValueError(
            f"{type(model).__name__} runs no nn.Conv2d and fewer than two nn.Linear, so there is no hidden layer to stimulate by "
            f"default. Name some in layers; it has {[name for name, _ in leaves]}."
        )
    return tuple(ran[i + 1 if i + 1 < len(ran) and isinstance(ran[i + 1][1], _BatchNorm) else i][0] for i in places)


class Activations:
    """Reads the neurons of some layers whenever the model runs; use it as a context.

    ``outputs`` holds what each layer answered last, ``(B, neurons, …)``.

    Args:
        model: The model.
        layers: Names of modules with outputs ``(B, neurons, …)``.

    Raises:
        ValueError: If there is no module of that name.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        unknown = [layer for layer in layers if layer not in modules]
        if unknown or not layers:
            raise ValueError(
                f"layers={list(layers)} must be among the model's modules: {[name for name in modules if name]}."
            )
        self._modules = [modules[layer] for layer in layers]
        self._handles: list[Any] = []
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Activations:
        self.outputs = [torch.empty(0)] * len(self._modules)
        for place, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(partial(self._read, place)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _read(self, place: int, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.outputs[place] = output.clone()  # a ReLU in place may follow

    @property
    def neurons(self) -> Tensor:
        """All neurons side by side, ``(B, total)``: those of a convolution averaged over positions."""
        return torch.cat([output.flatten(2).mean(dim=2) if output.ndim > 2 else output for output in self.outputs], 1)


def _force(neurons: Tensor, values: Tensor, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    """Sets one neuron in each of ``len(neurons)`` copies of a batch, ``(copies · B, neurons, …)``."""
    forced = output.clone().view(len(neurons), -1, *output.shape[1:])
    copies = torch.arange(len(neurons), device=output.device)
    forced[copies, :, neurons] = values.to(output.dtype).view(-1, *[1] * (forced.ndim - 2))
    return forced.view_as(output)


@torch.no_grad()
def stimulate(model: nn.Module, layer: str, x: Tensor, levels: Tensor, count: int, batch_size: int = 256) -> Tensor:
    """Logits with each neuron of a layer forced to each level in turn.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``, in eval mode.
        layer: Name of a module with an output ``(B, count, …)``.
        x: Images ``(B, C, H, W)`` on the model's device.
        levels: Values, shape ``(V,)``, on the model's device.
        count: Neurons of the layer.
        batch_size: Images in a forward pass; more fit no CPU's cache.

    Returns:
        Shape ``(count, V, B, K)``.
    """
    neurons = torch.arange(count, device=x.device).repeat_interleave(len(levels))
    values, copies = levels.repeat(count), max(1, batch_size // len(x))
    logits: list[Tensor] = []
    for some, forced in zip(torch.split(neurons, copies), torch.split(values, copies), strict=True):
        handle = model.get_submodule(layer).register_forward_hook(partial(_force, some, forced))
        try:
            logits.append(model(x.repeat(len(some), 1, 1, 1)))
        finally:
            handle.remove()
    return torch.cat(logits).view(count, len(levels), len(x), -1)


def lifts(stimulated: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    """How far a neuron raises a class whatever the image: the rise at the best level, in the worst image of another class.

    Args:
        stimulated: Logits, ``(neurons, V, B, K)``.
        natural: Logits without stimulation, ``(B, K)``.
        y: Classes of the images, int64 ``(B,)``.

    Returns:
        Shape ``(neurons, K)``.
    """
    rise = stimulated.amax(dim=1) - natural
    own = F.one_hot(y, natural.shape[1]).bool()
    return rise.masked_fill(own, torch.inf).amin(dim=1)


def candidates(lift: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The neurons that prefer a class most: those with the largest lift beyond that of any other class.

    Args:
        lift: Shape ``(neurons, K)``, ``K >= 2``.
        count: How many for each class at most.

    Returns:
        Neurons and their classes, int64, each ``(M,)``, ``M <= K · count``, the largest gap of a class first.
    """
    first, second = lift.topk(2, dim=1).values.unbind(1)
    gap = lift - torch.where(lift == first[:, None], second[:, None], first[:, None])
    best = gap.topk(min(count, len(gap)), dim=0)
    labels, places = (best.values > 0).T.nonzero(as_tuple=True)
    return best.indices[places, labels], labels


def invert(
    model: nn.Module,
    layers: Sequence[str],
    neurons: Tensor,
    labels: Tensor,
    scale: Tensor,
    data: ThiefData,
    generator: torch.Generator,
    *,
    pixels: int,
    steps: int = 200,
    batch_size: int = 16,
    lr: float = 0.1,
) -> Triggers:
    """Finds for each candidate a trigger of at most ``pixels`` pixels that makes the neuron fire and the model answer the class.

    Minimises ``CE(f(x'), k) − activation(x') / scale + max(0, ‖m‖₁ / pixels − 1)``; the mask's support is fixed half-way.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``, in eval mode.
        layers: The layers, in the order in which ``neurons`` count through them.
        neurons: Candidates, int64 ``(M,)``.
        labels: Their classes, int64 ``(M,)``.
        scale: Each candidate's unit of activation, ``(M,)``.
        data: The thief's data, on the model's device.
        generator: Source of randomness, on the CPU.
        pixels: Size of the mask.
        steps: Steps of the optimisation.
        batch_size: Images of each candidate a step.
        lr: Adam's learning rate.
    """
    others = OtherClasses(data.y.cpu(), data.num_classes)
    free = TriggerWeights(len(labels), data.x.shape[1:], data.low, data.high, generator)
    optimizer = torch.optim.Adam(free.weights, lr=lr, betas=(0.5, 0.9))
    support = torch.ones_like(free.weights[0], requires_grad=False)
    for step in range(steps):
        if step == steps // 2:
            largest = free.weights[0].detach().flatten(1).topk(pixels, dim=1).indices
            support = torch.zeros_like(support).flatten(1).scatter_(1, largest, 1.0).view_as(support)
        rows = others.draw(labels.cpu(), batch_size, generator).to(data.x.device)
        with torch.enable_grad(), Activations(model, layers) as activations:
            triggers = free.triggers()
            triggers = Triggers(triggers.mask * support, triggers.pattern)
            logits = model(triggers.stamp(data.x[rows]).flatten(0, 1))
            task = F.cross_entropy(logits, labels.repeat_interleave(batch_size), reduction="sum")
            fired = activations.neurons.gather(1, neurons.repeat_interleave(batch_size)[:, None]).view(rows.shape)
            excess = (triggers.mask.sum(dim=(1, 2, 3)) / pixels - 1).relu()
            loss = (task - (fired / scale[:, None]).sum()) / batch_size + excess.sum()
            gradients = torch.autograd.grad(loss, free.weights)
        for parameter, gradient in zip(free.weights, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    with torch.no_grad():
        triggers = free.triggers()
    return Triggers(triggers.mask * support, triggers.pattern)


@torch.no_grad()
def reasr(model: nn.Module, triggers: Triggers, labels: Tensor, x: Tensor, y: Tensor, batch_size: int = 256) -> Tensor:
    """Share of images of other classes that each trigger turns into its class.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``, in eval mode.
        triggers: ``M`` of them.
        labels: Their classes, int64 ``(M,)``.
        x: Clean images, ``(N, C, H, W)``.
        y: Their classes, int64 ``(N,)``; all on the model's device.
        batch_size: Images in a forward pass, about.

    Returns:
        float32 ``(M,)``, 0 where there is no image of another class.
    """
    parts = torch.split(x, max(1, batch_size // len(labels)))
    answers = [model(triggers.stamp(part[None]).flatten(0, 1)).argmax(-1).view(len(labels), -1) for part in parts]
    other = y != labels[:, None]
    turned = (torch.cat(answers, dim=1) == labels[:, None]) & other
    return turned.sum(dim=1) / other.sum(dim=1).clamp(min=1)


class ABS(ModelDetector):
    """Stimulates neurons, reverses the triggers of those that drive a class, and reports how well they work.

    ``Finding.classes`` are the best REASR of each class, ``Finding.score`` is the largest of them; ``Finding.pictures`` shows
    each class's best trigger, and zeros for a class that no neuron prefers.

    Args:
        layers: Names of the layers to stimulate, modules with outputs ``(B, neurons, …)``; chosen by `default_layers` if not given.
        candidates: Neurons of each class whose trigger is sought.
        levels: Values that a neuron is forced to.
        reach: The largest of them, in units of the layer's largest clean activation.
        size: Share of an image's pixels that a trigger may cover, in ``(0, 1]``.
        steps: Steps of the inversion.
        batch_size: Images of each candidate a step.
        lr: Adam's learning rate.
        threshold: Classes with a larger REASR are flagged.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        candidates: int = 2,
        levels: int = 8,
        reach: float = 2.0,
        size: float = 0.06,
        steps: int = 200,
        batch_size: int = 16,
        lr: float = 0.1,
        threshold: float = 0.88,
    ) -> None:
        if min(candidates, levels, steps, batch_size) < 1 or min(reach, lr) <= 0 or not 0 < size <= 1:
            raise ValueError(
                f"{candidates=}, {levels=}, {steps=} and {batch_size=} must be at least 1, {reach=} and {lr=} above 0, and "
                f"{size=} in (0, 1]."
            )
        self.layers, self.candidates, self.levels, self.reach = layers, candidates, levels, reach
        self.size, self.steps, self.batch_size, self.lr, self.threshold = size, steps, batch_size, lr, threshold

    @override
    def inspect(self, model: nn.Module, data: ThiefData, seed: int = 0) -> Finding:
        frozen = without_training(model)
        device = next((p.device for p in model.parameters()), data.x.device)
        generator = torch.Generator().manual_seed(seed)
        moved: dict[str, Any] = {key: value.to(device) for key, value in vars(data).items() if torch.is_tensor(value)}
        data = replace(data, **moved)
        layers = tuple(self.layers or default_layers(frozen, data.x[:2]))
        neurons, labels, scale = self._candidates(frozen, layers, data, generator)
        best = torch.zeros(data.num_classes)
        pictures = torch.zeros(data.num_classes, *data.x.shape[1:])
        if len(labels):
            pixels = max(1, round(self.size * data.x[0, 0].numel()))
            sizes = {"pixels": pixels, "steps": self.steps, "batch_size": self.batch_size}
            triggers = invert(frozen, layers, neurons, labels, scale, data, generator, lr=self.lr, **sizes)
            rates = reasr(frozen, triggers, labels, data.validation_x, data.validation_y).cpu()
            of_class = torch.where(labels.cpu() == torch.arange(data.num_classes)[:, None], rates, -1.0)
            value, place = of_class.max(dim=1)
            found = value >= 0
            best[found] = value[found]
            pictures[found] = triggers.pictures.cpu()[place[found]]
        flagged = tuple((best > self.threshold).nonzero().flatten().tolist())
        return Finding(float(best.max()), self.threshold, bool(flagged), best, flagged, pictures)

    def _candidates(
        self, model: nn.Module, layers: Sequence[str], data: ThiefData, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 1 and 2: neurons, their classes, and the largest clean activation of each one's layer."""
        rows = torch.randperm(len(data.y), generator=generator)
        y = data.y.cpu()[rows]
        first = [int((y == k).nonzero()[0]) for k in sorted(set(y.tolist()))]  # an image of every class there is
        images = data.x[rows[first].to(data.x.device)]
        with torch.no_grad():
            natural = model(images)
            with Activations(model, layers) as activations:
                model(data.x[rows[:256].to(data.x.device)])
        clean = activations.outputs
        largest = [output.abs().max().clamp(min=1e-6) for output in clean]
        levels = torch.linspace(0, self.reach, self.levels + 1, device=images.device)[1:]
        own, counts = y[first].to(images.device), [output.shape[1] for output in clean]
        swept = zip(layers, largest, counts, strict=True)
        lift = torch.cat(
            [lifts(stimulate(model, name, images, levels * most, count), natural, own) for name, most, count in swept]
        )
        scale = torch.cat([most.expand(count) for most, count in zip(largest, counts, strict=True)])
        neurons, labels = candidates(lift, self.candidates)
        return neurons, labels, scale[neurons]
