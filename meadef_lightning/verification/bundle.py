"""A verdict as a parcel that a judge can open without trusting its sender: a directory or one zip file.

**Content** (nothing else is allowed in it):

* ``manifest.json``: SHA-256 of every other file, time, command, seed, versions, hashes of the questions; sealed with an HMAC under the
  key's salt, field by field, and signed with Ed25519 if the owner has a signing key;
* ``evidence.json``: the raw answers and the verdict (:class:`~meadef_lightning.verification.evidence.Evidence`), which names no class; and
  where the suspect's labels had to be translated, the map and the counts that it follows from;
* ``watermark.commitment.json``, and the answer ``watermark.commitment.tsr`` of a time-stamping authority, if there are any;
* ``watermark.key.json``: the key, only if the owner discloses it to the judge.

**Check**: the hashes, seal and signature; that key, commitment and evidence belong together; then the verdict is derived again from the raw
answers. What differs is named: the file, and where the form allows the field. Without a key nothing is derived, and a bundle that is
unsigned, too, can be checked for accidental damage only; the notes say so.

**Questions**: an HMAC under the key's salt of the samples asked, kind by kind. Plain hashes would give the key away, since anybody who has the
images could hash the composites of all keys. With key and data the samples are made again and compared.

**Hostile bundles**: names outside the list above (so all paths, too), links, special files, oversized, compressed or encrypted members
are refused. Nothing is extracted, unpickled, imported or executed: files are read into memory up to their limits. A zip must be, byte for byte, the
one that its files make, so there is no room for hidden, doubled or overlapping members; one that another tool wrote is
given as the directory that it unpacks to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meadef_lightning.verification.commitment import OWNERS_WORD, Commitment, free_choices, now, versions
from meadef_lightning.verification.datamodule import SourceData, VerificationDataModule
from meadef_lightning.verification.evidence import Evidence
from meadef_lightning.verification.evidence_form import EvidenceError, time_of
from meadef_lightning.verification.parcel import COMMITMENT, EVIDENCE, KEY, MANIFEST, TIMESTAMP, read_files, write_files
from meadef_lightning.verification.questions import check_data, question_seals
from meadef_lightning.verification.sealing import seals
from meadef_lightning.verification.signing import (
    check_signature,
    is_hex,
    parse,
    public_hex,
    render,
    sha256,
    sign,
)
from meadef_lightning.verification.verdict import Verdict
from meadef_lightning.watermark.key import WatermarkKey

_WHAT, _SCHEMA, _MAX_COMMAND = "meadef_lightning evidence bundle", 1, 100_000
_FIELDS = {"what", "schema_version", "created", "command", "key", "seed", "questions", "versions", "files", "signer"}
_PROOFS = {"seal", "signature"}


@dataclass(frozen=True)
class Findings:
    """What a check found, where nothing was wrong.

    Args:
        verdict: The verdict, derived again; ``None`` without a key.
        signer: Public key of who signed the bundle, 64 hexadecimal digits; ``None`` if it is unsigned.
        notes: What was checked, and what the reader must know.
    """

    verdict: Verdict | None
    signer: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Bundle:
    """The files of a bundle, by name; see the module's documentation.

    Args:
        files: Content of each file.
    """

    files: Mapping[str, bytes]

    @classmethod
    def make(
        cls,
        evidence: bytes,
        key: WatermarkKey,
        *,
        command: str = "",
        commitment: bytes | None = None,
        timestamp: bytes | None = None,
        data: SourceData | None = None,
        disclose_key: bool = False,
        signing_key: Ed25519PrivateKey | None = None,
    ) -> Bundle:
        """Makes a bundle, and checks it as a judge would.

        Args:
            evidence: Content of the evidence file.
            key: The key that it is about.
            command: The command that judged.
            commitment: Content of the commitment file.
            timestamp: An authority's answer to the commitment's time-stamp request.
            data: The data that the verification used, so that the questions can be hashed.
            disclose_key: Whether the bundle holds the key itself.
            signing_key: Signs the manifest.

        Raises:
            EvidenceError: If evidence, key and commitment do not belong together.
            ValueError: If the data does not fit them.
        """
        parsed = Evidence.parse(evidence, EVIDENCE)
        parsed.check(key)
        if data is not None:
            check_data(parsed, data)
        files = {EVIDENCE: evidence}
        if commitment is not None:
            files[COMMITMENT] = commitment
        if timestamp is not None:
            files[TIMESTAMP] = timestamp
        if disclose_key:
            files[KEY] = (json.dumps(key.to_dict(), indent=2) + "\n").encode()
        manifest: dict[str, Any] = {
            "what": _WHAT,
            "schema_version": _SCHEMA,
            "created": now(),
            "command": command,
            "key": key.commitment(),
            "seed": parsed.procedure["seed"],
            "questions": None if data is None else question_seals(key, data, parsed),
            "versions": versions(),
            "files": {name: sha256(content) for name, content in files.items()},
            # sealed, too, so that nobody without the key can take a signature off
            "signer": None if signing_key is None else public_hex(signing_key),
        }
        manifest["seal"] = seals({"manifest": manifest}, key)
        bundle = cls({MANIFEST: render(sign(manifest, signing_key)), **files})
        bundle.check(key)
        return bundle

    def save(self, path: str | Path) -> Path:
        """Writes a directory, or a zip file if the path ends in ``.zip``; readable by its owner only if it holds the key.

        Raises:
            OSError: If there is something already, or it cannot be written.
        """
        return write_files(Path(path), self.files, private=KEY in self.files)

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Reads a bundle, which may come from anybody, into memory; nothing is extracted or executed.

        Raises:
            EvidenceError: If it is missing, or holds what no bundle may hold; the message names it.
        """
        return cls(read_files(Path(path)))

    @property
    def evidence(self) -> Evidence:
        """The evidence; its form is checked, its content is not."""
        if EVIDENCE not in self.files:
            raise EvidenceError(f"{EVIDENCE} is missing from the bundle.")
        return Evidence.parse(self.files[EVIDENCE], EVIDENCE)

    def disclosed_key(self) -> WatermarkKey | None:
        """Returns the key in the bundle, if it holds one; raises ``EvidenceError``, which shows none of it, if it is malformed."""
        if KEY not in self.files:
            return None
        try:
            return WatermarkKey.from_dict(json.loads(self.files[KEY]))
        except (RecursionError, TypeError, ValueError):
            raise EvidenceError(f"{KEY} is not a usable watermark key.") from None

    def check(
        self,
        key: WatermarkKey | None = None,
        *,
        signer: str | None = None,
        secret: bytes | None = None,
        data: SourceData | None = None,
    ) -> Findings:
        """Checks everything that can be checked offline.

        Args:
            key: The key, unless the bundle discloses it.
            signer: Public key that must have signed the bundle, 64 hexadecimal digits.
            secret: The owner secret, to repeat the key's draw.
            data: Makes the questions again from the data that the verification used. Other data is noted, not refused.

        Raises:
            EvidenceError: If anything was changed or does not belong together; the message names the file or field.
            ValueError: If the data cannot be used with this key.
        """
        manifest = self._manifest()
        for name, content in self.files.items():
            if name != MANIFEST and sha256(content) != manifest["files"].get(name):
                raise EvidenceError(f"{name} differs from its hash in {MANIFEST}: one of the two was changed.")
        disclosed = self.disclosed_key()
        if key is not None and disclosed is not None and key != disclosed:
            raise EvidenceError(f"{KEY} in the bundle is another key than the one given.")
        key = key or disclosed
        notes = [f"All {len(self.files) - 1} files fit their hashes."]
        if key is not None:
            _check_seal(manifest, key)
        signed_by = check_signature(manifest, MANIFEST)
        if signer is not None and signed_by != signer:
            raise EvidenceError(
                f"{MANIFEST}: signer differs: it was signed by {signed_by or 'nobody'}, not by {signer!r:.80}."
            )
        notes.append(f"Signed by {signed_by}." if signed_by else "The bundle is unsigned.")
        evidence = self.evidence
        if manifest["key"] != evidence.key["commitment"]:
            raise EvidenceError(f"key.commitment differs between {MANIFEST} and {EVIDENCE}.")
        if manifest["seed"] != evidence.procedure["seed"]:
            raise EvidenceError(f"seed differs between {MANIFEST} and {EVIDENCE}.")
        notes += self._check_commitment(evidence, signed_by, key, secret)
        if evidence.key["drawn_uniformly"] and secret is None:
            notes.append(OWNERS_WORD)
        if (labels := evidence.labels) is not None:
            notes.append(labels.describe())
        verdict = None
        if key is None:
            notes.append(
                "No key was given and none is disclosed: the verdict was not derived again."
                + ("" if signed_by else " Without a signature, too, only accidental damage would have been found.")
            )
        else:
            verdict = evidence.check(key)
            notes.append("The seals hold, and the verdict follows from the raw answers.")
            if data is not None:
                notes.append(_check_questions(manifest, evidence, key, data))
        return Findings(verdict, signed_by, tuple(notes))

    def _manifest(self) -> dict[str, Any]:
        """Reads the manifest and checks its form, and that it lists the files that there are."""
        if MANIFEST not in self.files:
            raise EvidenceError(f"{MANIFEST} is missing: this is not an evidence bundle.")
        content = parse(self.files[MANIFEST], MANIFEST)
        if wrong := sorted(content.keys() ^ (_FIELDS | _PROOFS)):
            raise EvidenceError(f"{MANIFEST}: missing or unknown fields: {', '.join(map(ascii, wrong))[:300]}.")
        for field, fits in _FORM.items():
            if not fits(content[field]):
                raise EvidenceError(f"{MANIFEST}: {field} is malformed, or of another version of this package.")
        listed, there = set(content["files"]), set(self.files) - {MANIFEST}
        if different := sorted(listed ^ there):
            what = (
                f"listed in {MANIFEST}, but missing"
                if different[0] in listed
                else f"there, but not listed in {MANIFEST}"
            )
            raise EvidenceError(f"{different[0]!a:.100} is {what}.")
        return content

    def _check_commitment(
        self, evidence: Evidence, signed_by: str | None, key: WatermarkKey | None, secret: bytes | None
    ) -> list[str]:
        if COMMITMENT not in self.files:
            if TIMESTAMP in self.files:
                raise EvidenceError(f"{TIMESTAMP} is there without {COMMITMENT}.")
            if secret is not None:
                raise EvidenceError(f"{COMMITMENT} is missing, so there is nothing to compare the secret with.")
            return ["There is no commitment: nothing shows when the key was chosen."]
        commitment = Commitment.parse(self.files[COMMITMENT], COMMITMENT)
        for name in ("commitment", "drawn_uniformly", "num_classes"):
            if commitment.key is None or commitment.key[name] != evidence.key[name]:
                raise EvidenceError(f"key.{name} differs between {COMMITMENT} and {EVIDENCE}.")
        if commitment.signer is not None and commitment.signer != signed_by:
            raise EvidenceError(
                f"signer differs between {COMMITMENT} and {MANIFEST}: a bundle is signed with the key that signed its commitment."
            )
        if time_of(commitment.created) > time_of(evidence.created):
            raise EvidenceError(f"{COMMITMENT} says that it was created at {commitment.created}, after the evidence.")
        notes = [f"The key was committed to at {commitment.created}, by the owner's clock."]
        if TIMESTAMP in self.files:
            if bytes.fromhex(sha256(self.files[COMMITMENT])) not in self.files[TIMESTAMP]:
                raise EvidenceError(f"{TIMESTAMP} does not stamp this {COMMITMENT}.")
            notes.append(
                f"{TIMESTAMP} holds the commitment's hash. Its signature was not checked: openssl ts -verify -data {COMMITMENT} "
                f"-in {TIMESTAMP} -CAfile AUTHORITY.pem"
            )
        if commitment.data is not None and commitment.data != evidence.data:
            notes.append("The evidence rests on other data than the commitment names.")
        if key is not None:
            commitment.check(key)
        if key is not None and secret is not None:
            commitment.check_draw(key, secret)
            notes += ["The key is what the committed secret and beacon give.", *free_choices(key)]
        return notes

    def __repr__(self) -> str:
        """Shows names only."""
        return f"Bundle({', '.join(self.files)})"


def _check_seal(manifest: Mapping[str, Any], key: WatermarkKey) -> None:
    if manifest["key"] != key.commitment():
        raise EvidenceError(
            f"{MANIFEST}: key.commitment differs: the bundle is about another key, or was changed. Use the key that was verified."
        )
    expected = seals({"manifest": {name: manifest[name] for name in _FIELDS}}, key)
    if changed := sorted(name for name in expected if expected[name] != manifest["seal"].get(name)):
        raise EvidenceError(f"The bundle was changed after it was made. Fields that differ: {', '.join(changed)}.")
    if expected.keys() != manifest["seal"].keys():
        raise EvidenceError(f"{MANIFEST}: seal has fields that are none of the bundle's.")


def _check_questions(manifest: Mapping[str, Any], evidence: Evidence, key: WatermarkKey, data: SourceData) -> str:
    try:
        check_data(evidence, data)
    except EvidenceError:
        return "The data given is not what the verification used: its questions were not made again."
    if manifest["questions"] is None:
        return "The data given is what the verification used; the bundle holds no hashes of the questions."
    made = question_seals(key, data, evidence)
    if wrong := sorted(kind for kind in made if made[kind] != manifest["questions"].get(kind)):
        raise EvidenceError(
            f"The samples made again differ from those hashed: {', '.join('questions.' + kind for kind in wrong)}."
        )
    return "The triggers and all other samples, made again from key and data, fit their hashes."


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_hex, value.values()))


_FORM = {
    "what": lambda value: value == _WHAT,
    "schema_version": lambda value: type(value) is int and value == _SCHEMA,
    "created": lambda value: isinstance(value, str) and len(value) < 100,
    "command": lambda value: isinstance(value, str) and len(value) <= _MAX_COMMAND,
    "key": is_hex,
    "seed": lambda value: type(value) is int and 0 <= value < 1 << 63,
    "questions": lambda value: (
        value is None or (_is_hashes(value) and value.keys() == set(VerificationDataModule.loaders))
    ),
    "versions": lambda value: isinstance(value, dict) and all(isinstance(part, str) for part in value.values()),
    "files": _is_hashes,
    "seal": _is_hashes,
}
