"""The whole of verification in one call: the questions, a Trainer that asks them, the verdict."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from meadef_lightning.verification.callback import VerificationCallback
from meadef_lightning.verification.camouflage import CamouflagedDataModule
from meadef_lightning.verification.datamodule import SourceData, VerificationDataModule
from meadef_lightning.verification.responses import Responses
from meadef_lightning.verification.suspect import OutputKey, Queryable, SuspectModule
from meadef_lightning.verification.verdict import Verdict
from meadef_lightning.watermark.key import WatermarkKey


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
            like a third class to any model. Of several, given as a sequence, the mean is taken, and how much they differ on each key.
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
