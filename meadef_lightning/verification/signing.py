"""Public documents: one byte form for each content, and Ed25519 signatures on it.

A document is JSON with sorted keys and two spaces of indentation. A reader refuses any other bytes of the same content, so that a
change of a single byte is a change of the document. The signature covers everything but itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meadef_lightning.verification.evidence_form import EvidenceError

MAX_DOCUMENT_BYTES = 1 << 20
_MAX_PRIVATE_BYTES = 1 << 16
_ALGORITHM = "Ed25519"


def render(content: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a document.

    Raises:
        ValueError: If the content is not JSON (NaN included).
    """
    try:
        return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, RecursionError) as error:
        raise ValueError(f"A document holds JSON values only: {error}.") from error


def parse(data: bytes, name: str) -> dict[str, Any]:
    """Reads a document, which may come from anybody.

    Args:
        data: Its bytes.
        name: What messages call it.

    Raises:
        EvidenceError: If it is too large, no JSON object, or not written in the one byte form.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise EvidenceError(f"{name} is larger than {MAX_DOCUMENT_BYTES} bytes; this is no file of ours.")
    try:
        content = json.loads(data.decode("ascii"))
        same = isinstance(content, dict) and render(content) == data
    except (ValueError, RecursionError):
        raise EvidenceError(
            f"{name} is not valid JSON in ASCII: it was changed, or is not what it is taken for."
        ) from None
    if not same:
        raise EvidenceError(f"{name} is not in the form in which this package writes it: its bytes were changed.")
    return dict(content)


def is_hex(value: object, digits: int = 64) -> bool:
    """Whether a value is a string of so many lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == digits and not set(value) - set("0123456789abcdef")


def sha256(data: bytes) -> str:
    """Returns the SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def public_hex(key: Ed25519PrivateKey) -> str:
    """Returns the public half of a signing key, 64 hexadecimal digits: what others know the signer by."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def sign(content: Mapping[str, Any], key: Ed25519PrivateKey | None) -> dict[str, Any]:
    """Returns the content with the fields ``signer`` and ``signature``, both null without a key."""
    signed = {**content, "signer": None if key is None else public_hex(key)}
    signature = None if key is None else {"algorithm": _ALGORITHM, "value": key.sign(render(signed)).hex()}
    return {**signed, "signature": signature}


def check_signature(content: Mapping[str, Any], name: str) -> str | None:
    """Checks what :func:`sign` made.

    Args:
        content: The document.
        name: What messages call it.

    Returns:
        The signer's public key, 64 hexadecimal digits, or ``None`` where the document is unsigned.

    Raises:
        EvidenceError: If the signature is missing, malformed, or of another content or signer.
    """
    signer, signature = content.get("signer"), content.get("signature")
    if signer is None and signature is None:
        return None
    if not is_hex(signer):
        raise EvidenceError(
            f"{name}: signer must be a public key of 64 hexadecimal digits, or null like the signature."
        )
    if (
        not isinstance(signature, dict)
        or set(signature) != {"algorithm", "value"}
        or signature["algorithm"] != _ALGORITHM
        or not is_hex(signature["value"], 128)
    ):
        raise EvidenceError(
            f"{name}: signature must hold the algorithm {_ALGORITHM} and a value of 128 hexadecimal digits."
        )
    signed = {field: value for field, value in content.items() if field != "signature"}
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(signer))).verify(
            bytes.fromhex(signature["value"]), render(signed)
        )
    except (InvalidSignature, ValueError):
        raise EvidenceError(
            f"{name}: its {_ALGORITHM} signature does not fit: a field, the signer or the signature was changed."
        ) from None
    return str(signer)


def make_signing_key(path: str | Path) -> str:
    """Makes a signing key and writes its private half (PEM, PKCS #8), readable by its owner only (mode 0600).

    Args:
        path: A file that must not exist yet.

    Returns:
        The public half.

    Raises:
        OSError: If the file exists or cannot be written.
    """
    path, key = Path(path), Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # created with its final permissions: at no moment readable by others
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise FileExistsError(
            f"{path} exists already, and a signing key is never overwritten: choose another path, or use the key that is there."
        ) from error
    return public_hex(key)


def load_signing_key(path: str | Path) -> Ed25519PrivateKey:
    """Reads a private signing key.

    Raises:
        ValueError: If it is missing, readable by others, or no unencrypted Ed25519 key in PEM; never shows its content.
    """
    data = read_private(path, "signing key")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        key = None  # the error is not passed on: it may show the content
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} is not an unencrypted Ed25519 key in PEM. Make one with meadef key sign-key.")
    return key


def read_private(path: str | Path, what: str) -> bytes:
    """Reads a small secret file that must be readable by its owner only.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        ValueError: If it is missing, too large, or (where the system knows such permissions) readable by others.
    """
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_PRIVATE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"Cannot read the {what} {path}: {error.strerror}.") from error
    if os.name == "posix" and stat.S_ISREG(mode) and mode & 0o077:
        raise ValueError(f"The {what} {path} can be read by others than its owner. Run: chmod 600 {path}")
    if len(data) > _MAX_PRIVATE_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_PRIVATE_BYTES} bytes; this is no {what}.")
    return data
