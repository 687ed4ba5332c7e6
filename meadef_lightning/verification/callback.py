"""Verification inside a Trainer: ``trainer.predict(SuspectModule(model), datamodule=VerificationDataModule(…))`` ends in a verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor

from meadef_lightning.verification.datamodule import VerificationDataModule
from meadef_lightning.verification.evidence import Evidence, check_size
from meadef_lightning.verification.fingerprints import model_fingerprint, tensors_fingerprint
from meadef_lightning.verification.remaining import can_be_probabilities, readings, remaining_shares
from meadef_lightning.verification.responses import Responses, with_reference
from meadef_lightning.verification.suspect import INVALID, SuspectModule, answered_labels, described, translation_of
from meadef_lightning.verification.verdict import Verdict, check_plan, judge
from meadef_lightning.watermark.key import WatermarkKey

_MISSING = -2
"""Not asked. The maximum over processes keeps the two apart: an answer beats ``INVALID``, which beats this."""


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
            :func:`~meadef_lightning.verification.scores.above_references`.

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
        self._soft: tuple[Tensor, Tensor, Tensor] | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the run, and reserves a place for each answer."""
        data = self._data(trainer)
        if data.key != self.key:
            raise MisconfigurationException(
                "VerificationCallback and VerificationDataModule have different keys; give both the same."
            )
        if self.evidence_path is not None:
            check_size(data.table, self._references())
            if trainer.is_global_zero:
                _check_writable(self.evidence_path)
        self._answers = [
            torch.full((len(loader.dataset),), _MISSING, device=pl_module.device)  # type: ignore[arg-type]
            for loader in data.predict_dataloader()
        ]
        # beside two sources of three classes there is nothing to compare
        self._soft = None if self.key.num_classes == 3 else self._places(data, pl_module.device)

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
        if trainer.received_sigterm:
            raise SIGTERMException  # as Lightning itself does in training and testing, but not here: the signal would be lost
        positions, data = batch[1], self._data(trainer)
        soft = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 2
        if not soft and (
            not isinstance(outputs, Tensor) or outputs.dtype != torch.int64 or outputs.shape != positions.shape
        ):
            raise MisconfigurationException(
                f"predict_step must return scores of shape (B, K) or the answered classes, int64 of shape (B,), got {described(outputs)}. "
                "Wrap the model: trainer.predict(SuspectModule(model), …)."
            )
        labels = answered_labels(outputs, len(positions), self.key.num_classes)
        self._answers[dataloader_idx][positions] = labels
        if not soft:
            self._soft = None
        elif self._soft is not None:
            self._add(data, outputs, data.places(positions, dataloader_idx))

    def _places(self, data: VerificationDataModule, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Makes room for what probabilities say: the target's share of each sample, and the shares of each cell, added up.

        Both for scores that are probabilities and for logits, and a place that counts what can only be logits: that is known when all are
        there, and batches, which every key has others of, must not decide it.
        """
        cells = len(data.table.pairs) * len(data.table.space.combiners), len(data.table.targets)
        lean = torch.full((2, sum(data.sizes)), _MISSING, device=device)
        return lean, torch.zeros(2, *cells, dtype=torch.int64, device=device), torch.zeros((), device=device)

    def _add(self, data: VerificationDataModule, scores: Tensor, places: Tensor) -> None:
        """Adds what a batch's scores say, read both ways; a sample is asked once, so sums need no order."""
        if self._soft is None:
            return
        lean, cells, logits = self._soft
        device, ways = places.device, len(data.table.space.combiners)
        cell = data.cells_of(places)
        own = torch.tensor(self.key.source_classes, device=device)
        pairs = data.table.pairs.to(device)[cell.clamp_min(0) // ways]
        sources = torch.where((cell < 0)[:, None], own, pairs)
        targets = data.table.targets.to(device)
        kept = places < lean.shape[1]  # filler is beyond
        decoy = cell >= 0
        for reading, probabilities in enumerate(readings(scores)):
            shares = remaining_shares(probabilities, sources)
            lean[reading, places[kept]] = shares[kept, self.key.target_class]
            cells[reading].index_add_(0, cell[decoy], shares[decoy][:, targets])
        logits.add_(~can_be_probabilities(scores))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the answers of all processes together, judges them and writes the evidence."""
        data = self._data(trainer)
        answers = [trainer.strategy.reduce(answer, reduce_op="max").cpu() for answer in self._answers]
        soft: tuple[Tensor, Tensor] | None = None  # labels in one process are labels in all
        if trainer.strategy.reduce_boolean_decision(self._soft is not None, all=True) and self._soft is not None:
            lean, cells, logits = (
                trainer.strategy.reduce(told, reduce_op=how)
                for told, how in zip(self._soft, ("max", "sum", "sum"), strict=True)
            )
            reading = int(logits > 0)
            soft = lean[reading].cpu(), cells[reading].cpu()
        self._answers, self._soft = [], None
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
        suspect = pl_module.network if isinstance(pl_module, SuspectModule) else [pl_module]
        told = replace(
            data.responses(answers, soft), model_sha256=model_fingerprint(suspect[0]) if len(suspect) else None
        )
        self.responses = with_reference(told, self.reference)
        self.verdict = judge(self.responses, self.key, self.alpha, self.null_statistics)
        if self.evidence_path is not None and trainer.is_global_zero:
            Evidence.collect(
                self.verdict,
                self.responses,
                self.key,
                data_sha256={
                    "verification": tensors_fingerprint(*data.sources),
                    "test": tensors_fingerprint(*data.natural),
                },
                null_statistics=self.null_statistics,
                labels=translation_of(pl_module),
            ).save(self.evidence_path)

    def _references(self) -> int:
        """How many reference models there are."""
        return len(self.reference) if isinstance(self.reference, Sequence) else int(self.reference is not None)

    @staticmethod
    def _data(trainer: Trainer) -> VerificationDataModule:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, VerificationDataModule):
            raise MisconfigurationException(
                f"VerificationCallback needs the questions of a VerificationDataModule, got {type(data).__name__}. "
                "Call trainer.predict(SuspectModule(model), datamodule=VerificationDataModule(key, data))."
            )
        return data


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
