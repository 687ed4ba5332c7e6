"""What an owner publishes before training: a promise of key, model and data that shows none of them.

A verdict is worth little if the key could have been chosen after the suspect was seen. So the owner publishes a small file first: the
hash of the key, of the model's specification and of the data. Its time is a claim; what proves it is a place of publication that dates
(a journal, a public repository, a notary), or a time stamp (RFC 3161) of the file by a trusted authority. This package asks no
authority itself: :func:`timestamp_request` makes the request that any of them takes, and ``openssl ts -verify`` checks the answer.

**Drawing without choice.** An owner could try secrets until the key suits. Against this, publish a commitment to the *secret* before a
public beacon value (a block hash, a randomness beacon's round) exists, then draw the key from both, and commit to secret, beacon
and key together. Whoever is shown the secret later can repeat the draw: :meth:`Commitment.check_draw`. A key space of one's own is a choice, too:
its ways and their order decide what is drawn, so publish them with the first commitment (:func:`free_choices` reminds a judge).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import lightning
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meadef_lightning.__about__ import __version__
from meadef_lightning.verification.evidence_form import EvidenceError, is_time
from meadef_lightning.verification.signing import check_signature, is_hex, parse, render, sign
from meadef_lightning.watermark.combiner_spec import DEFAULT_COMBINERS
from meadef_lightning.watermark.key import KeySpace, WatermarkKey

_WHAT, _SCHEMA = "meadef_lightning commitment", 1
_FIELDS = {"what", "schema_version", "created", "key", "secret", "model", "data", "versions", "signer", "signature"}
OWNERS_WORD = (
    "That the key was drawn is its owner's word: the draw was not repeated, for which the owner shows the secret."
)
"""What is to be said of a draw that nobody repeated."""
# DER of a TimeStampReq (RFC 3161 §2.4.1): version 1, SHA-256, 32 bytes of digest; then certReq TRUE
_REQUEST = bytes.fromhex("30390201013031300d060960864801650304020105000420")
_CERTIFICATE = bytes.fromhex("0101ff")


def versions() -> dict[str, str]:
    """Returns the versions that a document of this package records."""
    return {
        "package": __version__,
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def now() -> str:
    """Returns the UTC time, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def secret_commitment(secret: bytes) -> str:
    """Returns a value, 64 hexadecimal digits, that binds to an owner secret and shows nothing of one that cannot be guessed.

    HKDF-SHA256 under a label of its own, so it is independent of the keys that are drawn from the same secret.

    Raises:
        ValueError: If the secret is empty.
    """
    if not secret:
        raise ValueError("The owner secret is empty; there is nothing to commit to.")
    label = b"meadef_lightning secret commitment 1"
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=label).derive(secret).hex()


def repeat_draw(key: WatermarkKey, secret: bytes, beacon: str) -> None:
    """Repeats the draw of a key, of which its file only says that there was one.

    By itself this shows no more than that the key was made by drawing: who tries secrets until one gives the key that he wants can repeat
    that draw, too. What rules it out is a commitment to the secret from before the beacon existed.

    Args:
        key: The key.
        secret: The owner secret, shown to the judge.
        beacon: The public value that the key was drawn with.

    Raises:
        EvidenceError: If the key is not what they give; the message shows neither.
    """
    if WatermarkKey.draw(key.num_classes, secret, beacon, key.space) != key:
        raise EvidenceError(
            "The key was not drawn from this secret and beacon: "
            + ("its file claims a draw that cannot be repeated." if key.drawn_uniformly else "it was picked by hand.")
        )


def free_choices(key: WatermarkKey) -> tuple[str, ...]:
    """Says what the repeated draw of a key left to its owner: nothing where the key space is this package's own."""
    if key.space == DEFAULT_COMBINERS:
        return ()
    return (
        f"The {len(key.space)} ways of combining in the key's space are not this package's {len(DEFAULT_COMBINERS)}, and their choice and order "
        "decide what is drawn: whoever chose them after the beacon was known could try many. The draw was free of choice only if they, too, stood in what was "
        "published before.",
    )


def timestamp_request(document: bytes) -> bytes:
    """Returns the RFC 3161 request (DER) that asks an authority to stamp a document; it holds the document's SHA-256 only."""
    return _REQUEST + hashlib.sha256(document).digest() + _CERTIFICATE


@dataclass(frozen=True)
class Commitment:
    """A public promise.

    Args:
        created: UTC time, ISO 8601, as the owner's clock has it.
        key: ``commitment``, ``drawn_uniformly``, ``num_classes`` and ``space_size``; or null before the key is drawn.
        secret: ``commitment`` (:func:`secret_commitment`) and ``beacon``; or null.
        model: ``file`` (its name) and ``sha256`` of the model's specification; or null.
        data: ``verification`` and ``test``: fingerprints of the splits, as in the evidence; or null.
        versions: ``package``, ``torch``, ``lightning`` and ``python``.
        signer: The signer's Ed25519 public key, 64 hexadecimal digits; or null.
        document: The bytes of the file.
    """

    created: str
    key: Mapping[str, Any] | None
    secret: Mapping[str, Any] | None
    model: Mapping[str, Any] | None
    data: Mapping[str, Any] | None
    versions: Mapping[str, Any]
    signer: str | None
    document: bytes

    @classmethod
    def make(
        cls,
        key: WatermarkKey | None = None,
        *,
        secret: bytes | None = None,
        beacon: str = "",
        model: tuple[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        signing_key: Ed25519PrivateKey | None = None,
    ) -> Commitment:
        """Makes a commitment.

        Args:
            key: The key, or ``None`` before it is drawn.
            secret: The owner secret, which the commitment binds but does not hold.
            beacon: The public value that the key was drawn with.
            model: Name and SHA-256 of the file that specifies the model.
            data: Fingerprints of the splits ``verification`` and ``test``.
            signing_key: Signs the file.

        Raises:
            ValueError: If there is nothing to commit to, or the key was not drawn from this secret and beacon.
        """
        if key is None and secret is None:
            raise ValueError("There is nothing to commit to: give a key, a secret, or both.")
        content: dict[str, Any] = {
            "what": _WHAT,
            "schema_version": _SCHEMA,
            "created": now(),
            "key": None if key is None else _public(key),
            "secret": None if secret is None else {"commitment": secret_commitment(secret), "beacon": beacon},
            "model": None if model is None else {"file": model[0], "sha256": model[1]},
            "data": None if data is None else dict(data),
            "versions": versions(),
        }
        made = cls.parse(render(sign(content, signing_key)), "The commitment")
        if key is not None and secret is not None:
            made.check_draw(key, secret)
        return made

    @classmethod
    def parse(cls, document: bytes, name: str) -> Commitment:
        """Reads a commitment file, which may come from anybody, and checks its form and signature.

        Args:
            document: Its bytes.
            name: What messages call it.

        Raises:
            EvidenceError: If it is malformed or was changed; the message names the field.
        """
        content = parse(document, name)
        if content.get("what") != _WHAT or content.get("schema_version") != _SCHEMA:
            raise EvidenceError(f"{name} is not a commitment of schema version {_SCHEMA}.")
        if wrong := sorted(content.keys() ^ _FIELDS):
            raise EvidenceError(f"{name}: missing or unknown fields: {', '.join(map(ascii, wrong))[:300]}.")
        for field, fits in _FORM.items():
            if not fits(content[field]):
                raise EvidenceError(f"{name}: {field} is malformed.")
        signer = check_signature(content, name)
        fields = ("created", "key", "secret", "model", "data", "versions")
        return cls(**{field: content[field] for field in fields}, signer=signer, document=document)

    def check(self, key: WatermarkKey) -> None:
        """Checks that this commits to the key, and says nothing of it that is not so.

        Raises:
            EvidenceError: If it commits to another key or to none, or describes it otherwise; the message names the field.
        """
        if self.key is None or self.key["commitment"] != key.commitment():
            raise EvidenceError(
                f"key.commitment differs: the commitment of {self.created} is about "
                f"{'no key yet' if self.key is None else 'another key'}."
            )
        known = _public(key)
        if wrong := sorted(name for name in known if self.key[name] != known[name]):
            raise EvidenceError(
                f"key.{wrong[0]} differs: the commitment says something else of the key than the key itself."
            )

    def check_draw(self, key: WatermarkKey, secret: bytes) -> None:
        """Repeats the draw of a key from the secret and the beacon.

        Args:
            key: The key.
            secret: The owner secret, shown to the judge.

        Raises:
            EvidenceError: If the commitment names another secret or none, or the key is not what they give.
        """
        if self.secret is None or self.secret["commitment"] != secret_commitment(secret):
            raise EvidenceError(
                f"secret.commitment differs: the commitment is about {'no' if self.secret is None else 'another'} secret."
            )
        repeat_draw(key, secret, self.secret["beacon"])


def _public(key: WatermarkKey) -> dict[str, Any]:
    """What a commitment says of a key."""
    return {
        "commitment": key.commitment(),
        "drawn_uniformly": key.drawn_uniformly,
        "num_classes": key.num_classes,
        "space_size": KeySpace(key.num_classes, key.space).size,
    }


def _mapping(value: Any, names: set[str]) -> bool:
    return isinstance(value, dict) and value.keys() == names


def _text(value: object, most: int = 255) -> bool:
    return isinstance(value, str) and len(value) <= most


def _is_key(value: Any) -> bool:
    return value is None or (
        _mapping(value, {"commitment", "drawn_uniformly", "num_classes", "space_size"})
        and is_hex(value["commitment"])
        and type(value["drawn_uniformly"]) is bool
        and all(type(value[name]) is int and value[name] >= 3 for name in ("num_classes", "space_size"))
    )


def _is_secret(value: Any) -> bool:
    return value is None or (
        _mapping(value, {"commitment", "beacon"}) and is_hex(value["commitment"]) and _text(value["beacon"], 10_000)
    )


def _is_model(value: Any) -> bool:
    return value is None or (_mapping(value, {"file", "sha256"}) and _text(value["file"]) and is_hex(value["sha256"]))


def _is_data(value: Any) -> bool:
    return value is None or (_mapping(value, {"verification", "test"}) and all(map(is_hex, value.values())))


def _is_versions(value: Any) -> bool:
    return _mapping(value, {"package", "torch", "lightning", "python"}) and all(map(_text, value.values()))


_FORM = {
    "created": is_time,
    "key": _is_key,
    "secret": _is_secret,
    "model": _is_model,
    "data": _is_data,
    "versions": _is_versions,
}
