"""What a judge reads: is this suspect a copy? Questions, metrics, verdict and evidence.

`verify` is the whole of it in one call, for a module or a black box, and `meadef_lightning.verification.callback` the same inside a Trainer.
`meadef_lightning.verification.datamodule` asks, `meadef_lightning.verification.statistics` holds the exact tests,
`meadef_lightning.verification.verdict` joins them, and `meadef_lightning.verification.evidence` writes down what can be checked offline.
Before: `meadef_lightning.verification.planning` (how many samples), `meadef_lightning.verification.commitment` (what to publish).
Besides: several keys (`meadef_lightning.verification.combination`), fewer queries (`meadef_lightning.verification.sequential`), suspects that
number their classes differently (`meadef_lightning.verification.labels`), and what a malicious accuser could try
(`meadef_lightning.verification.false_claims`).
"""

from meadef_lightning.verification.callback import SuspectModule, VerificationCallback, verify
from meadef_lightning.verification.combination import JointVerdict, combine_fisher, holm, judge_keys
from meadef_lightning.verification.datamodule import VerificationDataModule
from meadef_lightning.verification.evidence import Evidence, EvidenceError, check_evidence, model_fingerprint
from meadef_lightning.verification.metrics import FalsePositiveRate, Fidelity, WatermarkSuccessRate
from meadef_lightning.verification.planning import Power, power, smallest_plan
from meadef_lightning.verification.sequential import SequentialResult, SequentialTest
from meadef_lightning.verification.verdict import Responses, Verdict, decoy_statistics, judge

__all__ = [
    "Evidence",
    "EvidenceError",
    "FalsePositiveRate",
    "Fidelity",
    "JointVerdict",
    "Power",
    "Responses",
    "SequentialResult",
    "SequentialTest",
    "SuspectModule",
    "Verdict",
    "VerificationCallback",
    "VerificationDataModule",
    "WatermarkSuccessRate",
    "check_evidence",
    "combine_fisher",
    "decoy_statistics",
    "holm",
    "judge",
    "judge_keys",
    "model_fingerprint",
    "power",
    "smallest_plan",
    "verify",
]
