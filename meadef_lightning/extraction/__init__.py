"""One data module for each way to steal a model through its oracle, and the one student they all train."""

from meadef_lightning.extraction.active import ActiveThiefDataModule
from meadef_lightning.extraction.base import ExtractionDataModule, TransferSet
from meadef_lightning.extraction.composite import CompositeDataModule
from meadef_lightning.extraction.copycat import CopycatDataModule
from meadef_lightning.extraction.datafree import DataFreeDataModule
from meadef_lightning.extraction.dfme import DFMEStudent
from meadef_lightning.extraction.distillation import DistillationDataModule
from meadef_lightning.extraction.encoder_student import EncoderStudent
from meadef_lightning.extraction.jacobian import JacobianDataModule, TargetedJacobianDataModule
from meadef_lightning.extraction.knockoff import AdaptiveKnockoffDataModule, KnockoffDataModule
from meadef_lightning.extraction.maze import MAZEStudent
from meadef_lightning.extraction.pools import AttackerSplit, Noise, OtherData, Photographs, Pool
from meadef_lightning.extraction.rounds import RoundsDataModule
from meadef_lightning.extraction.stolen_encoder import StolenEncoderDataModule
from meadef_lightning.extraction.student import Student, distillation_loss

__all__ = [
    "ActiveThiefDataModule",
    "AdaptiveKnockoffDataModule",
    "AttackerSplit",
    "CompositeDataModule",
    "CopycatDataModule",
    "DFMEStudent",
    "DataFreeDataModule",
    "DistillationDataModule",
    "EncoderStudent",
    "ExtractionDataModule",
    "JacobianDataModule",
    "KnockoffDataModule",
    "MAZEStudent",
    "Noise",
    "OtherData",
    "Photographs",
    "Pool",
    "RoundsDataModule",
    "StolenEncoderDataModule",
    "Student",
    "TargetedJacobianDataModule",
    "TransferSet",
    "distillation_loss",
]
