"""The student: the LightningModule every extraction attack trains on pairs of queries and answers."""

import math

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.victims.classifier import Classifier, NetworkFactory


def distillation_loss(logits: Tensor, answers: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Loss of a student against a victim's answers, whatever their kind.

    Soft answers :math:`p` (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, §2):

    .. math:: T^2 \, \mathrm{KL}\big(p_T \,\|\, \mathrm{softmax}(z / T)\big), \qquad p_T \propto p^{1/T}

    The victim's logits are not needed: since :math:`p \propto \exp(v)`, raising :math:`p` to :math:`1/T` and renormalising is
    exactly :math:`\mathrm{softmax}(v / T)`. Zeros of top-k and rounded answers count as the smallest normal float32, and rows
    that do not sum to one are renormalised. Hard answers get the cross-entropy, without a temperature.

    Args:
        logits: ``(B, K)`` of the student.
        answers: ``(B, K)`` floating point probabilities, or ``(B,)`` int64 classes.
        temperature: Positive temperature of soft answers.

    Returns:
        Scalar float32, averaged over the batch.

    Raises:
        ValueError: If the answers fit neither kind, or have another number of classes than the student.
    """
    if answers.dtype == torch.int64 and answers.shape == logits.shape[:1]:
        return F.cross_entropy(logits.float(), answers)
    if not answers.is_floating_point() or answers.shape != logits.shape:
        raise ValueError(
            f"Answers must be floating point of the shape of the student's logits, {tuple(logits.shape)}, or int64 of shape "
            f"({len(logits)},), got {answers.dtype} of shape {tuple(answers.shape)}. Does num_classes match the victim?"
        )
    floor = torch.finfo(torch.float32).tiny
    target = (answers.float().clamp_min(floor).log() / temperature).log_softmax(dim=-1)
    student = (logits.float() / temperature).log_softmax(dim=-1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def answer_classes(answers: Tensor) -> Tensor:
    """The class a victim's answers name, ``(B,)`` int64, from ``(B, K)`` probabilities or ``(B,)`` classes."""
    return answers.argmax(dim=-1) if answers.is_floating_point() else answers


class Student(Classifier):
    """A model stolen by imitation. Batches are ``(x, answer)``; the loss follows from the answers (`distillation_loss`).

    Logged: ``train_loss``; ``val_loss`` and ``val_fidelity``, the share of held-out queries on which student and victim agree,
    which a thief can know; ``val_accuracy`` where validation batches are ``(x, answer, y)`` with the true class, which a thief
    cannot know and we report; and ``test_accuracy`` on ``(x, y)``.

    Args:
        network: The student's architecture: a factory that is called with the numbers of classes and input channels, or
            a module that is ready.
        num_classes: Number of classes, for a factory. By default the data module's ``num_classes``.
        in_channels: Number of input channels, for a factory. By default the first entry of the data module's ``image_shape``.
        temperature: Temperature on both sides of the loss for soft answers; hard ones ignore it.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser. By default the learning rate makes one cycle
            over the run (`meadef_lightning.victims.classifier.one_cycle_factor`), its peak being the optimiser's; for a constant
            one give ``torch.optim.lr_scheduler.ConstantLR`` with ``factor: 1``.

    Raises:
        ValueError: If ``temperature`` is not positive and finite.
    """

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        num_classes: int | None = None,
        in_channels: int | None = None,
        temperature: float = 1.0,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, num_classes, in_channels, optimizer, lr_scheduler)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature!r}.")
        self.temperature = temperature

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, answers = batch
        loss = distillation_loss(self(x), answers, self.temperature)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(x))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, ...]) -> None:
        x, answers, *truth = batch
        logits = self(x)
        predicted = logits.argmax(dim=-1)
        values = {
            "val_loss": distillation_loss(logits, answers, self.temperature),
            "val_fidelity": (predicted == answer_classes(answers)).float().mean(),
        }
        if truth:
            values["val_accuracy"] = (predicted == truth[0]).float().mean()
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(x))
