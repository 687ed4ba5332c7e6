import dataclasses
import json

import pytest
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.verification import (
    Evidence,
    EvidenceError,
    Responses,
    check_evidence,
    model_fingerprint,
    verify,
)
from meadef_lightning.verification import evidence as module
from meadef_lightning.verification.sealing import hide, reveal, seals
from meadef_lightning.watermark import WatermarkKey

QUICK = {"samples": 60, "decoy_samples": 4, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("evidence") / "evidence.json"
    verify(Thief(KEY, share=0.7), KEY, FakeData(), evidence_path=path, null_statistics=[0.0, 0.25], **QUICK)
    return path


@pytest.fixture
def content(original):
    return json.loads(original.read_text())


def written(tmp_path, content):
    path = tmp_path / "changed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_evidence_gives_the_verdict_again(original):
    verdict, _ = verify(Thief(KEY, share=0.7), KEY, FakeData(), null_statistics=[0.0, 0.25], **QUICK)
    assert check_evidence(original, KEY) == verdict
    assert verdict.verdict == "supported"


def test_evidence_with_sampled_decoys_gives_the_verdict_again(tmp_path):
    path = tmp_path / "evidence.json"
    verdict, _ = verify(Thief(KEY), KEY, FakeData(), evidence_path=path, decoys=20, seed=4, **QUICK)
    assert check_evidence(path, KEY) == verdict
    assert verdict.decoy_method == "sampled"


def test_the_same_seed_writes_the_same_bytes_but_for_the_time(tmp_path, original):
    path = tmp_path / "again.json"
    verify(Thief(KEY, share=0.7), KEY, FakeData(), evidence_path=path, null_statistics=[0.0, 0.25], **QUICK)
    first, second = json.loads(original.read_text()), json.loads(path.read_text())
    for value in (first, second):
        value.pop("created")
        value["seal"].pop("created")
    assert json.dumps(first) == json.dumps(second)


def test_content(content):
    assert content["schema_version"] == 5
    assert content["key"] == {"commitment": KEY.commitment(), "drawn_uniformly": True, "num_classes": 7}
    assert content["model"]["sha256"] == model_fingerprint(Thief(KEY))
    assert content["procedure"] == {
        "alpha": 0.001, "decoys": 9999, "seed": 0, "null_statistics": [0.0, 0.25], "labels": None
    }  # fmt: skip
    assert content["versions"].keys() == {"package", "torch", "lightning", "python"}
    assert content["created"].endswith("+00:00")
    assert content["model"]["references"] == []
    assert len(opened(content)["cells"]) == 7 * 6 * 8


def test_a_black_box_has_no_fingerprint(tmp_path):
    class Box:
        def query(self, x):
            return Independent()(x)

    verify(Box(), KEY, FakeData(), evidence_path=tmp_path / "e.json", **QUICK)
    assert json.loads((tmp_path / "e.json").read_text())["model"] == {"sha256": None, "references": []}


def test_no_key_material_in_the_file(original, content):
    text = original.read_text()
    assert KEY.salt not in text
    assert "combiners" not in text
    assert KEY.combiner.class_path.rpartition(".")[2] not in text
    assert not {"source_classes", "target_class", "combiner", "salt", "space"} & set(json.dumps(content).split('"'))
    # neither under another name: no number in the file outside of answers, verdict and procedure
    del content["answers"], content["verdict"], content["procedure"], content["versions"], content["created"]
    assert content["model"].pop("references") == []
    assert {value for section in content.values() if isinstance(section, dict) for value in section.values()} == {
        KEY.commitment(), True, 7, content["model"]["sha256"], *content["data"].values(), *content["seal"].values()
    }  # fmt: skip


def opened(content):
    return reveal(content["answers"], KEY, 1 << 24)


def closed(content, **change):
    """What a liar who holds the key can do to the answers."""
    return {**content, "answers": hide({**opened(content), **change}, KEY)}


def test_answers_open_with_the_key_alone(content, original):
    _, responses = verify(Thief(KEY, share=0.7), KEY, FakeData(), **QUICK)
    answers = Evidence.load(original).opened(KEY)
    assert answers == opened(content)
    for name in ("trigger", "control", "natural", "natural_labels"):
        assert answers[name] == getattr(responses, name).tolist()
    assert answers["cells"] == responses.counts.tolist()
    for name in ("trigger", "control", "cells"):
        assert answers["soft"][name] == getattr(responses.soft, name).tolist()
    for another in (dataclasses.replace(KEY, salt="0" * 32), dataclasses.replace(KEY, seed=KEY.seed + 1)):
        with pytest.raises(EvidenceError, match="answers cannot be decrypted"):
            Evidence.load(original).opened(another)


def leaves(value, path=()):
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path


def other(value):
    """A value of the same form that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    if isinstance(value, list):
        return [other(value[0]), *value[1:]] if value else [0]
    return 0.5


def test_a_change_of_any_field_is_named(content, tmp_path):
    for path in leaves({name: section for name, section in content.items() if name != "seal"}):
        changed = json.loads(json.dumps(content))
        section = changed
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = ["0" * 64] if path[-1] == "references" else other(section[path[-1]])
        with pytest.raises(EvidenceError) as caught:
            check_evidence(written(tmp_path, changed), KEY)
        assert ".".join(path[:2]) in str(caught.value), path


def test_a_changed_seal_is_named(content, tmp_path):
    content["seal"]["verdict.wsr"] = "0" * 64
    with pytest.raises(EvidenceError, match=r"Fields that differ: verdict\.wsr\.$"):
        check_evidence(written(tmp_path, content), KEY)
    del content["seal"]["verdict.wsr"]
    with pytest.raises(EvidenceError, match=r"verdict\.wsr"):
        check_evidence(written(tmp_path, content), KEY)


def sealed(content):
    """What a liar who holds the key can do."""
    return {**content, "seal": seals({k: v for k, v in content.items() if k != "seal"}, KEY)}


@pytest.mark.parametrize(
    "field", ["verdict", "decoy_p", "wsr", "reason", "statistic", "decoy_summary", "notes", "exact"]
)
def test_a_verdict_that_does_not_follow_is_named_even_with_a_valid_seal(field, content, tmp_path):
    value = content["verdict"][field]
    content["verdict"][field] = {**value, "max": 0.99} if isinstance(value, dict) else other(value)
    with pytest.raises(
        EvidenceError, match=rf"does not follow from the answers. Fields that differ: verdict\.{field}\."
    ):
        check_evidence(written(tmp_path, sealed(content)), KEY)


def test_changed_answers_change_the_verdict_even_with_a_valid_seal(content, tmp_path):
    answers = opened(content)
    changed = closed(
        content,
        trigger=[answers["trigger"][0]] * 20 + answers["trigger"][20:],
        control=[(answers["control"][-1] + 1) % 7, *answers["control"][-2::-1]],
        natural=[3, *answers["natural"][1:]],
    )
    with pytest.raises(EvidenceError, match=r"verdict\.natural_accuracy"):
        check_evidence(written(tmp_path, sealed(changed)), KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: {"trigger": []}, "trigger"),
        (lambda answers: {"cells": answers["cells"][1:]}, "cells must have 336 rows of 7 counts, got 335 rows"),
        (lambda answers: {"cells": [[0] * 7] * 336}, "at least one"),
        (lambda answers: {"natural": [0]}, "natural and natural_labels"),
        (lambda answers: {"trigger": [0.5]}, "answers.trigger must be a list of classes"),
        (lambda answers: {"trigger": [True]}, "answers.trigger must be a list of classes"),
        (lambda answers: {"control": [7] * 60}, "answers.control holds classes above 6"),
        (lambda answers: {"control": [-1] * 60}, "answers.control must be"),
        (lambda answers: {"cells": [[1, 2]]}, "answers.cells must have rows of key.num_classes = 7"),
        (lambda answers: {"cells": [3]}, "answers.cells must be a list of rows"),
        (lambda answers: {"references": [answers["cells"]]}, "references must be 0 tables"),
        (lambda answers: {"references": [3]}, "references must be a list of tables"),
        (lambda answers: {"more": 3}, "answers must be an object of"),
    ],
)
def test_unusable_answers_are_refused_even_with_a_valid_seal(change, message, content, tmp_path):
    changed = sealed(closed(content, **change(opened(content))))
    with pytest.raises(EvidenceError, match=message):
        check_evidence(written(tmp_path, changed), KEY)


def test_another_key_is_refused_without_showing_either(original):
    another = dataclasses.replace(KEY, seed=KEY.seed + 1)
    with pytest.raises(EvidenceError, match=r"key\.commitment differs") as caught:
        check_evidence(original, another)
    assert KEY.salt not in str(caught.value)
    with pytest.raises(EvidenceError, match=r"key\.commitment differs"):
        check_evidence(original, WatermarkKey.draw(7, "another"))


def replaced(path, value):
    def change(content):
        section = content
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "", "not valid JSON"),
        (lambda c: "\x80", "not valid JSON|object"),
        (lambda c: "[" * 100_000, "not valid JSON"),
        (lambda c: "[1, 2]", "must be an object"),
        (lambda c: {}, "must be an object"),
        (lambda c: json.dumps(c).replace('"wsr": 0', '"wsr": NaN', 1), "NaN|nan"),
        (lambda c: json.dumps(c).replace('"alpha": 0.001', '"alpha": 1e999', 1), "not a finite number"),
        (lambda c: {**c, "key": 3}, "must be an object"),
        # names with a dot, which are not those of parts
        (lambda c: {**c, "key.commitment": "0" * 64}, r"missing or unknown fields: key\.commitment"),
        (
            lambda c: {**c, "key": {"drawn_uniformly": True, "num_classes": 7}, "key.commitment": "0" * 64},
            r"missing or unknown fields: key\.commitment",
        ),
        (lambda c: {**c, "key": {**c["key"], "": 1}}, "missing or unknown fields: key"),
        (lambda c: {**c, "more": 3}, "missing or unknown fields: more"),
        (lambda c: {k: v for k, v in c.items() if k != "created"}, "missing or unknown fields: created"),
        (replaced(("schema_version",), 4), "schema_version must be 5.*package version"),
        (replaced(("schema_version",), True), "schema_version must be"),
        (replaced(("key", "commitment"), "../../etc/passwd"), "key.commitment must be 64"),
        (replaced(("key", "num_classes"), 10**40), "key.num_classes must be an integer"),
        (replaced(("procedure", "alpha"), "0.001"), "procedure.alpha must be a finite number"),
        (replaced(("procedure", "alpha"), 10**400), "procedure.alpha must be a finite number"),
        (replaced(("procedure", "decoys"), 10**12), "procedure.decoys must be an integer from 1"),
        (replaced(("procedure", "seed"), -1), "procedure.seed must be"),
        (replaced(("procedure", "labels"), [1]), "procedure.labels must be an object or null"),
        (replaced(("created",), "yesterday"), "created must be a time with its zone"),
        (replaced(("created",), "2026-01-01T00:00:00"), "created must be a time with its zone"),
        (replaced(("created",), "2026-01-01T00:00:00+00:00\x1b[2J"), "created must be a time with its zone"),
        (replaced(("procedure", "null_statistics"), [True]), "procedure.null_statistics must be"),
        (replaced(("answers",), {"trigger": [0]}), "answers must be a string"),
        (replaced(("model", "references"), [3]), "model.references must be a list of 64"),
        (replaced(("verdict", "notes"), [[[]]]), "verdict.notes must be"),
        (replaced(("versions", "torch"), None), "versions.torch must be a string"),
        (replaced(("seal",), {"created": 3}), "seal must be hashes"),
    ],
)
def test_malformed_files_are_refused_by_name(change, message, content, tmp_path):
    with pytest.raises(EvidenceError, match=message):
        check_evidence(written(tmp_path, change(content)), KEY)


@pytest.mark.parametrize("section", ["verdict", "key"])
def test_a_name_that_occurs_twice_is_refused(section, original, tmp_path):
    """Readers of JSON differ in which one they take: who shows the file would show another verdict than is checked."""
    text = original.read_text()
    shown = {"verdict": '"verdict": "not supported", ', "key": f'"commitment": "{"0" * 64}", '}[section]
    changed = text.replace(f'"{section}": {{', f'"{section}": {{{shown}', 1)
    assert json.loads(changed) == json.loads(text)
    with pytest.raises(EvidenceError, match=r"not valid JSON.*two members of the same name"):
        check_evidence(written(tmp_path, changed), KEY)


def test_names_of_a_stranger_reach_no_terminal(content, tmp_path):
    """Messages list fields that differ; their names may hold what a terminal obeys."""
    for changed in ({**content, "\x1b[2Jmore": 1}, {**content, "seal": {**content["seal"], "\x1b[2Jmore": "0" * 64}}):
        with pytest.raises(EvidenceError, match=r"\\x1b\[2Jmore") as caught:
            check_evidence(written(tmp_path, changed), KEY)
        assert "\x1b" not in str(caught.value)


def test_what_it_says_of_the_key_must_be_true_even_with_a_valid_seal(content, tmp_path):
    """Who has no key reads these fields; a liar who holds it could seal others, or a table of another width."""
    rows = [[*row, 0] for row in opened(content)["cells"]]
    for name, value, cells in (("drawn_uniformly", False, {}), ("num_classes", 8, {"cells": rows})):
        changed = closed({**content, "key": {**content["key"], name: value}}, **cells)
        with pytest.raises(EvidenceError, match=rf"key\.{name} differs: the evidence says something else"):
            check_evidence(written(tmp_path, sealed(changed)), KEY)


def test_missing_and_oversized_files(tmp_path, original, monkeypatch):
    with pytest.raises(EvidenceError, match=r"Cannot read the evidence .*nowhere"):
        check_evidence(tmp_path / "nowhere", KEY)
    monkeypatch.setattr(module, "MAX_EVIDENCE_BYTES", 1000)
    with pytest.raises(EvidenceError, match="larger than 1000 bytes"):
        check_evidence(original, KEY)


def test_a_failed_write_leaves_the_old_file(tmp_path, original, monkeypatch):
    path = tmp_path / "evidence.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match=r"Cannot write evidence to .*No space left on device.*choose another path"):
        Evidence.load(original).save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.json"]


def test_responses_do_not_show_their_answers():
    _, responses = verify(Thief(KEY), KEY, FakeData(), **QUICK)
    assert isinstance(responses, Responses)
    assert repr(responses) == "Responses(60 triggers, 336 cells, 84 natural samples)"
