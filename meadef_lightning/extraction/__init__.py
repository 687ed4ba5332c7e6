"""One data module for each way to steal a model through its oracle, and the one student they all train."""

from meadef_lightning.extraction.base import ExtractionDataModule, TransferSet
from meadef_lightning.extraction.distillation import DistillationDataModule
from meadef_lightning.extraction.pools import AttackerSplit, Noise, OtherData, Pool
from meadef_lightning.extraction.rounds import RoundsDataModule
from meadef_lightning.extraction.student import Student, distillation_loss

__all__ = [
    "AttackerSplit",
    "DistillationDataModule",
    "ExtractionDataModule",
    "Noise",
    "OtherData",
    "Pool",
    "RoundsDataModule",
    "Student",
    "TransferSet",
    "distillation_loss",
]
