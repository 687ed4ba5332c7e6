"""Answers that only the key's holder can read, and seals that only he can make."""

import base64
import dataclasses
import hashlib
import hmac
import json
import zlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from verification_fakes import KEY

from meadef_lightning.verification import EvidenceError
from meadef_lightning.verification.sealing import hide, reveal, seals

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))  # fmt: skip


def cipher():
    """By hand, from the salt."""
    derived = HKDF(SHA256(), 64, None, b"meadef_lightning evidence 5 answers").derive(KEY.salt.encode())
    return AESSIV(derived), [KEY.commitment().encode()]


@given(st.dictionaries(st.text(), VALUES))
def test_what_is_hidden_is_revealed(content):
    hidden = hide(content, KEY)
    assert reveal(hidden, KEY, 1 << 20) == content
    assert hide(content, KEY) == hidden
    aead, bound = cipher()
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    assert zlib.decompress(aead.decrypt(base64.b64decode(hidden), bound)) == text


def test_every_changed_byte_and_every_other_key_is_refused():
    hidden = hide({"trigger": [3, 3, 3]}, KEY)
    raw = base64.b64decode(hidden)
    wrong = [base64.b64encode(bytes([*raw[:i], raw[i] ^ 1, *raw[i + 1 :]])).decode() for i in range(len(raw))]
    for text in (*wrong, "", "AAAA", "?", hidden[:-4], hidden + "AAAA", "\u0394" * 8):
        with pytest.raises(EvidenceError, match="cannot be decrypted"):
            reveal(text, KEY, 1 << 20)
    for key in (dataclasses.replace(KEY, salt="0" * 32), dataclasses.replace(KEY, seed=KEY.seed + 1)):
        with pytest.raises(EvidenceError, match="cannot be decrypted"):
            reveal(hidden, key, 1 << 20)


def test_a_liar_who_holds_the_key_gets_no_further_than_his_content():
    aead, bound = cipher()

    def forged(packed):
        return base64.b64encode(aead.encrypt(packed, bound)).decode()

    bomb = zlib.compress(b" " * (50 << 20), 9)
    for packed, message in (
        (bomb, "more than 1000 bytes"),
        (b"no zlib", "not valid JSON"),
        (zlib.compress(b"{"), "not valid JSON"),
        (zlib.compress(b"[" * 100_000)[:-5], "more than 1000 bytes"),
        (zlib.compress(b"[" * 900), "not valid JSON"),
        (zlib.compress(b'{"a": NaN}'), "not valid JSON"),
        (zlib.compress(b'{"a": 1, "a": 2}'), "two members"),
        (zlib.compress(b"\xff"), "not valid JSON"),
    ):
        with pytest.raises(EvidenceError, match=message):
            reveal(forged(packed), KEY, 1000)


def test_seals_are_an_hmac_of_every_field():
    """By hand, from the salt and the canonical JSON of path and value."""
    made = seals({"a": {"b": [1, None]}, "c": "x"}, KEY)
    secret = f"meadef_lightning evidence 5 {KEY.salt}".encode()
    for path, value in (("a.b", [1, None]), ("c", "x")):
        text = json.dumps([path, value], separators=(",", ":")).encode()
        assert made[path] == hmac.new(secret, text, hashlib.sha256).hexdigest()
    assert made.keys() == {"a.b", "c"}
    assert seals({"c": "x"}, dataclasses.replace(KEY, salt="0" * 32))["c"] != made["c"]
