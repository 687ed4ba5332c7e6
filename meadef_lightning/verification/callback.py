"""Verification as a Lightning prediction run: ``trainer.predict(SuspectModule(model), datamodule=VerificationDataModule(…))``."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from meadef_lightning.verification.camouflage import CamouflagedDataModule
from meadef_lightning.verification.datamodule import Batch, SourceData, VerificationDataModule
from meadef_lightning.verification.evidence import Evidence, check_size, model_fingerprint, tensors_fingerprint
from meadef_lightning.verification.labels import LabelMap
from meadef_lightning.verification.metrics import as_labels
from meadef_lightning.verification.verdict import Responses, Verdict, check_plan, judge, with_reference
from meadef_lightning.watermark.key import WatermarkKey

OutputKey = int | str | Callable[[Any], Tensor]

# Answers that are none. The maximum over processes keeps them apart: an answer beats "invalid", which beats "not asked".
INVALID, _MISSING = -1, -2


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
            f"The suspect answered {samples} samples with {_describe(answers)}; it must give scores of shape (B, K) or labels of "
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


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return (
        f"a mapping with keys {sorted(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    )


class SuspectModule(LightningModule):
    """Lets a Trainer ask any suspect: ``predict_step`` returns its answers as class labels.

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
            The answered classes, int64, shape ``(B,)``; ``INVALID`` (-1) where there is no valid answer, which
            :class:`VerificationCallback` refuses at the end.

        Raises:
            ValueError: If the answers have the wrong form or number of classes.
        """
        x = batch[0]
        classes = self.num_classes or self.trainer.datamodule.num_classes  # type: ignore[attr-defined]
        return answered_labels(self.select(self(x)), len(x), classes).to(x.device)

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
            raise ValueError(f"output_key={key!r} does not fit the suspect's output, {_describe(output)}.") from error


class VerificationCallback(Callback):
    """Collects the answers of a prediction run and ends in a verdict.

    The answers stay on the device until the end, and are then put together over all processes; every process gets the verdict, and
    rank zero writes the evidence.

    Args:
        key: The key; it must be the data module's.
        alpha: Level of the verdict, fixed beforehand.
        evidence_path: Where to write the evidence; ``None`` writes none. That it can be written is checked before anything is asked.
        null_statistics: Statistics of independent models under the same key; see
            :func:`~meadef_lightning.verification.verdict.judge`.
        reference: Answers of a reference model, or of several, to the same questions; see
            :meth:`~meadef_lightning.verification.decoys.DecoyTable.statistics`.

    Attributes:
        verdict: The verdict, after the run.
        responses: The answers, after the run.

    Raises:
        MisconfigurationException: At the start of prediction, if the data module is another one or has another key.
        ValueError: If ``alpha`` or a null statistic is out of range (here), the evidence would be too large (at the start), or answers are
            missing or invalid (at the end).
        OSError: If the evidence cannot be written.
    """

    verdict: Verdict
    responses: Responses

    def __init__(
        self,
        key: WatermarkKey,
        alpha: float = 1e-3,
        evidence_path: str | Path | None = None,
        null_statistics: Sequence[float] | None = None,
        reference: Responses | Sequence[Responses] | None = None,
    ) -> None:
        check_plan(alpha, null_statistics)
        self.reference = reference
        self.key, self.alpha, self.null_statistics = key, alpha, null_statistics
        self.evidence_path = None if evidence_path is None else Path(evidence_path)
        self._answers: list[Tensor] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the run, and reserves a place for each answer."""
        data = self._data(trainer)
        if data.key != self.key:
            raise MisconfigurationException(
                "VerificationCallback and VerificationDataModule have different keys; give both the same."
            )
        if self.evidence_path is not None:
            check_size(data.table, self.reference is not None)
            if trainer.is_global_zero:
                _check_writable(self.evidence_path)
        self._answers = [
            torch.full((len(loader.dataset),), _MISSING, device=pl_module.device)  # type: ignore[arg-type]
            for loader in data.predict_dataloader()
        ]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Puts the answers of a batch in their places."""
        if not isinstance(outputs, Tensor) or outputs.dtype != torch.int64 or outputs.shape != batch[1].shape:
            raise MisconfigurationException(
                f"predict_step must return the answered classes, int64 of shape (B,), got {_describe(outputs)}. "
                "Wrap the model: trainer.predict(SuspectModule(model), …)."
            )
        self._answers[dataloader_idx][batch[1]] = outputs

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the answers of all processes together, judges them and writes the evidence."""
        data = self._data(trainer)
        answers = [trainer.strategy.reduce(answer, reduce_op="max").cpu() for answer in self._answers]
        self._answers = []
        for name, answer in zip(data.loaders, answers, strict=True):
            if missing := int((answer == _MISSING).sum()):
                raise ValueError(
                    f"{missing} of {len(answer)} {name} samples were not asked. Verification needs all of them: run it without "
                    "limit_predict_batches and fast_dev_run."
                )
            if invalid := int((answer == INVALID).sum()):
                raise ValueError(
                    f"The suspect gave no valid answer (NaN, or a label that is no class) to {invalid} of {len(answer)} {name} "
                    "samples. Check its weights, and that it takes inputs normalised like this data."
                )
        self.responses = with_reference(data.responses(answers), self.reference)
        self.verdict = judge(self.responses, self.key, self.alpha, self.null_statistics)
        if self.evidence_path is not None and trainer.is_global_zero:
            suspect = pl_module.network if isinstance(pl_module, SuspectModule) else [pl_module]
            Evidence.collect(
                self.verdict,
                self.responses,
                self.key,
                model_sha256=model_fingerprint(suspect[0]) if len(suspect) else None,
                data_sha256={
                    "verification": tensors_fingerprint(*data.sources),
                    "test": tensors_fingerprint(*data.natural),
                },
                null_statistics=self.null_statistics,
                labels=_translation(pl_module),
            ).save(self.evidence_path)

    @staticmethod
    def _data(trainer: Trainer) -> VerificationDataModule:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, VerificationDataModule):
            raise MisconfigurationException(
                f"VerificationCallback needs the questions of a VerificationDataModule, got {type(data).__name__}. "
                "Call trainer.predict(SuspectModule(model), datamodule=VerificationDataModule(key, data))."
            )
        return data


def _translation(module: LightningModule) -> LabelMap | None:
    """How a suspect's labels are translated, where it was wrapped so; see :mod:`~meadef_lightning.verification.relabelling`."""
    suspect: Any = module
    if isinstance(module, SuspectModule):
        suspect = module.network[0] if module.black_box is None else module.black_box
    translation = getattr(suspect, "translation", None)
    return translation if isinstance(translation, LabelMap) else None


def _check_writable(path: Path) -> None:
    """Finds out that evidence cannot be written before queries are spent on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"Cannot write evidence to {path} ({error.strerror}). Nothing was asked; choose another path."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's start-up messages to itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def verify(
    suspect: nn.Module | Queryable,
    key: WatermarkKey,
    data: SourceData,
    *,
    samples: int = 512,
    decoys: int = 9999,
    decoy_samples: int = 32,
    seed: int = 0,
    batch_size: int = 512,
    alpha: float = 1e-3,
    null_statistics: Sequence[float] | None = None,
    reference: Responses | Sequence[Responses] | None = None,
    evidence_path: str | Path | None = None,
    output_key: OutputKey | None = None,
    progress_bar: bool = False,
    accelerator: str = "auto",
    devices: int | str | Sequence[int] = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    filler: float = 0.0,
) -> tuple[Verdict, Responses]:
    """Judges one suspect: the whole of verification in a call.

    Args:
        suspect: A module that maps samples to scores ``(B, K)`` or labels ``(B,)``, or a black box with ``query(x)``. A module is
            asked in eval mode, and finds itself afterwards where and as it was. A black box is asked in a secret order; see
            :class:`~meadef_lightning.verification.camouflage.CamouflagedDataModule`.
        key: The key.
        data: Data module of the task.
        samples: See :class:`~meadef_lightning.verification.datamodule.VerificationDataModule`, as the next four.
        decoys: Keys to compare with.
        decoy_samples: Composites of each cell.
        seed: The verifier's seed.
        batch_size: Samples a forward.
        alpha: Level of the verdict, fixed beforehand.
        null_statistics: Statistics of independent models under the same key.
        reference: What this function returned for a reference model, with the same key and options: a model trained without regard
            to the key, such as the owner's own without a watermark. It makes the test far more powerful where composites look
            like a third class to any model. Of several, given as a sequence, the mean is taken.
        evidence_path: Where to write the evidence.
        output_key: Where the answers are in the suspect's output; see :class:`SuspectModule`.
        progress_bar: Whether to show Lightning's progress bar.
        accelerator: The Trainer's, as the next three.
        devices: Where a module is asked; one device by default. With several processes, which must all call this, each asks its share
            of the samples, all get the same verdict, and rank zero writes the evidence.
        num_nodes: Number of machines.
        strategy: How processes are joined: ``ddp``, as nothing is trained.
        filler: Share of natural filler samples among what a black box is asked.

    Returns:
        The verdict, and the answers it rests on.

    Raises:
        ValueError: If an option, the data, or the suspect's answers do not fit.
        MisconfigurationException: If key and data disagree on the number of classes, or several processes were to ask a black box, whose
            questions have one secret order.
        OSError: If the evidence cannot be written.
    """
    asking = (samples, decoys, decoy_samples, seed, batch_size)
    questions = (
        VerificationDataModule(key, data, *asking)
        if isinstance(suspect, nn.Module)
        else CamouflagedDataModule(key, data, *asking, filler)
    )
    callback = VerificationCallback(key, alpha, evidence_path, null_statistics, reference)
    places = {weight.device for weight in suspect.parameters()} if isinstance(suspect, nn.Module) else set()
    with _quiet():
        trainer = Trainer(
            accelerator=accelerator,
            devices=devices if isinstance(devices, (int, str)) else list(devices),
            num_nodes=num_nodes,
            strategy=strategy,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress_bar,
            # what a suspect caches while it answers must stay usable in a training of its own
            inference_mode=False,
        )
        if trainer.world_size > 1 and not isinstance(suspect, nn.Module):
            raise MisconfigurationException(
                f"A black box is asked by one process, since its questions have one secret order; {devices=}, {num_nodes=} and {strategy=} "
                f"make {trainer.world_size}. Leave them out."
            )
        try:
            trainer.predict(
                SuspectModule(suspect, key.num_classes, output_key), datamodule=questions, return_predictions=False
            )
        finally:
            if isinstance(suspect, nn.Module) and len(places) == 1:
                suspect.to(places.pop())  # Lightning leaves it on the CPU
    return callback.verdict, callback.responses
