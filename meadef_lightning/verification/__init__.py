"""What a judge reads: is this suspect a copy? Questions, metrics, verdict and evidence.

`verify` (`meadef_lightning.verification.verifying`) is the whole of it in one call, for a module or a black box, and
`meadef_lightning.verification.callback` the same inside a Trainer, which asks a `meadef_lightning.verification.suspect`.
`meadef_lightning.verification.datamodule` asks, `meadef_lightning.verification.statistics` holds the exact tests,
`meadef_lightning.verification.verdict` joins them, and `meadef_lightning.verification.evidence` writes down what can be checked offline, encrypted and sealed
(`meadef_lightning.verification.sealing`).
Before: `meadef_lightning.verification.planning` (how many samples), `meadef_lightning.verification.commitment` (what to publish).
Besides: several keys (`meadef_lightning.verification.combination`), fewer queries (`meadef_lightning.verification.sequential`), encoders
(`meadef_lightning.verification.features`), suspects that number their classes differently (`meadef_lightning.verification.labels`), and what a
malicious accuser could try (`meadef_lightning.verification.false_claims`). After: `meadef_lightning.verification.bundle` packs all of it for a
judge, signed (`meadef_lightning.verification.signing`). A black box cannot tell the questions apart (`meadef_lightning.verification.camouflage`).
"""

from meadef_lightning.verification.bundle import Bundle, Findings
from meadef_lightning.verification.callback import VerificationCallback
from meadef_lightning.verification.camouflage import CamouflagedDataModule
from meadef_lightning.verification.combination import JointVerdict, combine_fisher, combine_verdicts, holm, judge_keys
from meadef_lightning.verification.commitment import Commitment, repeat_draw, secret_commitment, timestamp_request
from meadef_lightning.verification.datamodule import VerificationDataModule
from meadef_lightning.verification.evidence import Evidence, check_evidence
from meadef_lightning.verification.evidence_form import EvidenceError
from meadef_lightning.verification.features import FeatureVerdict, feature_verdict
from meadef_lightning.verification.fingerprints import model_fingerprint
from meadef_lightning.verification.labels import LabelMap, align_labels
from meadef_lightning.verification.metrics import FalsePositiveRate, Fidelity, WatermarkSuccessRate
from meadef_lightning.verification.planning import Power, power, smallest_plan
from meadef_lightning.verification.relabelling import RelabelledBlackBox, RelabelledModule, relabelled
from meadef_lightning.verification.responses import Responses
from meadef_lightning.verification.sequential import SequentialResult, SequentialTest
from meadef_lightning.verification.signing import load_signing_key, make_signing_key
from meadef_lightning.verification.suspect import SuspectModule
from meadef_lightning.verification.verdict import Verdict, decoy_statistics, judge
from meadef_lightning.verification.verifying import verify

__all__ = [
    "Bundle",
    "CamouflagedDataModule",
    "Commitment",
    "Evidence",
    "EvidenceError",
    "FalsePositiveRate",
    "FeatureVerdict",
    "Fidelity",
    "Findings",
    "JointVerdict",
    "LabelMap",
    "Power",
    "RelabelledBlackBox",
    "RelabelledModule",
    "Responses",
    "SequentialResult",
    "SequentialTest",
    "SuspectModule",
    "Verdict",
    "VerificationCallback",
    "VerificationDataModule",
    "WatermarkSuccessRate",
    "align_labels",
    "check_evidence",
    "combine_fisher",
    "combine_verdicts",
    "decoy_statistics",
    "feature_verdict",
    "holm",
    "judge",
    "judge_keys",
    "load_signing_key",
    "make_signing_key",
    "model_fingerprint",
    "power",
    "relabelled",
    "repeat_draw",
    "secret_commitment",
    "smallest_plan",
    "timestamp_request",
    "verify",
]
