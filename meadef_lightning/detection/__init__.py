"""How somebody looks for a watermark, in a model or among queries: one file per way."""

from meadef_lightning.detection.abs import ABS
from meadef_lightning.detection.activation_clustering import ActivationClustering
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
