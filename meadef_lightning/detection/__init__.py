"""How somebody looks for a watermark, in a model or among queries: one file per way.

A `meadef_lightning.detection.base.ModelDetector` searches weights: Neural Cleanse, ABS, and two that are made for this
watermark, the scan of mixtures and the lean of natural answers. An `meadef_lightning.detection.base.InputDetector` screens what a model is asked: STRIP, local outlier factor,
activation clustering, spectral signatures, consistency under universal perturbations. Both end in a ``Finding``: a score, the method's own threshold, and a decision. In an experiment they stand under ``detection:``,
and run on clean models, too, which gives the rate of false alarms, and on a plain patch backdoor, which shows that they work.
"""

from meadef_lightning.detection.abs import ABS
from meadef_lightning.detection.activation_clustering import ActivationClustering
from meadef_lightning.detection.answer_lean import AnswerLean
from meadef_lightning.detection.base import Finding, InputDetector, ModelDetector, anomaly_index, roc_auc
from meadef_lightning.detection.lof import LocalOutlierFactor
from meadef_lightning.detection.mixture_scan import MixtureScan
from meadef_lightning.detection.neural_cleanse import NeuralCleanse
from meadef_lightning.detection.spectral import SpectralSignatures
from meadef_lightning.detection.strip import STRIP
from meadef_lightning.detection.uap_consistency import UAPConsistency

__all__ = [
    "ABS",
    "STRIP",
    "ActivationClustering",
    "AnswerLean",
    "Finding",
    "InputDetector",
    "LocalOutlierFactor",
    "MixtureScan",
    "ModelDetector",
    "NeuralCleanse",
    "SpectralSignatures",
    "UAPConsistency",
    "anomaly_index",
    "roc_auc",
]
