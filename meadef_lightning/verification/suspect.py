"""A suspect as something that a Trainer can ask: whatever it answers, scores or labels, becomes a class of the task or no answer at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from meadef_lightning.verification.datamodule import Batch
from meadef_lightning.verification.labels import LabelMap
from meadef_lightning.verification.metrics import as_labels

OutputKey = int | str | Callable[[Any], Tensor]

INVALID = -1
"""Stands for an answer that is none."""


@runtime_checkable
class Queryable(Protocol):
    """A black box, such as :class:`~meadef_lightning.oracle.Oracle`."""

    def query(self, x: Tensor) -> Tensor:
        """Answers ``(B, C, *spatial)`` samples with ``(B, K)`` scores or ``(B,)`` labels."""


def answered_labels(answers: Tensor, samples: int, num_classes: int) -> Tensor:
    """Turns a suspect's answers into class labels, without waiting for the device.

    Args:
        answers: Scores ``(B, K)``, floating point, or labels ``(B,)``, integers.
        samples: Number of samples asked, ``B``.
        num_classes: Classes of the task, ``K``.

    Returns:
        Labels, int64, ``(B,)``; ``INVALID`` where an answer holds NaN, no finite score, or a label that is no class.

    Raises:
        ValueError: If the answers have the wrong form or number of classes.
    """
    if not isinstance(answers, Tensor) or answers.ndim not in (1, 2) or len(answers) != samples:
        raise ValueError(
            f"The suspect answered {samples} samples with {described(answers)}; it must give scores of shape (B, K) or labels of "
            "shape (B,). If they are a part of its output, name it with output_key."
        )
    if answers.ndim == 2 and answers.shape[1] != num_classes:
        raise ValueError(
            f"The suspect answers with {answers.shape[1]} classes, but the key and its data have {num_classes}. "
            "Map its classes to those of the task first."
        )
    labels = as_labels(answers)
    if answers.ndim == 2:
        valid = ~answers.isnan().any(dim=1) & answers.isfinite().any(dim=1)
    else:
        valid = (labels >= 0) & (labels < num_classes)
    return torch.where(valid, labels, INVALID)


def described(value: object) -> str:
    """Says what an answer is that does not fit: type, shape or keys, and never a value."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return (
        f"a mapping with keys {sorted(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    )


class SuspectModule(LightningModule):
    """Lets a Trainer ask any suspect: ``predict_step`` returns its answers, scores or labels.

    Args:
        suspect: A module that maps a batch of samples to scores ``(B, K)`` or labels ``(B,)``, or a black box with ``query(x)``.
        num_classes: Classes of the task; by default those of the Trainer's data module.
        output_key: Where the answers are if the suspect returns more than a tensor: index of a tuple, key of a mapping, name of an
            attribute, or a function of the output.

    Raises:
        TypeError: If the suspect is neither a module nor has ``query``.
    """

    def __init__(
        self, suspect: nn.Module | Queryable, num_classes: int | None = None, output_key: OutputKey | None = None
    ) -> None:
        super().__init__()
        if not isinstance(suspect, (nn.Module, Queryable)):
            raise TypeError(f"A suspect is a torch module or an object with query(x), got a {type(suspect).__name__}.")
        # A direct child that is a LightningModule would be attached to our Trainer and lose its own.
        self.network = nn.ModuleList([suspect] if isinstance(suspect, nn.Module) else [])
        self.black_box = None if isinstance(suspect, nn.Module) else suspect
        self.num_classes = num_classes
        self.output_key = output_key

    def forward(self, x: Tensor) -> Any:
        """Asks the suspect; returns what it returns."""
        return self.network[0](x) if self.black_box is None else self.black_box.query(x)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Asks a batch of :class:`VerificationDataModule`.

        Args:
            batch: Samples and their positions.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.

        Returns:
            Scores ``(B, K)`` as the suspect gave them, or the classes that it answered, int64, shape ``(B,)``, with ``INVALID`` (-1)
            where there is no valid answer. :class:`VerificationCallback` refuses such answers at the end.

        Raises:
            ValueError: If the answers have the wrong form or number of classes.
        """
        x = batch[0]
        classes = self.num_classes or self.trainer.datamodule.num_classes  # type: ignore[attr-defined]
        answers = self.select(self(x))
        labels = answered_labels(answers, len(x), classes)
        return (answers if answers.ndim == 2 else labels).to(x.device)

    def select(self, output: Any) -> Any:
        """Takes the answers out of the suspect's output; raises ``ValueError`` where ``output_key`` does not fit it."""
        key = self.output_key
        if key is None:
            return output
        try:
            if callable(key):
                return key(output)
            return getattr(output, key) if isinstance(key, str) and hasattr(output, key) else output[key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"output_key={key!r} does not fit the suspect's output, {described(output)}.") from error


def translation_of(module: LightningModule) -> LabelMap | None:
    """How a suspect's labels are translated, where it was wrapped so; see :mod:`~meadef_lightning.verification.relabelling`."""
    suspect: Any = module
    if isinstance(module, SuspectModule):
        suspect = module.network[0] if module.black_box is None else module.black_box
    translation = getattr(suspect, "translation", None)
    return translation if isinstance(translation, LabelMap) else None
