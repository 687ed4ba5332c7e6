"""``meadef key check``, ``verify --reference`` twice, and ``meadef evidence check`` of suspects that number classes their own way."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from scipy import stats

from meadef_lightning.cli import main
from meadef_lightning.data import DigitsDataModule
from meadef_lightning.experiment.bundles import record_command
from meadef_lightning.verification import Evidence
from meadef_lightning.watermark import WatermarkKey

SECRET = "zebra-quartz-8363-7457-vexing"  # noqa: S105  (of these tests)
BEACON = "block 1234567: 00ab"
SMALL = ["--verification.samples", "40", "--verification.decoys", "50", "--verification.decoy_samples", "4"]
DIGITS = ["--data", "DigitsDataModule"]
DATA = DigitsDataModule()
DATA.prepare_data()
DATA.setup("predict")
NAMES = {"permuted": [3, 4, 5, 6, 7, 8, 9, 0, 1, 2], "merged": [0, 1, 2, 3, 4, 5, 6, 1, 8, 9]}


def nearest(x):
    """A classifier without weights: the nearest mean of the victim split."""
    images, labels = DATA.tensors("victim")
    means = torch.stack([images[labels == k].mean(0) for k in range(10)])
    return torch.cdist(x.flatten(1), means.flatten(1)).argmin(1)


def permuted(x):
    return torch.tensor(NAMES["permuted"])[nearest(x)]


def merged(x):
    return torch.tensor(NAMES["merged"])[nearest(x)]


class Stack(torch.nn.Sequential):
    """Layers that a YAML lists."""

    def __init__(self, layers: list[torch.nn.Module]):
        super().__init__(*layers)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OWNER", SECRET)
    monkeypatch.setenv("OTHER", "another secret of the owner")
    return tmp_path


@pytest.fixture
def key(folder):
    main(["key", "draw", "--classes", "10", "--secret-env", "OWNER", "--beacon", BEACON, "--output", "k.json"])
    return WatermarkKey.load("k.json")


def read(path):
    return json.loads(Path(path).read_text())


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    text = str(stop.value.code) + capsys.readouterr().err
    assert SECRET not in text
    return text


def test_a_draw_is_repeated_and_a_forged_one_found(key, capsys):
    check = ["key", "check", "k.json", "--secret-env", "OWNER"]
    main([*check, "--beacon", BEACON])
    assert "does not tell how many secrets were tried" in capsys.readouterr().out
    main(["key", "commit", "--key", "k.json", "--secret-env", "OWNER", "--beacon", BEACON, "--output", "c.json"])
    main([*check, "--commitment", "c.json"])
    assert "were committed to at 20" in capsys.readouterr().out
    assert "cannot be repeated" in fails(check, capsys)  # no beacon
    assert "cannot be repeated" in fails(
        ["key", "check", "k.json", "--secret-env", "OTHER", "--beacon", BEACON], capsys
    )
    assert "another secret" in fails(
        ["key", "check", "k.json", "--secret-env", "OTHER", "--commitment", "c.json"], capsys
    )
    assert "not allowed with" in fails([*check, "--beacon", BEACON, "--commitment", "c.json"], capsys)
    # picked by hand, and its file says drawn: all that differs is one class
    target = next(k for k in range(10) if k not in (*key.source_classes, key.target_class))
    dataclasses.replace(key, target_class=target).save("k.json")
    assert "claims a draw that cannot be repeated" in fails([*check, "--beacon", BEACON], capsys)
    assert "about another key" in fails([*check, "--commitment", "c.json"], capsys)
    dataclasses.replace(key, drawn_uniformly=False).save("k.json")
    assert "picked by hand" in fails([*check, "--beacon", BEACON], capsys)
    assert "Cannot read the commitment none.json" in fails([*check, "--commitment", "none.json"], capsys)
    Path("c.json").write_bytes(Path("c.json").read_bytes() + b" " * (1 << 20))
    assert "larger than 1048576 bytes" in fails([*check, "--commitment", "c.json"], capsys)


def test_evidence_of_a_forged_key_is_found_with_the_secret(key, capsys):
    forged = dataclasses.replace(key, source_classes=key.source_classes[::-1])
    forged.save("forged.json")
    for name in ("k", "forged"):  # as their files say
        main(["verify", "--key", f"{name}.json", "--suspect", f"python:{__name__}:nearest", "--trust_code", *DIGITS, *SMALL, "--output", name])  # fmt: skip
        main(["evidence", "check", f"{name}/evidence.json", "--key", f"{name}.json"])
    assert capsys.readouterr().out.count("That the key was drawn is its owner's word") == 2
    check = ["--secret-env", "OWNER", "--beacon", BEACON]
    main(["evidence", "check", "k/evidence.json", "--key", "k.json", *check])
    text = capsys.readouterr().out
    assert "The key is what this secret and beacon give" in text
    assert "owner's word" not in text
    assert "not this package's" not in text  # its space is
    assert "cannot be repeated" in fails(["evidence", "check", "forged/evidence.json", "--key", "forged.json", *check], capsys)  # fmt: skip
    main(["evidence", "bundle", "k", "--key", "k.json", "--output", "b.zip"])
    assert "commitment names the beacon" in fails(["evidence", "check", "b.zip", "--key", "k.json", *check], capsys)


@pytest.mark.parametrize("suspect", sorted(NAMES))
def test_labels_are_in_the_bundle_and_told_anew_from_the_judges_images(key, suspect, capsys):
    asked = ["--suspect", f"python:{__name__}:{suspect}", "--trust_code", *DIGITS]
    main(["verify", "--key", "k.json", *asked, *SMALL, "--align_labels", "--output", "judged"])
    verdict = read("judged/verdict.json")
    assert verdict["natural_accuracy"] > 0.75  # untranslated: nearly 0 where permuted
    main(["evidence", "bundle", "judged", "--key", "k.json", *DIGITS, "--output", "b.zip"])
    capsys.readouterr()
    main(["evidence", "check", "b.zip", "--key", "k.json", *DIGITS])
    text = capsys.readouterr().out
    told = {"permuted": "numbers the classes in another order", "merged": "answers some classes alike (1, 7)"}[suspect]
    assert told in text
    assert f"Verdict of the evidence: {verdict['verdict']}. {verdict['reason']}" in text
    # other images, other counts, the same map; that labels are translated need not be said again
    main(["evidence", "check", "b.zip", "--key", "k.json", *asked, "--data.seed", "5"])
    first, again = (read(f"{name}/labels.json") for name in ("judged", "runs/recheck"))
    assert first["classes"] == again["classes"]
    assert first["kind"] == again["kind"] == suspect.replace("permuted", "permutation")
    assert first["counts"] != again["counts"]
    assert read("runs/recheck/verdict.json")["natural_accuracy"] > 0.75
    assert f"Verdict of the evidence: {verdict['verdict']} (p = " in capsys.readouterr().out
    content = read("judged/evidence.json")
    assert content["procedure"]["labels"] == first
    content["procedure"]["labels"]["counts"][0][2] += 1
    Path("judged/evidence.json").write_text(json.dumps(content))
    assert "procedure.labels" in fails(["evidence", "check", "judged/evidence.json", "--key", "k.json"], capsys)


def test_a_reference_may_be_given_again_and_again(key, folder, capsys):
    models = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        models[seed] = torch.nn.Linear(256, 10)
        torch.save({f"1.{name}": value for name, value in models[seed].state_dict().items()}, f"{seed}.pt")
    layers = [{"class_path": "torch.nn.Flatten"}, {"class_path": "torch.nn.Linear", "init_args": {"in_features": 256, "out_features": 10}}]  # fmt: skip
    Path("m.yaml").write_text(
        json.dumps({"model": {"class_path": f"{__name__}.Stack", "init_args": {"layers": layers}}})
    )
    found = {}
    for name, given in {"0": ["0"], "1": ["1"], "both": ["0", "1"]}.items():
        references = [word for one in given for word in ("--reference", f"{one}.pt")]
        main(
            [
                "verify",
                "--key",
                "k.json",
                "--suspect",
                "0.pt",
                "--model",
                "m.yaml",
                *references,
                *DIGITS,
                *SMALL,
                "--output",
                name,
            ]
        )
        found[name] = read(f"{name}/verdict.json")
    Path("one.yaml").write_text("reference: 1.pt")
    main(["verify", "--config", "one.yaml", "--key", "k.json", "--suspect", "0.pt", "--model", "m.yaml", *DIGITS, *SMALL, "--output", "yaml"])  # fmt: skip
    assert read("yaml/verdict.json") == found["1"]
    assert found["both"]["reference"]
    known = Evidence.load("both/evidence.json").model["references"]
    assert known == [
        *Evidence.load("0/evidence.json").model["references"],
        *Evidence.load("1/evidence.json").model["references"],
    ]
    assert len({found[name]["statistic"] for name in found}) == 3
    assert found["0"]["statistic"] == 0  # above itself
    assert found["1"]["statistic"] != 0
    # a judge who asks again is told that the evidence had references
    again = [
        "evidence",
        "check",
        "both/evidence.json",
        "--key",
        "k.json",
        "--suspect",
        "0.pt",
        "--model",
        "m.yaml",
        *DIGITS,
    ]
    for given, told in (([], True), (["--reference", "1.pt"], False)):
        capsys.readouterr()
        main([*again, *given])
        text = capsys.readouterr().out
        assert "the mean of what 2 reference models give" in text
        assert ("is above reference models. Asking again without --reference" in text) == told


def test_the_recorded_command_holds_no_password(folder):
    """Not even one with an @, which stands in a URL as it is typed."""
    record_command(folder, "meadef verify", ["--suspect", "http://me:p@ss@host:80/a@b", "--output", "x@y"])
    assert Path("command.txt").read_text() == "meadef verify --suspect http://host:80/a@b --output x@y\n"


def test_evidence_is_not_overwritten_by_another_command(folder):
    arguments = ["--suspect", "a"]
    record_command(folder, "meadef verify", arguments)
    record_command(folder, "meadef verify", ["--suspect", "b"])  # nothing came of the first one
    Path("evidence.json").write_text("{}")
    record_command(folder, "meadef verify", ["--suspect", "b"])
    with pytest.raises(
        FileExistsError, match=r"holds the evidence of: meadef verify --suspect b\. It is not overwritten: .*--output"
    ):
        record_command(folder, "meadef verify", arguments)
    Path("command.txt").unlink()
    with pytest.raises(FileExistsError, match="a command that is not known"):
        record_command(folder, "meadef verify", arguments)


def test_a_secret_in_the_environment_may_be_any_bytes(folder, monkeypatch, capsys):
    """What is no text is no reason to show it in an error, and gives the key that its bytes give from a file."""
    raw = SECRET.encode() + b"\xff\xfe"
    monkeypatch.setitem(os.environb, b"RAW", raw)
    (folder / "raw").write_bytes(raw)
    (folder / "raw").chmod(0o600)
    main(["key", "draw", "--classes", "10", "--secret-env", "RAW", "--output", "raw.json"])
    main(["key", "check", "raw.json", "--secret-file", "raw"])
    assert "The key is what this secret and beacon give" in capsys.readouterr().out


@pytest.fixture
def two_keys(key, folder):
    """Evidence of one suspect, which knows two keys, under either, and of another suspect under the second."""
    main(["key", "draw", "--classes", "10", "--secret-env", "OTHER", "--output", "k2.json"])
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).state_dict(), "m.pt")
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).state_dict(), "other.pt")
    layers = [{"class_path": "torch.nn.Flatten"}, {"class_path": "torch.nn.Linear", "init_args": {"in_features": 256, "out_features": 10}}]  # fmt: skip
    for name in ("m", "other"):
        state = {f"1.{n.partition('.')[2]}": value for n, value in torch.load(f"{name}.pt", weights_only=True).items()}
        torch.save(state, f"{name}.pt")
    Path("m.yaml").write_text(
        json.dumps({"model": {"class_path": f"{__name__}.Stack", "init_args": {"layers": layers}}})
    )
    for name, suspect, used in (("one", "m", "k"), ("two", "m", "k2"), ("elsewhere", "other", "k2")):
        main(["verify", "--key", f"{used}.json", "--suspect", f"{suspect}.pt", "--model", "m.yaml", *DIGITS, *SMALL, "--output", name])  # fmt: skip


def test_evidence_under_several_keys_is_combined(two_keys, capsys):
    capsys.readouterr()
    # keys in any order, a directory or the file in it
    main(["evidence", "combine", "one", "two/evidence.json", "--key", "k2.json", "--key", "k.json", "--output", "joint.json"])  # fmt: skip
    text, joint = capsys.readouterr().out, read("joint.json")
    alone = [read(f"{name}/verdict.json") for name in ("one", "two")]
    assert joint["decoy_p"] == pytest.approx(
        stats.combine_pvalues([verdict["decoy_p"] for verdict in alone], method="fisher").pvalue
    )
    assert joint["verdicts"] == alone
    assert f"Verdict under 2 key(s): {joint['verdict']}. {joint['reason']}" in text
    assert "two/evidence.json: " in text
    assert "All keys that were committed to must be among them" in text
    assert "black box" not in text
    # what is there stays
    one = ["evidence", "combine", "one", "--key", "k.json", "--output"]
    before = Path("one/evidence.json").read_bytes()
    assert "is not overwritten" in fails([*one, "one/evidence.json"], capsys)
    assert Path("one/evidence.json").read_bytes() == before


@pytest.mark.parametrize(
    ("evidence", "keys", "message"),
    [
        (["one", "two"], ["k"], "No key was given for two"),
        (["one"], ["k", "k2"], "evidence about 1 key(s) in 1 file(s)"),
        (["one", "one"], ["k"], "evidence about 1 key(s) in 2 file(s)"),
        (["one"], ["k", "k"], "got 2 key file(s) of 1 key(s)"),
        (["one", "elsewhere"], ["k", "k2"], "about different models"),
        (["one", "two", "--samples=3"], ["k", "k2"], "does not know --samples=3"),
    ],
)
def test_evidence_that_cannot_be_combined(two_keys, evidence, keys, message, capsys):
    given = [word for name in keys for word in ("--key", f"{name}.json")]
    assert message in fails(["evidence", "combine", *evidence, *given, "--output", "joint.json"], capsys)
    assert not Path("joint.json").exists()


def test_evidence_of_another_level_or_changed_is_not_combined(two_keys, capsys):
    combine = ["evidence", "combine", "one", "two", "--key", "k.json", "--key", "k2.json"]
    main(["verify", "--key", "k2.json", "--suspect", "m.pt", "--model", "m.yaml", *DIGITS, *SMALL, "--verification.alpha", "0.01", "--output", "level"])  # fmt: skip
    assert "different levels (0.001, 0.01)" in fails([*combine[:3], "level", *combine[4:]], capsys)
    content = read("two/evidence.json")
    content["verdict"]["decoy_p"] /= 10
    Path("two/evidence.json").write_text(json.dumps(content))
    assert "Fields that differ: verdict" in fails(combine, capsys)


def test_black_boxes_are_the_same_by_their_owners_word(key, folder, capsys):
    main(["verify", "--key", "k.json", "--suspect", f"python:{__name__}:nearest", "--trust_code", *DIGITS, *SMALL, "--output", "one"])  # fmt: skip
    capsys.readouterr()
    main(["evidence", "combine", "one", "--key", "k.json"])
    text = capsys.readouterr().out
    assert "Verdict under 1 key(s): inconclusive" in text  # of 50 decoys
    assert "that it was the same one each time is the word of who asked it" in text
