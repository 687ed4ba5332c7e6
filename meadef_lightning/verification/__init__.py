"""What a judge reads: is this suspect a copy? Questions, metrics, verdict and evidence."""

from meadef_lightning.verification.callback import SuspectModule, VerificationCallback, verify
from meadef_lightning.verification.datamodule import VerificationDataModule
from meadef_lightning.verification.evidence import Evidence, EvidenceError, check_evidence, model_fingerprint
from meadef_lightning.verification.metrics import FalsePositiveRate, Fidelity, WatermarkSuccessRate
from meadef_lightning.verification.verdict import Responses, Verdict, decoy_statistics, judge

__all__ = [
    "Evidence",
    "EvidenceError",
    "FalsePositiveRate",
    "Fidelity",
    "Responses",
    "SuspectModule",
    "Verdict",
    "VerificationCallback",
    "VerificationDataModule",
    "WatermarkSuccessRate",
    "check_evidence",
    "decoy_statistics",
    "judge",
    "model_fingerprint",
    "verify",
]
