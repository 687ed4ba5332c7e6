"""One data module for each way to steal a model through its oracle, and the one student they all train.

An attack decides what to ask: it is a `meadef_lightning.extraction.base.ExtractionDataModule`, whose ``collect`` chooses queries and asks them;
one that needs interim students is a `meadef_lightning.extraction.rounds.RoundsDataModule`. Where images come from is a pool
(`meadef_lightning.extraction.pools`): the attacker's split, other data, photographs, noise. Hand the attack and a `Student`, which takes
soft and hard answers alike, to a Trainer. The attacks without data bring a student of their own (`meadef_lightning.extraction.dfme`,
`meadef_lightning.extraction.maze`), as do those on encoders (`meadef_lightning.extraction.encoder_student`). For an attack of your own see
``experiments/examples/own_attack.py``.
"""

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
