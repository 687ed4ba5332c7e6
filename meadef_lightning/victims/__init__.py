"""Models worth stealing, and the networks they are made of.

`meadef_lightning.victims.supervised` is a classifier, `meadef_lightning.victims.simclr` a self-supervised encoder:
`meadef_lightning.victims.probes` watch how good its features become, and `meadef_lightning.victims.downstream` makes a classifier of it. Both
take any network, as a factory or ready
(`meadef_lightning.victims.networks` has a few). Nothing else here knows of watermarks: the callback embeds them into any
LightningModule, and a victim of your own needs no base class of ours.
"""

from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.downstream import DownstreamClassifier
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.simclr import SimCLRVictim
from meadef_lightning.victims.supervised import SupervisedVictim

__all__ = ["Classifier", "DownstreamClassifier", "Encoder", "SimCLRVictim", "SupervisedVictim"]
