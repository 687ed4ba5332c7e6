"""Models worth stealing, and the networks they are made of."""

from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.downstream import DownstreamClassifier
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.simclr import SimCLRVictim
from meadef_lightning.victims.supervised import SupervisedVictim

__all__ = ["Classifier", "DownstreamClassifier", "Encoder", "SimCLRVictim", "SupervisedVictim"]
