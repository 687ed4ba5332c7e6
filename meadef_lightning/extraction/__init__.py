"""One data module for each way to steal a model through its oracle, and the one student they all train."""

from meadef_lightning.extraction.distillation import DistillationDataModule
from meadef_lightning.extraction.student import Student, distillation_loss

__all__ = ["DistillationDataModule", "Student", "distillation_loss"]
