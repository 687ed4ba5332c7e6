"""Models worth stealing, and the networks they are made of."""

from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.supervised import SupervisedVictim

__all__ = ["Classifier", "SupervisedVictim"]
