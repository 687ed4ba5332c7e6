"""What a verification asked, made again from key and data: its samples, and the splits that they come from."""

from __future__ import annotations

import hashlib
import hmac

from meadef_lightning.data.stored import read_split
from meadef_lightning.verification.datamodule import SourceData, VerificationDataModule
from meadef_lightning.verification.evidence import Evidence
from meadef_lightning.verification.evidence_form import EvidenceError
from meadef_lightning.verification.fingerprints import tensors_fingerprint
from meadef_lightning.watermark.key import WatermarkKey

_BATCH = 512


def question_seals(key: WatermarkKey, data: SourceData, evidence: Evidence) -> dict[str, str]:
    """Makes the samples of a verification again, and hashes them.

    Args:
        key: The key.
        data: The data that the verification used.
        evidence: Its evidence, for the numbers of samples and the seed.

    Returns:
        For each kind, HMAC-SHA256 under the key's salt of the SHA-256 of its samples in plain order.

    Raises:
        ValueError: If key, data and evidence do not fit each other.
    """
    answers, procedure = evidence.opened(key), evidence.procedure
    each = sum(answers["cells"][0]) if answers["cells"] else 0
    samples = max(len(answers["trigger"]), 1)
    asked = VerificationDataModule(key, data, samples, procedure["decoys"], each, procedure["seed"], _BATCH)
    asked.prepare_data()
    asked.setup("predict")
    seals = {}
    for kind, loader in zip(asked.loaders, asked.predict_dataloader(), strict=True):
        digest = hashlib.sha256()
        for x, _ in loader:
            digest.update(tensors_fingerprint(x).encode())
        seals[kind] = hmac.new(f"questions {key.salt}".encode(), kind.encode() + digest.digest(), "sha256").hexdigest()
    return seals


def check_data(evidence: Evidence, data: SourceData) -> None:
    """Compares data with what a verification used.

    Args:
        evidence: The verification's evidence.
        data: Its data, or other.

    Raises:
        EvidenceError: If it is other; the message names the split.
    """
    data.prepare_data()
    data.setup("predict")
    for split in ("verification", "test"):
        if tensors_fingerprint(*read_split(data, split)) != evidence.data[split]:
            raise EvidenceError(f"data.{split} differs: the data given is not what the verification used.")
