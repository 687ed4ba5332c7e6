r"""DFME: data-free model extraction by the l1 distance between logits.

**Source.** Truong, Maini, Walls & Papernot, "Data-Free Model Extraction" (CVPR 2021), §3.

**Algorithm.** In each iteration

1. The generator makes images :math:`x = G(z)` from normal :math:`z`, and takes a step that *raises* the disagreement
   :math:`\lVert v(x) - s(x) \rVert_1` of victim and student, its gradient being estimated by forward differences (`datafree`).
   There are ``generator_steps`` of this.
2. ``student_steps`` times, the generator makes fresh images and the student takes a step that lowers the disagreement on them.

The victim's logits are recovered from its probabilities as :math:`\log p - \mathrm{mean}(\log p)`: they are its logits up to a
constant in each row, which the student need not learn.

**Budget.** ``B · (g · (m + 1) + s)`` queries an iteration with ``batch_size`` B, ``generator_steps`` g, ``directions`` m and
``student_steps`` s: ``7 B`` by default. Training stops by itself where the budget ends, so give it many epochs and a ``budget``;
the paper's is 20 million for CIFAR-10 and 2 million for SVHN.

**Defaults.** The paper's: batches of 256, one direction, ε = 1e-3, one generator step to five of the student; SGD with learning
rate 0.1, momentum 0.9 and weight decay 5e-4 for the student, Adam with 1e-4 for the generator, both multiplied by 0.3 after 10, 30
and 50 % of the iterations. The distance is averaged over classes where the formula adds them up, so that the learning rate does
not depend on how many there are.

**Answers.** Soft ones. Top-k and rounded answers are taken with a warning: what they leave out counts as the row's missing mass
in equal parts, and at least as ``floor``, but never as more than the smallest probability that is given. Classes alone are
refused: nothing changes in them along a forward difference, so that the generator would learn from the student only.

**Pitfalls.** The moved images of a gradient estimate are queries, too. A student that is in training mode during the estimate
normalises each image with all the moved ones. Half precision and TF32 round the move away. Schedulers are to be stepped after
the optimisers, once an iteration and not once an epoch of unknown length.
"""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from typing_extensions import override

from meadef_lightning.extraction.datafree_student import DataFreeStudent
from meadef_lightning.victims.classifier import NetworkFactory


def recovered_logits(answers: Tensor, floor: float = 1e-7) -> Tensor:
    """A victim's logits, centred in each row, from its probabilities.

    Args:
        answers: ``(B, K)`` probabilities; rows need not sum to one.
        floor: What a probability of 0 counts as at least, if all that the row gives is larger.

    Returns:
        ``(B, K)``; a row without any positive probability becomes zero.
    """
    given = answers > 0
    missing = (1 - answers.sum(dim=1, keepdim=True)) / (~given).sum(dim=1, keepdim=True).clamp_min(1)
    smallest = answers.masked_fill(~given, torch.inf).amin(dim=1, keepdim=True)
    logs = torch.where(given, answers, missing.clamp_min(floor).minimum(smallest)).log()
    return logs - logs.mean(dim=1, keepdim=True)


class DFMEStudent(DataFreeStudent):
    """A student that steals without data, together with its generator. Run it with a `DataFreeDataModule`.

    Args:
        network: The student's architecture; see `Student`.
        num_classes: Number of classes, for a factory; see `Student`.
        in_channels: Number of input channels, for a factory; see `Student`.
        latent: Length of the generator's latent vectors.
        width: Width of the generator.
        directions: Directions of a gradient estimate, ``m``.
        epsilon: Length of a forward difference.
        generator_steps: Steps of the generator in an iteration, ``g``.
        student_steps: Steps of the student in an iteration, ``s``.
        lr: Initial learning rate of the student.
        generator_lr: Initial learning rate of the generator.
        milestones: Parts of the run after which both learning rates are multiplied.
        gamma: What they are multiplied by.
        floor: What a missing probability counts as at least; see `recovered_logits`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        num_classes: int | None = None,
        in_channels: int | None = None,
        latent: int = 256,
        width: int = 64,
        directions: int = 1,
        epsilon: float = 1e-3,
        generator_steps: int = 1,
        student_steps: int = 5,
        lr: float = 0.1,
        generator_lr: float = 1e-4,
        milestones: tuple[float, ...] = (0.1, 0.3, 0.5),
        gamma: float = 0.3,
        floor: float = 1e-7,
    ) -> None:
        super().__init__(
            network, num_classes, in_channels, latent, width, directions, epsilon, generator_steps, student_steps, lr,
            generator_lr,
        )  # fmt: skip
        if not all(0 < part < 1 for part in milestones):
            raise ValueError(f"milestones are parts of the run, each in (0, 1), got {milestones}.")
        for name, number in {"gamma": gamma, "floor": floor}.items():
            if not 0 < number <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {number!r}.")
        self.milestones, self.gamma, self.floor = tuple(milestones), gamma, floor

    @override
    def disagreement(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Mean absolute difference of the student's logits to the victim's, ``(B,)``."""
        return (logits - recovered_logits(answers, self.floor)).abs().mean(dim=1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD for the student, Adam for the generator, steps down for both."""
        student = torch.optim.SGD(self._student_parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        generator = torch.optim.Adam(self._generator.parameters(), lr=self.generator_lr)
        total = self.planned_iterations()
        milestones = [max(1, round(part * total)) for part in self.milestones]
        return [student, generator], [MultiStepLR(o, milestones, self.gamma) for o in (student, generator)]
