"""``meadef key`` and ``meadef evidence`` as a user types them; where the secret and the salt may be, and where never."""

import base64
import getpass
import json
import logging
import re
import shutil
import stat
import subprocess
import sys
import traceback

import pytest
import torch
import yaml
from cryptography.hazmat.primitives import serialization

from meadef_lightning.cli import main
from meadef_lightning.data import DigitsDataModule
from meadef_lightning.verification import EvidenceError
from meadef_lightning.verification.commitment import Commitment, secret_commitment, timestamp_request
from meadef_lightning.verification.fingerprints import tensors_fingerprint
from meadef_lightning.verification.signing import check_signature, load_signing_key, parse, render, sign
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import DigitsCNN
from meadef_lightning.watermark import WatermarkKey, default_combiners

SECRET = "zebra-quartz-8363-7457-vexing"  # noqa: S105  (of these tests)
BEACON = "block 1234567: 00ab"
SMALL = ["--verification.samples", "60", "--verification.decoys", "99", "--verification.decoy_samples", "4"]
DIGITS = ["--data", "DigitsDataModule"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWNER", SECRET)
    return tmp_path


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return str(stop.value.code) + capsys.readouterr().err


def draw(*more):
    main(["key", "draw", "--classes", "10", "--secret-env", "OWNER", *more])
    return WatermarkKey.load("watermark.key.json")


def checkpoint(path):
    """An innocent, untrained suspect as LightningCLI leaves it."""
    (path / "checkpoints").mkdir(parents=True)
    network = {"class_path": "meadef_lightning.victims.networks.DigitsCNN"}
    config = {"model": {"class_path": "meadef_lightning.victims.SupervisedVictim", "init_args": {"network": network}}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    model = SupervisedVictim(DigitsCNN, num_classes=10, in_channels=1)
    model.configure_model()
    torch.save({"state_dict": model.state_dict()}, path / "checkpoints" / "model.ckpt")


# ---- draw


def test_draw_from_environment_file_and_terminal_alike(folder, monkeypatch, capsys):
    key = draw("--beacon", BEACON)
    assert key == WatermarkKey.draw(10, SECRET, BEACON)
    assert stat.S_IMODE((folder / "watermark.key.json").stat().st_mode) == 0o600
    text = capsys.readouterr().out
    assert key.commitment() in text
    assert secret_commitment(SECRET.encode()) in text

    secret = folder / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    base = ["key", "draw", "--classes", "10", "--beacon", BEACON]
    main([*base, "--secret-file", "secret", "--output", "file.json"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: SECRET)
    main([*base, "--output", "terminal.json"])
    assert WatermarkKey.load("file.json") == WatermarkKey.load("terminal.json") == key

    typed = iter([SECRET, SECRET + "x"])
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(typed))
    assert "two inputs differ" in fails([*base, "--output", "no.json"], capsys)
    secret.chmod(0o644)
    assert "chmod 600" in fails([*base, "--secret-file", "secret", "--output", "no.json"], capsys)
    assert not (folder / "no.json").exists()


def test_draw_without_some_ways(folder, capsys):
    key = draw("--beacon", BEACON, "--without", "PixelBlend", "Donut")
    assert key == WatermarkKey.draw(10, SECRET, BEACON, default_combiners(["PixelBlend", "Donut"]))
    assert "4320 keys, 6 ways" in capsys.readouterr().out  # 10 · 9 · 8 · 6
    main(["key", "check", "watermark.key.json", "--secret-env", "OWNER", "--beacon", BEACON])
    assert "are not this package's 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--secret", SECRET], "must not stand on the command line.*--secret-env NAME"),
        ([f"--secret={SECRET}"], "must not stand on the command line.*--secret-file FILE"),
        ([SECRET], "does not know 1 of these words"),
        (["--secret-env", SECRET], "variable that --secret-env names is not set"),
        (["--secret-env", "SHORT"], "shorter than 16 bytes.*token_hex"),
        (["--secret-env", "EMPTY"], "not set, or empty"),
        (["--secret-file", "nowhere"], "Cannot read the secret file nowhere"),
        (["--secret-env", "OWNER", "--classes", "2"], "at least 3"),
        (["--secret-env", "OWNER", "--without", "Blend"], "can be left out are .*'PixelBlend'"),
        ([], "no terminal to ask on.*--secret-env"),
    ],
)
def test_draw_mistakes_are_explained_without_the_secret(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.setenv("SHORT", SECRET[:15])
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    text = fails(["key", "draw", "--classes", "10", *arguments], capsys)
    assert re.search(message, text), text
    assert SECRET[:15] not in text
    assert not list(folder.iterdir())


def test_nothing_is_overwritten(folder, capsys):
    draw()
    before = (folder / "watermark.key.json").read_bytes()
    command = ["key", "draw", "--classes", "10", "--secret-env", "OWNER", "--beacon", "other"]
    assert "watermark.key.json exists already" in fails(command, capsys)
    assert (folder / "watermark.key.json").read_bytes() == before
    main(["key", "commit", "--key", "watermark.key.json"])
    assert "exists already" in fails(["key", "commit", "--key", "watermark.key.json"], capsys)
    main(["key", "sign-key"])
    assert "never overwritten" in fails(["key", "sign-key"], capsys)


# ---- show


def test_show_tells_public_facts_and_the_rest_only_after_a_warning(folder, capsys):
    key = WatermarkKey((7, 3), 5, 10, salt="deadbeefcafe4711" * 2)
    key.save("k.json")
    main(["key", "show", "k.json"])
    shown = capsys.readouterr()
    assert key.commitment() in shown.out
    assert "5760 keys, 8 ways" in shown.out
    assert "picked by hand" in shown.out
    for hidden in ("7, 3", "CropPaste", "target", "deadbeefcafe4711"):
        assert hidden not in shown.out + shown.err
    main(["key", "show", "k.json", "--reveal"])
    shown = capsys.readouterr()
    assert "source classes     7, 3\ntarget class       5\n" in shown.out
    assert "Warning: what follows is the secret" in shown.err
    assert "deadbeefcafe4711" not in shown.out + shown.err
    (folder / "k.json").chmod(0o644)
    main(["key", "show", "k.json"])
    assert "chmod 600" in capsys.readouterr().err


# ---- commit


def test_commit_binds_key_secret_model_and_data(folder):
    key = draw("--beacon", BEACON)
    (folder / "model.yaml").write_text("model: mine\n")
    main(["key", "sign-key", "--output", "signing.pem"])
    main(
        ["key", "commit", "--key", "watermark.key.json", "--secret-env", "OWNER", "--beacon", BEACON, "--model", "model.yaml",
         "--signing-key", "signing.pem", *DIGITS]
    )  # fmt: skip
    document = (folder / "watermark.commitment.json").read_bytes()
    commitment = Commitment.parse(document, "it")
    commitment.check(key)
    commitment.check_draw(key, SECRET.encode())
    assert commitment.key == {
        "commitment": key.commitment(), "drawn_uniformly": True, "num_classes": 10, "space_size": 5760
    }  # fmt: skip
    model = subprocess.run(["sha256sum", "model.yaml"], capture_output=True, text=True, check=True).stdout.split()[0]
    assert commitment.model == {"file": "model.yaml", "sha256": model}
    assert commitment.data["test"] == tensors_fingerprint(*DigitsDataModule().tensors("test"))
    # the signature, against the library alone: everything but itself, in the one byte form
    content = json.loads(document)
    value = bytes.fromhex(content.pop("signature")["value"])
    signed = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    private = serialization.load_pem_private_key((folder / "signing.pem").read_bytes(), None)
    private.public_key().verify(value, signed)
    with pytest.raises(EvidenceError, match="about another key"):
        commitment.check(WatermarkKey.draw(10, SECRET))
    with pytest.raises(EvidenceError, match="another secret"):
        commitment.check_draw(key, b"another")


def test_a_commitment_to_the_secret_alone_comes_before_the_beacon(folder, capsys):
    main(["key", "commit", "--secret-env", "OWNER", "--output", "before.json"])
    before = Commitment.parse((folder / "before.json").read_bytes(), "it")
    assert before.key is None
    assert before.secret == {"commitment": secret_commitment(SECRET.encode()), "beacon": ""}
    draw("--beacon", BEACON)
    ground = ["key", "commit", "--key", "watermark.key.json", "--secret-env", "OWNER", "--beacon", "another beacon"]
    assert "not drawn from this secret and beacon" in fails(ground, capsys)
    assert "nothing to commit to" in fails(["key", "commit"], capsys)
    assert "no model specification none.yaml" in fails([*ground[:4], "--model", "none.yaml"], capsys)


def test_a_malformed_or_forged_commitment_is_named():
    document = Commitment.make(WatermarkKey.draw(10, SECRET)).document
    content = json.loads(document)
    for field, value in [
        ("key", {}),
        ("data", {"test": 3}),
        ("model", []),
        ("secret", 1),
        ("versions", None),
        ("created", 3),
    ]:
        with pytest.raises(EvidenceError, match=f"the file: {field} is malformed"):
            Commitment.parse(render({**content, field: value}), "the file")
    with pytest.raises(EvidenceError, match="unknown fields: 'more'"):
        Commitment.parse(render({**content, "more": 1}), "the file")
    with pytest.raises(EvidenceError, match="not in the form"):
        Commitment.parse(document.replace(b"  ", b" "), "the file")
    with pytest.raises(EvidenceError, match="signer must be a public key"):
        Commitment.parse(render({**content, "signature": {"algorithm": "none", "value": ""}}), "the file")
    with pytest.raises(EvidenceError, match="signature must hold the algorithm Ed25519"):
        Commitment.parse(render({**content, "signer": "0" * 64}), "the file")


def test_signing_keys(folder, capsys):
    main(["key", "sign-key", "--output", "signing.pem"])
    key = load_signing_key("signing.pem")
    assert stat.S_IMODE((folder / "signing.pem").stat().st_mode) == 0o600
    document = sign({"a": 1}, key)
    assert check_signature(document, "it") in capsys.readouterr().out
    for field, value in [("a", 2), ("more", 1), ("signer", "0" * 64)]:
        with pytest.raises(EvidenceError, match="signature does not fit"):
            check_signature({**document, field: value}, "it")
    (folder / "signing.pem").chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        load_signing_key("signing.pem")
    (folder / "bad.pem").write_text("-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n")
    (folder / "bad.pem").chmod(0o600)
    with pytest.raises(ValueError, match="not an unencrypted Ed25519 key") as caught:
        load_signing_key("bad.pem")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert parse(render({"a": [1, "ü"]}), "it") == {"a": [1, "ü"]}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="OpenSSL is the independent time-stamping authority")
def test_openssl_reads_the_time_stamp_request_and_its_answer_is_accepted(folder):
    def openssl(*arguments):
        return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout

    key = draw()
    main(["key", "commit", "--key", "watermark.key.json"])
    document = (folder / "watermark.commitment.json").read_bytes()
    openssl("ts", "-query", "-data", "watermark.commitment.json", "-sha256", "-cert", "-no_nonce", "-out", "their.tsq")
    assert (folder / "their.tsq").read_bytes() == timestamp_request(document)
    assert (folder / "watermark.commitment.tsq").read_bytes() == timestamp_request(document)
    (folder / "tsa.cnf").write_text(
        "[tsa]\ndefault_tsa=t\n[t]\nserial=serial\nsigner_digest=sha256\ndefault_policy=1.2.3\ndigests=sha256\n"
        "[req]\ndistinguished_name=n\n[n]\n"
    )
    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "tsa.key", "-out", "tsa.pem", "-subj", "/CN=tsa", "-config",
        "tsa.cnf", "-addext", "extendedKeyUsage=critical,timeStamping",
    )  # fmt: skip
    answer = ["-signer", "tsa.pem", "-inkey", "tsa.key", "-out", "watermark.commitment.tsr"]
    openssl("ts", "-reply", "-config", "tsa.cnf", "-queryfile", "watermark.commitment.tsq", *answer)
    openssl(
        "ts", "-verify", "-data", "watermark.commitment.json", "-in", "watermark.commitment.tsr", "-CAfile", "tsa.pem"
    )
    assert timestamp_request(document)[-35:-3] in (folder / "watermark.commitment.tsr").read_bytes()
    assert key.salt not in document.decode()


# ---- the whole protocol


def test_the_secret_is_nowhere_and_the_judge_finds_the_same(folder, capfd, caplog, monkeypatch):
    """Draws, commits, judges, bundles, checks, makes mistakes; then every file and every output is searched."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MEADEF_DEBUG", "1")
    key = draw("--beacon", BEACON)
    main(["key", "sign-key", "--output", "signing.pem"])
    main(["key", "show", "watermark.key.json"])
    main(["key", "commit", "--key", "watermark.key.json", "--secret-env", "OWNER", "--beacon", BEACON, "--signing-key", "signing.pem"])  # fmt: skip
    checkpoint(folder / "suspect")
    verify = ["--suspect", "suspect", *DIGITS, *SMALL]
    main(["verify", "--key", "watermark.key.json", *verify, "--output", "judged"])
    bundle = ["evidence", "bundle", "judged", "--key", "watermark.key.json", "--commitment", "watermark.commitment.json", "--signing-key", "signing.pem"]  # fmt: skip
    main([*bundle, *DIGITS, "--output", "public.zip"])
    main([*bundle, "--disclose-key", "--output", "disclosed"])
    capfd.readouterr()

    main(["evidence", "check", "public.zip", "--key", "watermark.key.json", "--secret-env", "OWNER", *DIGITS])
    text = capfd.readouterr().out
    assert "made again from key and data, fit their hashes" in text
    assert "committed secret and beacon" in text
    verdict = json.loads((folder / "judged" / "verdict.json").read_text())
    assert f"Verdict of the evidence: {verdict['verdict']}. {verdict['reason']}" in text
    command = json.loads((folder / "disclosed" / "manifest.json").read_text())["command"]
    assert command.startswith("meadef verify --key watermark.key.json --suspect suspect --data DigitsDataModule")
    main(["evidence", "check", "judged/evidence.json", "--key", "watermark.key.json"])
    main(["evidence", "check", "public.zip"])
    assert "No key was given" in capfd.readouterr().out

    # the judge's own images: other splits of the digits
    own = ["--suspect", "suspect", *DIGITS, "--data.seed", "5", "--output", "recheck"]
    main(["evidence", "check", "disclosed", *own])
    text = capfd.readouterr().out
    again = json.loads((folder / "recheck" / "verdict.json").read_text())
    assert (again["samples"], again["decoys"]) == (verdict["samples"], verdict["decoys"])
    assert f"Verdict of asking again: {again['verdict']}" in text

    said = []
    for mistake in (
        ["key", "draw", "--classes", "10", "--secret", SECRET],
        ["key", "draw", "--classes", "10", SECRET],
        ["key", "draw", "--classes", "10", "--secret-env", "OWNER"],
        ["key", "commit", "--key", "signing.pem", "--output", "x.json"],
        ["key", "commit", "--key", "watermark.key.json", "--signing-key", "watermark.key.json", "--output", "x.json"],
        [
            "key",
            "commit",
            "--key",
            "watermark.key.json",
            "--secret-env",
            "OWNER",
            "--beacon",
            "no",
            "--output",
            "x.json",
        ],
        ["evidence", "check", "watermark.key.json", "--key", "watermark.key.json"],
        ["evidence", "check", "signing.pem"],
        ["evidence", "check", "public.zip", *own],
        ["evidence", "check", "public.zip", "--signer", "0" * 64],
        ["evidence", "bundle", "watermark.key.json", "--key", "watermark.key.json", "--output", "x.zip"],
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            main(mistake)
        said.append("".join(traceback.format_exception(caught.value)))
    captured = capfd.readouterr()
    outputs = {"stdout": captured.out, "stderr": captured.err, "log": caplog.text, "errors": "\n".join(said)}
    contents = {name: text.encode() for name, text in outputs.items()}
    contents |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    private = (folder / "signing.pem").read_text().splitlines()[1]
    hidden = {SECRET.encode(), SECRET.encode().hex().encode(), base64.b64encode(SECRET.encode())}
    places = {name for name, content in contents.items() if any(form in content for form in hidden)}
    assert places == set()
    assert {name for name, content in contents.items() if key.salt.encode() in content} == {
        "watermark.key.json", "disclosed/watermark.key.json"
    }  # fmt: skip
    assert {name for name, content in contents.items() if private.encode() in content} == {"signing.pem"}
    for name in ("watermark.key.json", "disclosed/watermark.key.json", "signing.pem"):
        assert (folder / name).stat().st_mode & 0o077 == 0
