"""How a thief tries to scrub a watermark off a model that he holds: one file per way.

A `meadef_lightning.removal.base.Removal` walks a path of growing strength and shows the model at every step; an ``AccuracyBudget`` says how
far the thief can go before his own images tell him that the model is spoilt. Training: fine-tuning, adversarial fine-tuning, NAD, I-BAU, WRK,
GAN unlearning, distilling again, also from balanced answers (made for this package's own recipe), transfer, overwriting. Weights: pruning, fine-pruning, quantisation, noise. Inputs: preprocessing.
In an experiment they stand under ``removal:``, on the victim, on stolen models, and on the positive control.
"""

from meadef_lightning.removal.adversarial import AdversarialFineTuning
from meadef_lightning.removal.balanced_distillation import BalancedDistillation
from meadef_lightning.removal.base import AccuracyBudget, Removal, train_path
from meadef_lightning.removal.distil_again import DistilAgain
from meadef_lightning.removal.fine_pruning import FinePruning
from meadef_lightning.removal.finetuning import FineTuning
from meadef_lightning.removal.gan_unlearning import GANUnlearning
from meadef_lightning.removal.ibau import IBAU
from meadef_lightning.removal.nad import NAD
from meadef_lightning.removal.overwriting import Overwriting
from meadef_lightning.removal.preprocessing import InputPreprocessing
from meadef_lightning.removal.pruning import MagnitudePruning
from meadef_lightning.removal.quantisation import Quantisation
from meadef_lightning.removal.transfer import Transfer
from meadef_lightning.removal.weight_noise import WeightNoise
from meadef_lightning.removal.wrk import WRK

__all__ = [
    "IBAU",
    "NAD",
    "WRK",
    "AccuracyBudget",
    "AdversarialFineTuning",
    "BalancedDistillation",
    "DistilAgain",
    "FinePruning",
    "FineTuning",
    "GANUnlearning",
    "InputPreprocessing",
    "MagnitudePruning",
    "Overwriting",
    "Quantisation",
    "Removal",
    "Transfer",
    "WeightNoise",
    "train_path",
]
