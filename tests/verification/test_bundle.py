"""Bundles, whole, tampered with and hostile: what is changed is named, and nothing of a stranger's is executed."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import stat
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verification_fakes import KEY, FakeData, Thief

from meadef_lightning.verification import EvidenceError, verify
from meadef_lightning.verification import parcel as module
from meadef_lightning.verification.bundle import Bundle
from meadef_lightning.verification.commitment import Commitment, timestamp_request
from meadef_lightning.verification.parcel import COMMITMENT, EVIDENCE, MANIFEST, TIMESTAMP, pack, unpack
from meadef_lightning.verification.parcel import KEY as KEY_FILE
from meadef_lightning.verification.sealing import seals
from meadef_lightning.verification.signing import load_signing_key, make_signing_key, public_hex, render, sign

SECRET = b"an owner secret"
QUICK = {"samples": 12, "decoy_samples": 2, "decoys": 30, "accelerator": "cpu"}
FILES = (MANIFEST, EVIDENCE, COMMITMENT, TIMESTAMP, KEY_FILE)


class OtherData(FakeData):
    """The judge's own images."""

    def tensors(self, split):
        x, y = super().tensors(split)
        return x + 0.01, y


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A judged thief: its evidence, a commitment made before, and a signing key."""
    folder = tmp_path_factory.mktemp("parts")
    make_signing_key(folder / "signing.pem")
    signing_key = load_signing_key(folder / "signing.pem")
    commitment = Commitment.make(KEY, secret=SECRET, signing_key=signing_key)
    verdict, _ = verify(Thief(KEY), KEY, FakeData(), evidence_path=folder / "evidence.json", alpha=0.05, **QUICK)
    return {
        "evidence": (folder / "evidence.json").read_bytes(),
        "commitment": commitment.document,
        "signing_key": signing_key,
        "verdict": verdict,
    }


@pytest.fixture(scope="module")
def full(parts):
    """Everything that a bundle can hold."""
    return Bundle.make(
        parts["evidence"], KEY, command="meadef verify --key watermark.key.json", commitment=parts["commitment"],
        timestamp=b"\x30token" + timestamp_request(parts["commitment"]), data=FakeData(), disclose_key=True,
        signing_key=parts["signing_key"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(parts):
    """The least: evidence alone, unsigned."""
    return Bundle.make(parts["evidence"], KEY)


def test_a_bundle_gives_the_verdict_again(parts, full, plain, tmp_path):
    for name in ("directory", "bundle.zip"):
        loaded = Bundle.load(full.save(tmp_path / name))
        assert loaded.files == full.files
        findings = loaded.check(signer=public_hex(parts["signing_key"]), secret=SECRET, data=FakeData())
        assert findings.verdict == parts["verdict"]
        assert findings.signer == public_hex(parts["signing_key"])
        assert any("made again from key and data, fit their hashes" in note for note in findings.notes)
        assert any("committed secret and beacon" in note for note in findings.notes)
        assert not any("owner's word" in note for note in findings.notes)
        assert any("Its signature was not checked" in note for note in findings.notes)
    assert Bundle.load(plain.save(tmp_path / "plain.zip")).check(KEY).verdict == parts["verdict"]
    findings = plain.check()
    assert findings.verdict is None
    assert any("only accidental damage" in note for note in findings.notes)
    assert any("no commitment" in note for note in findings.notes)
    assert any("That the key was drawn is its owner's word" in note for note in findings.notes)


def test_only_a_bundle_with_the_key_is_private(full, plain, tmp_path):
    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    for name in ("directory", "bundle.zip"):
        path = full.save(tmp_path / "full" / name)
        assert mode(path) & 0o077 == 0
        assert mode(plain.save(tmp_path / "plain" / name)) & 0o044
    assert mode(tmp_path / "full" / "directory" / KEY_FILE) == 0o600
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"directory", "bundle.zip"}
    with pytest.raises(OSError, match="exists already, and evidence is never overwritten"):
        plain.save(tmp_path / "plain" / "bundle.zip")


def test_a_bundle_without_disclosure_shows_nothing_of_the_key(parts, tmp_path):
    signed = {"commitment": parts["commitment"], "signing_key": parts["signing_key"]}
    bundle = Bundle.make(parts["evidence"], KEY, data=FakeData(), **signed)
    content = pack(bundle.files)
    assert KEY.salt.encode() not in content
    assert SECRET not in content
    assert KEY_FILE not in bundle.files
    assert b"source_classes" not in content
    # two keys' questions have unrelated hashes even where the samples are the same
    questions = json.loads(bundle.files[MANIFEST])["questions"]
    other = dataclasses.replace(KEY, salt="7" * 32)
    path = tmp_path / "evidence.json"
    verify(Thief(other), other, FakeData(), evidence_path=path, **QUICK)
    again = json.loads(Bundle.make(path.read_bytes(), other, data=FakeData()).files[MANIFEST])["questions"]
    assert not set(questions.values()) & set(again.values())


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_any_flipped_bit_of_any_file_is_named(full, plain, data):
    bundle, name = data.draw(st.sampled_from([(full, name) for name in FILES] + [(plain, MANIFEST), (plain, EVIDENCE)]))
    content = bytearray(bundle.files[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(EvidenceError) as caught:
        Bundle({**bundle.files, name: bytes(content)}).check(KEY)
    # a changed manifest is named, or the field that it holds
    assert name in str(caught.value) or (name == MANIFEST and "manifest." in str(caught.value))


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_any_flipped_bit_of_a_zip_file_is_named_or_refused(full, plain, data):
    bundle = data.draw(st.sampled_from([full, plain]))
    content = bytearray(pack(bundle.files))
    # the headers are a small part of the file, and where a reader is fooled: half of the draws go there
    headers = [
        m for mark in (b"PK\3\4", b"PK\1\2", b"PK\5\6") for m in range(len(content)) if content.startswith(mark, m)
    ]
    place = data.draw(
        st.one_of(
            st.integers(0, len(content) - 1),
            st.builds(
                lambda start, offset: min(start + offset, len(content) - 1),
                st.sampled_from(headers),
                st.integers(0, 60),
            ),
        )
    )
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(EvidenceError) as caught:
        Bundle(unpack(bytes(content))).check(KEY)
    assert any(name in str(caught.value) for name in FILES) or "zip file" in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.sampled_from(FILES))
def test_garbage_is_refused(full, garbage, name):
    with pytest.raises(EvidenceError):
        Bundle({**full.files, name: garbage}).check(KEY)
    with pytest.raises(EvidenceError):
        Bundle(unpack(garbage)).check(KEY)


def resigned(bundle, signing_key, change):
    """What somebody without the watermark key can do: change the manifest, and sign it anew."""
    content = json.loads(bundle.files[MANIFEST])
    content.pop("signature")
    change(content)
    return Bundle({**bundle.files, MANIFEST: render(sign(content, signing_key))})


def test_a_signature_cannot_be_replaced_or_taken_off(full, parts, tmp_path):
    make_signing_key(tmp_path / "thief.pem")
    thief = load_signing_key(tmp_path / "thief.pem")
    for key in (thief, None):
        forged = resigned(full, key, lambda content: None)
        with pytest.raises(EvidenceError, match=r"Fields that differ: manifest\.signer"):
            forged.check(KEY)
        undisclosed = Bundle({name: content for name, content in forged.files.items() if name != KEY_FILE})
        undisclosed = resigned(undisclosed, key, lambda content: content["files"].pop(KEY_FILE))
        with pytest.raises(EvidenceError, match=r"signer differs between watermark\.commitment\.json and manifest"):
            undisclosed.check()
        with pytest.raises(EvidenceError, match="signer differs: it was signed by"):
            undisclosed.check(signer=public_hex(parts["signing_key"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("command", "rm"), ("created", "1999"), ("seed", 1), ("questions", None), ("versions", {}), ("key", "0" * 64)],
)
def test_a_changed_field_of_the_manifest_is_named(full, parts, field, value):
    forged = resigned(full, parts["signing_key"], lambda content: content.update({field: value}))
    with pytest.raises(EvidenceError, match=rf"manifest\.{field}|key\.commitment differs"):
        forged.check(KEY)


def test_another_key_commitment_secret_or_data_is_refused(full, plain, parts):
    another = dataclasses.replace(KEY, seed=KEY.seed + 1)
    with pytest.raises(EvidenceError, match="another key than the one given"):
        full.check(another)
    with pytest.raises(EvidenceError, match=r"key\.commitment differs"):
        plain.check(another)
    with pytest.raises(EvidenceError, match=r"secret\.commitment differs"):
        full.check(KEY, secret=b"another secret of the owner")
    with pytest.raises(EvidenceError, match="nothing to compare the secret with"):
        plain.check(KEY, secret=SECRET)
    with pytest.raises(EvidenceError, match=r"key\.commitment differs between watermark\.commitment"):
        Bundle.make(parts["evidence"], KEY, commitment=Commitment.make(another).document)
    signed = {"commitment": parts["commitment"], "signing_key": parts["signing_key"]}
    with pytest.raises(EvidenceError, match=r"does not stamp this"):
        Bundle.make(parts["evidence"], KEY, timestamp=b"another token", **signed)
    with pytest.raises(EvidenceError, match=r"data\.verification differs"):
        Bundle.make(parts["evidence"], KEY, data=OtherData())
    assert any("not what the verification used" in note for note in full.check(data=OtherData()).notes)


def test_a_liar_with_the_key_cannot_claim_other_triggers(full, parts):
    """Whoever holds the key can seal and sign what they like, but not make other images hash alike."""
    content = json.loads(full.files[MANIFEST])
    content["questions"]["trigger"] = "0" * 64
    content = {name: value for name, value in content.items() if name not in ("seal", "signature")}
    content["seal"] = seals({"manifest": content}, KEY)
    lie = Bundle({**full.files, MANIFEST: render(sign(content, parts["signing_key"]))})
    assert lie.check(KEY).verdict == parts["verdict"]  # nothing else is wrong with it
    with pytest.raises(EvidenceError, match=r"differ from those hashed: questions\.trigger\.$"):
        lie.check(KEY, data=FakeData())


# ---- hostile parcels


def zipped(*members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: zipped(("../evidence.json", "{}")), r"'\.\./evidence\.json' is not part of a bundle"),
        (lambda: zipped(("/etc/passwd", "{}")), "'/etc/passwd' is not part"),
        (lambda: zipped(("a\\b\x1b[2J", "{}")), "is not part"),
        (lambda: zipped(("model.pkl", pickle.dumps(print))), r"'model\.pkl' is not part"),
        (lambda: zipped((EVIDENCE, b"0" * 10**6), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (lambda: zipped((MANIFEST, b"0" * (1 << 20)), (MANIFEST, "{}")), "twice"),
        (lambda: zipped((MANIFEST, b"0" * ((1 << 20) + 1))), "larger than 1048576"),
        (lambda: zipped((MANIFEST, "{}")), "changed outside of its files"),
        (lambda: b"#!/bin/sh\n" + pack({MANIFEST: b"{}"}), "changed outside of its files"),
        (lambda: pack({MANIFEST: b"{}"}) + b"more", "zip file"),
        (lambda: b"PK\3\4", "not a readable zip file"),
        (lambda: pickle.dumps({"a": 1}), "not a readable zip file"),
        (lambda: b"", "not a readable zip file"),
        (lambda: pack({}), r"manifest\.json is missing"),
        (lambda: zipped(*((f"{i}", "") for i in range(200))), "short list of members"),
        (lambda: pack({MANIFEST: b"{}"})[:-22], "short list of members"),
        (lambda: pack({MANIFEST: pickle.dumps(print)}), "not valid JSON"),
        (lambda: pack({MANIFEST: b"[" * 100_000}), "not valid JSON"),
        (lambda: pack({MANIFEST: b'{"a": NaN}\n'}), "not valid JSON"),
        (lambda: pack({MANIFEST: b"[]\n"}), "not in the form"),
        (lambda: pack({MANIFEST: render({"what": 1})}), "missing or unknown fields"),
    ],
)
def test_hostile_zip_files_are_refused(content, message, tmp_path):
    path = tmp_path / "in" / "bundle.zip"
    path.parent.mkdir()
    path.write_bytes(content())
    with pytest.raises(EvidenceError, match=message) as caught:
        Bundle.load(path).check(KEY)
    assert "\x1b" not in str(caught.value)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["in", "bundle.zip"]  # nothing was extracted


def test_hostile_directories_are_refused(full, tmp_path, monkeypatch):
    def saved(name):
        return full.save(tmp_path / name)

    outside = tmp_path / "outside"
    outside.write_text("secret of the judge")
    link = saved("link")
    (link / EVIDENCE).unlink()
    (link / EVIDENCE).symlink_to(outside)
    with pytest.raises(EvidenceError, match=r"evidence\.json is not a regular file"):
        Bundle.load(link)
    pipe = saved("pipe")
    (pipe / KEY_FILE).unlink()
    os.mkfifo(pipe / KEY_FILE)
    with pytest.raises(EvidenceError, match=r"watermark\.key\.json is not a regular file"):
        Bundle.load(pipe)
    with pytest.raises(EvidenceError, match="There is no bundle"):
        Bundle.load(pipe / KEY_FILE)
    more = saved("more")
    (more / "sitecustomize.py").write_text("raise SystemExit")
    with pytest.raises(EvidenceError, match=r"'sitecustomize\.py' is not part"):
        Bundle.load(more)
    less = saved("less")
    (less / EVIDENCE).unlink()
    with pytest.raises(EvidenceError, match=r"'evidence\.json' is listed in manifest\.json, but missing"):
        Bundle.load(less).check()
    large = saved("large")
    monkeypatch.setitem(module.MEMBERS, EVIDENCE, 100)
    with pytest.raises(EvidenceError, match=r"evidence\.json is larger than 100 bytes"):
        Bundle.load(large)
    monkeypatch.setattr(module, "MAX_BUNDLE_BYTES", 100)
    with pytest.raises(EvidenceError, match="larger than 100 bytes"):
        Bundle.load(full.save(tmp_path / "large.zip"))
    with pytest.raises(EvidenceError, match="There is no bundle"):
        Bundle.load(tmp_path / "nowhere")


def test_a_hostile_disclosed_key_imports_nothing(parts, full, tmp_path, monkeypatch):
    (tmp_path / "evil_module_of_a_bundle.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    for key in (b"{}", b"\x80", b"[" * 100_000, json.dumps({**KEY.to_dict(), "combiner": {"class_path": "evil_module_of_a_bundle.X"}}).encode()):  # fmt: skip
        content = {**full.files, KEY_FILE: key}
        bundle = resigned(
            Bundle(content), parts["signing_key"], lambda c, key=key: c["files"].update({KEY_FILE: hashlib.sha256(key).hexdigest()})
        )  # fmt: skip
        with pytest.raises(EvidenceError, match=r"watermark\.key\.json|key\.commitment") as caught:
            bundle.check()
        assert KEY.salt not in str(caught.value)
