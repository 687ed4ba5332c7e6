"""NAD: a copy that was tuned on clean images teaches the model where to look.

**Source.** Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks" (ICLR 2021), §3; attention
maps are those of Zagoruyko & Komodakis, "Paying More Attention to Attention" (ICLR 2017), eq. 1–2.

**Algorithm.** 1. The *teacher* is a copy that is fine-tuned on the thief's images for ``teacher_epochs``, and then frozen in eval mode.
2. The *student* starts from the untouched model and minimises cross-entropy plus ``Σ_l beta_l · ‖A_l(student) − A_l(teacher)‖²`` over
layers ``l``, where ``A`` is the attention map of a layer: ``Σ_c |F_c|^p`` at every position, scaled to L2 length 1 for each image
(`attention_map`). The student is observed after every epoch; the teacher is not, being a tool.

**Layers.** By default the last convolution of each height and width that occurs in the network (`stage_convolutions`). Any modules can be
named that answer feature maps ``(B, C, H, W)``, e.g. ``layers: [features.3, features.7]``.

**Cost.** ``teacher_epochs + epochs`` passes of training and ``epochs`` of evaluation over the thief's images.

**Defaults.** ``p`` 2, 10 epochs for the teacher and 20 for the student, learning rate 0.1 with momentum 0.9 and weight decay 1e-4 are the
paper's; so large a rate is what makes a model forget, and smaller ones leave a backdoor in the teacher and so in the student. The paper
augments the images, which is the task's own affair and so has no default here, but *give one*: on digits, a patch that was trained beside
squares of noise kept 96 to 99 % without, and 6 to 13 % with such squares (``augmentation``; two seeds). Its ``beta`` of 500 to 1000 multiplies a *mean* over positions, this one
their sum, which does not change with the resolution: 10 here is 640 there for maps of 8×8.

**Pitfalls.** Much of what goes, the learning rate erases without any attention: ``beta: 0``, or fine-tuning with the same optimiser, is
the control. Accuracy falls in the first epochs and comes back (:attr:`~meadef_lightning.removal.base.Removal.from_scratch`). Where an
activation works in place, a convolution's map is seen after it, and in both networks alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, device_of, train_path
from meadef_lightning.removal.finetuning import Tuner, check_training
from meadef_lightning.watermark.tilt import evaluating


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """SGD with a learning rate of 0.1, momentum 0.9 and weight decay 1e-4."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """Where a layer looks: ``Σ_c |F_c|^p`` at every position, scaled to length 1; a map of zeros stays one.

    Args:
        features: Feature maps, ``(B, C, H, W)``.
        p: Exponent, above 0; the larger, the more the strongest channel counts.

    Returns:
        ``(B, H · W)``, not negative, each row of L2 norm 1.
    """
    return F.normalize(features.abs().pow(p).sum(dim=1).flatten(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """Squared distance of two layers' attention maps, mean over images.

    Args:
        student: Feature maps, ``(B, C, H, W)``.
        teacher: Feature maps of the same batch, height and width; the number of channels may differ.
        p: See `attention_map`.

    Returns:
        A scalar from 0 to 2.
    """
    return (attention_map(student, p) - attention_map(teacher, p)).square().sum(dim=1).mean()


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Records what modules answer, inside the block.

    Args:
        model: Any module.
        names: Names of modules in it.

    Yields:
        The last output of each by name, filled by each forward in the order in which they run.

    Raises:
        ValueError: If there is no module of a name.
    """
    outputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            outputs.pop(name, None)  # so that the order is that of the last forward
            outputs[name] = output

        return keep

    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f"{type(model).__name__} has no modules {missing}. Choose from {[*modules][1:]}.")
    hooks = [modules[name].register_forward_hook(keeper(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def stage_convolutions(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Finds the last convolution that runs at each height and width.

    Args:
        model: Any module; runs once, in eval mode and without gradients, and is left as it was.
        x: A few samples, ``(B, C, H, W)``, on any device.

    Returns:
        Names of modules, in the order in which they run.

    Raises:
        ValueError: If no convolution runs.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with outputs_of(model, names) as outputs, evaluating(model):
        model(x.to(device_of(model, x.device)))
    last = {output.shape[-2:]: name for name, output in outputs.items()}
    if not last:
        raise ValueError(
            f"{type(model).__name__} runs no nn.Conv2d. Name modules that answer feature maps (B, C, H, W) in layers."
        )
    return tuple(name for name in outputs if name in last.values())


class _Student(Tuner):
    """Cross-entropy, and attention like the teacher's."""

    def __init__(self, model: nn.Module, teacher: nn.Module, betas: dict[str, float], method: NAD) -> None:
        super().__init__(model, method.optimizer, augmentation=method.augmentation)
        self.teacher, self.betas, self.p = teacher, betas, method.p

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        x = self.augment(x)  # once: both networks look at the same pictures
        with outputs_of(self.teacher, [*self.betas]) as taught, torch.no_grad():
            self.teacher(x)
        with outputs_of(self.model, [*self.betas]) as seen:
            loss = F.cross_entropy(self(x), y)
        for name, beta in self.betas.items():
            loss = loss + beta * attention_distance(seen[name], taught[name], self.p)
        return loss


class NAD(Removal):
    """Neural attention distillation; see the module's description.

    Args:
        epochs: Epochs of the student; observed after each.
        teacher_epochs: Epochs of the teacher.
        beta: Weight of the attention term, one number for all layers or one for each, 0 or more.
        p: Exponent of the attention maps, above 0.
        layers: Names of modules that answer feature maps. ``None``: the last convolution of each resolution.
        batch_size: Images of a step.
        optimizer: Makes the optimisers of teacher and student from their parameters.
        augmentation: Maps images to images of the same shape, anew in every step of both trainings. ``None``: they are seen as they are.

    Raises:
        ValueError: If a number is out of range, or (in :meth:`scrub`) the layers do not fit the model.
    """

    from_scratch = True  # accuracy falls at first, and comes back later

    def __init__(
        self,
        epochs: int = 20,
        teacher_epochs: int = 10,
        beta: float | Sequence[float] = 10.0,
        p: float = 2.0,
        layers: Sequence[str] | None = None,
        batch_size: int = 32,
        optimizer: OptimizerCallable = sgd,
        augmentation: nn.Module | None = None,
    ) -> None:
        check_training(min(epochs, teacher_epochs), batch_size)
        betas = [beta] if isinstance(beta, (int, float)) else list(beta)
        if not betas or min(betas) < 0 or p <= 0:
            raise ValueError(f"{beta=} must be one or more numbers of 0 or more, and {p=} above 0.")
        self.epochs, self.teacher_epochs, self.betas, self.p = epochs, teacher_epochs, betas, p
        self.layers, self.batch_size, self.optimizer = layers, batch_size, optimizer
        self.augmentation = augmentation

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        student = copy.deepcopy(model).requires_grad_(True).train()
        names = tuple(self.layers or stage_convolutions(student, data.x[:2]))
        betas = self.betas * len(names) if len(self.betas) == 1 else self.betas
        if len(betas) != len(names):
            raise ValueError(
                f"beta has {len(betas)} numbers, and there are {len(names)} layers: {names}. Give as many."
            )
        self._check(student, names, data.x[:2])
        teacher = copy.deepcopy(student)
        images = data.x, data.y
        train_path(
            Tuner(teacher, self.optimizer, augmentation=self.augmentation),
            teacher,
            images,
            lambda *_: True,
            epochs=self.teacher_epochs,
            batch_size=self.batch_size,
            seed=seed,
        )
        teacher.requires_grad_(False).eval()
        module = _Student(student, teacher, dict(zip(names, betas, strict=True)), self)
        train_path(module, student, images, observe, epochs=self.epochs, batch_size=self.batch_size, seed=seed + 1)

    @staticmethod
    def _check(model: nn.Module, names: Sequence[str], x: Tensor) -> None:
        """Raises a ``ValueError`` for modules that answer no feature maps."""
        with outputs_of(model, names) as outputs, evaluating(model):
            model(x.to(device_of(model, x.device)))
        for name in names:
            output = outputs.get(name)
            if not isinstance(output, Tensor) or output.ndim != 4:
                found = "did not run" if output is None else f"answered {getattr(output, 'shape', type(output))}"
                raise ValueError(
                    f"Layer {name!r} {found}. Name modules that answer feature maps (B, C, H, W) in layers."
                )
