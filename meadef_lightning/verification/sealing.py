"""What only the holder of a key can do to a document about it: read the answers in it, and seal fields against change.

Raw answers would name the target (it is what most triggers get), and a table of cells would let anyone look up the key with the published
statistic. So they are encrypted under a key that is derived from the watermark key's salt: AES-SIV (RFC 5297), which is authenticated and
deterministic, so that two runs of one verification write the same. A seal is an HMAC under that salt: whoever does not hold the key cannot
change a field unnoticed.

**Pitfalls.** Whoever can ask the suspect without limit needs no answers of ours: he may try all keys of the public key space on it himself.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import zlib
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meadef_lightning.verification.evidence_form import SCHEMA_VERSION, EvidenceError, finite, unique
from meadef_lightning.watermark.key import WatermarkKey


def canonical(value: object) -> bytes:
    """Returns the one JSON text of a value; raises ``ValueError`` on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seals(content: Mapping[str, Any], key: WatermarkKey) -> dict[str, str]:
    """Returns an HMAC of each field, one level deep, so that a change can be named.

    Args:
        content: The fields: JSON values, or mappings of such.
        key: The key, whose salt is the secret.
    """
    leaves: dict[str, Any] = {}
    for name, section in content.items():
        parts = section.items() if isinstance(section, Mapping) else [("", section)]
        leaves |= {f"{name}.{part}".rstrip("."): value for part, value in parts}
    secret = f"meadef_lightning evidence {SCHEMA_VERSION} {key.salt}".encode()
    return {
        path: hmac.new(secret, canonical([path, value]), hashlib.sha256).hexdigest()
        for path, value in sorted(leaves.items())
    }


def _cipher(key: WatermarkKey) -> AESSIV:
    derived = HKDF(SHA256(), 64, None, f"meadef_lightning evidence {SCHEMA_VERSION} answers".encode())
    return AESSIV(derived.derive(key.salt.encode()))


def hide(content: Mapping[str, Any], key: WatermarkKey) -> str:
    """Encrypts JSON values for the holder of a key.

    Args:
        content: The values.
        key: The key, whose salt is the secret and whose commitment is bound to them.

    Returns:
        Base64 of the compressed content's ciphertext; the same for the same content.

    Raises:
        ValueError: If there is NaN or infinity in it.
    """
    sealed = _cipher(key).encrypt(zlib.compress(canonical(content), 9), [key.commitment().encode()])
    return base64.b64encode(sealed).decode()


def reveal(hidden: str, key: WatermarkKey, most: int) -> Any:
    """Undoes :func:`hide`.

    Args:
        hidden: What it returned, or a stranger's text.
        key: The key.
        most: Bytes of content that are read at most.

    Raises:
        EvidenceError: If it was encrypted under another key, or changed, or holds more, or no JSON values.
    """
    try:
        packed = _cipher(key).decrypt(base64.b64decode(hidden, validate=True), [key.commitment().encode()])
    except (InvalidTag, binascii.Error, ValueError):
        raise EvidenceError("answers cannot be decrypted: they were changed, or are about another key.") from None
    # who holds the key may still be dishonest
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(packed, most)
        if not unpacking.eof:
            raise EvidenceError(f"answers hold more than {most} bytes; this is not evidence of ours.")
        return json.loads(text.decode(), parse_float=finite, parse_constant=finite, object_pairs_hook=unique)
    except (zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, EvidenceError):
            raise
        raise EvidenceError(f"answers are not valid JSON values ({error}).") from error
