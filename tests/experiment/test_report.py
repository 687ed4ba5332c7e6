"""``report.json`` as other programs read it, and how rows of several seeds are joined."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# the published schema, value by value; "a|b" lists what an enumeration allows
from reports import independent, report, suspect, three_seeds
from scipy import stats

from meadef_lightning.experiment.aggregate import Estimate, aggregate
from meadef_lightning.experiment.render import (
    format_p,
    headline,
    write_report,
)
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.rows import DetectionRow

SCHEMA = json.loads("""
{"schema_version": 2, "experiment": "...", "seeds": [0], "key": {"commitment": "...", "drawn_uniformly": true},
 "victim": {"accuracy": 0.0, "clean_accuracy": 0.0, "wsr": 0.0, "wfpr": 0.0},
 "suspects": [{"name": "...", "kind": "extracted|removed|independent|victim", "attack": "...",
               "labels": "soft|hard|topk|feature", "queries": 0, "accuracy": 0.0, "fidelity": 0.0, "wsr": 0.0,
               "wsr_ci": [0.0, 0.0], "wfpr": 0.0, "p_value": 0.0,
               "verdict": "supported|inconclusive|not supported"}],
 "removal": [{"name": "...", "target": "...", "attack": "...", "unit": "...", "points": 0.0, "chosen": 0.0,
              "curve": [{"strength": 0.0, "accuracy": 0.0, "wsr": 0.0, "wfpr": 0.0}],
              "gains": {"his own": 0.0}}],
 "detection": [{"attack": "...", "target": "...", "level": "model|inputs", "score": 0.0, "threshold": 0.0,
                "decision": true, "auc": 0.0, "true_rate": 0.0, "false_rate": 0.0,
                "named_target": 0.0, "key_rank": 0.0}]}
""")


# --- schema


def assert_same_form(value, schema, where="report"):
    """Same keys in the same order, same JSON types, enumerations kept."""
    if isinstance(schema, dict):
        assert list(value) == list(schema), where
        for key in schema:
            assert_same_form(value[key], schema[key], f"{where}.{key}")
    elif isinstance(schema, list) and len(schema) == 1:
        assert value, where
        for index, item in enumerate(value):
            assert_same_form(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, list):
        assert [type(item) for item in value] == [type(item) for item in schema], where
    else:
        assert type(value) is type(schema), where
        if isinstance(schema, str) and "|" in schema:
            assert value in schema.split("|"), where


def test_file_has_the_published_form_and_comes_back(tmp_path):
    rows = [
        suspect(f"{kind}-{labels}-{verdict}", kind=kind, labels=labels, verdict=verdict)
        for kind in SCHEMA["suspects"][0]["kind"].split("|")
        for labels in SCHEMA["suspects"][0]["labels"].split("|")
        for verdict in SCHEMA["suspects"][0]["verdict"].split("|")
    ]
    written = report(*rows, seeds=(0, 1))
    path = write_report(written, tmp_path)
    obj = json.loads(path.read_text())
    assert path == tmp_path / "report.json"
    assert_same_form(obj, SCHEMA)
    assert Report.load(path) == written
    assert obj["suspects"][0]["wsr_ci"] == [0.802, 0.874]


def test_numpy_scalars_and_whole_numbers_become_json_numbers():
    made = report(
        suspect(wsr=np.float32(0.5), queries=np.int64(7), accuracy=1), independent(), seeds=[np.int64(3)]
    ).to_dict()  # fmt: skip
    assert_same_form(made, SCHEMA)
    assert json.loads(json.dumps(made)) == made


rates = st.floats(0, 1)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            suspect,
            name=st.text("abc-$<ä", min_size=1, max_size=5),
            queries=st.integers(0, 10**9),
            wsr=rates,
            wsr_ci=st.tuples(rates, rates).map(sorted),
            p_value=rates,
            verdict=st.sampled_from(["supported", "inconclusive", "not supported"]),
        ),
        unique_by=lambda row: row.name,
    )
)
def test_every_report_survives_its_json(rows):
    made = report(*rows, independent())
    assert Report.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def change(path, value):
    def apply(obj):
        *parents, last = path
        for key in parents:
            obj = obj[key]
        if value is KeyError:
            del obj[last]
        else:
            obj[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(["schema_version"], 3), r"schema_version 3 is unknown: this package reads version 2.*Install"),
        (change(["schema_version"], "1"), r"schema_version '1' is unknown"),
        (change(["schema_version"], True), r"schema_version True is unknown"),
        (change(["schema_version"], KeyError), r"missing \['schema_version'\]"),
        (change(["more"], 1), r"unknown \['more'\]"),
        (change(["experiment"], "a\x1b[2Jb"), "experiment must be a printable"),
        (change(["experiment"], ""), "experiment must be a printable, non-empty string"),
        (change(["seeds"], []), "seeds must be a non-empty list"),
        (change(["seeds"], [1, 1]), "seeds must be a non-empty list without repetitions"),
        (change(["seeds"], [0.5]), "seeds must be a whole number"),
        (change(["seeds"], 3), "seeds must be a list"),
        (change(["key"], None), "key: it must be an object"),
        (change(["key", "drawn_uniformly"], 1), "key: drawn_uniformly must be true or false"),
        (change(["key", "secret"], "s"), r"key: .*unknown \['secret'\]"),
        (change(["victim", "wsr"], 1.01), r"victim: wsr must be a number in \[0, 1\], not 1.01"),
        (change(["victim", "wfpr"], KeyError), r"victim: .*missing \['wfpr'\]"),
        (change(["suspects"], {}), "suspects must be a list"),
        (change(["suspects"], []), "at least one 'independent' model"),
        (change(["suspects", 1], []), r"suspects\[1\]: it must be an object"),
        (change(["suspects", 1, "kind"], "extracted"), "at least one 'independent' model"),
        (change(["suspects", 1, "name"], "soft-same"), "names must be unique, but 'soft-same'"),
        (change(["suspects", 0, "kind"], "stolen"), r"suspects\[0\]: kind must be one of extracted, removed"),
        (change(["suspects", 0, "labels"], None), r"suspects\[0\]: labels must be one of soft"),
        (change(["suspects", 0, "verdict"], "guilty"), r"suspects\[0\]: verdict must be one of supported"),
        (change(["suspects", 0, "queries"], -1), r"suspects\[0\]: queries must be a whole number"),
        (change(["suspects", 0, "queries"], 1.0), r"suspects\[0\]: queries must be a whole number"),
        (change(["suspects", 0, "accuracy"], "0.9"), r"suspects\[0\]: accuracy must be a number"),
        (change(["suspects", 0, "accuracy"], True), r"suspects\[0\]: accuracy must be a number"),
        (change(["suspects", 0, "p_value"], float("nan")), r"suspects\[0\]: p_value must be a number"),
        (change(["suspects", 0, "wsr_ci"], [0.1]), r"suspects\[0\]: wsr_ci must be two numbers"),
        (change(["suspects", 0, "wsr_ci"], [0.9, 0.1]), r"suspects\[0\]: wsr_ci must be in order"),
        (change(["suspects", 0, "wsr_ci"], [-0.1, 0.1]), r"suspects\[0\]: wsr_ci must be a number in \[0, 1\]"),
        (change(["detection", 0], []), r"detection\[0\]: it must be an object"),
        (change(["detection", 0, "named_target"], 2), r"detection\[0\]: named_target must be a number in \[0, 1\]"),
        (change(["detection", 0, "key_rank"], 0.5), r"detection\[0\]: key_rank must be at least 1"),
        (change(["detection", 0, "key_rank"], float("inf")), r"detection\[0\]: key_rank must be a finite number"),
    ],
)
def test_damaged_reports_say_where(damage, message):
    obj = copy.deepcopy(report().to_dict())
    damage(obj)
    with pytest.raises(ValueError, match=message):
        Report.from_dict(obj)


def test_reports_of_earlier_releases_load_without_what_searches_say_since():
    found = DetectionRow("abs", "victim", "model", 3.0, 2.0, True, 0.75, 1.0, 0.25, named_target=0.5, key_rank=1.5)
    obj = report(detection=(found,)).to_dict()
    for name in ("named_target", "key_rank"):
        del obj["detection"][0][name]
    (row,) = Report.from_dict(obj).detection
    assert row == dataclasses.replace(found, named_target=None, key_rank=None)
    # what was always there must be there still
    del obj["detection"][0]["false_rate"]
    with pytest.raises(ValueError, match=r"detection\[0\]: .*missing \['false_rate'\]"):
        Report.from_dict(obj)


def test_load_names_the_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"schema_version": 9}')
    with pytest.raises(ValueError, match=r"report\.json is not a valid report: schema_version 9"):
        Report.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"report\.json is not a valid report: report must be an object"):
        Report.load(path)


# --- aggregation


@given(st.lists(rates, min_size=2, max_size=8))
def test_interval_is_students(values):
    mean, half = Estimate.of(values).mean, Estimate.of(values).half_width
    assert mean == pytest.approx(np.mean(values), abs=1e-12)
    assert half == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values), abs=1e-12)
    if np.std(values) > 1e-6:
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-9)


def test_rows_of_one_suspect_are_joined():
    rows = [*three_seeds("soft", p_value=0.01), independent(), *three_seeds("soft/other", (0.2, 0.3, 0.1))]
    rows[1] = dataclasses.replace(rows[1], p_value=0.2, verdict="inconclusive", queries=1500)
    soft, alone, other = aggregate(rows)
    assert (soft.name, alone.name, other.name) == ("soft", "independent", "soft/other")
    assert [row.seed for row in soft.members] == [0, 1, 2]
    assert soft.estimate("wsr").mean == pytest.approx(0.85)
    assert soft.wsr_interval == pytest.approx(stats.t.interval(0.95, 2, 0.85, 0.05 / 3**0.5), abs=1e-9)
    assert soft.wsr_text == "85.0±12.4"
    assert other.wsr_interval[0] == 0.0  # cut: the t-interval reaches below zero
    assert (soft.queries, soft.p_value) == (1300, 0.2)
    assert (soft.verdict, soft.verdict_text, soft.tone) == ("supported", "supported 2/3", "unclear")
    assert (other.verdict_text, other.tone) == ("supported", "good")
    assert alone.wsr_interval == (0.02, 0.05)
    assert alone.wsr_text == "3.0 [2, 5]"
    assert alone.estimate("wsr").half_width is None


def test_single_rows_keep_their_seed_and_other_attacks_are_not_joined():
    rows = [suspect("a/seed-1"), suspect("b/seed-0"), suspect("b/seed-1", attack="knockoff"), suspect("/seed-3")]
    assert [row.name for row in aggregate(rows)] == ["a/seed-1", "b/seed-0", "b/seed-1", "/seed-3"]
    assert rows[3].seed is None


def test_equally_frequent_verdicts_count_as_the_weaker():
    rows = three_seeds("a")
    rows = [dataclasses.replace(row, verdict=v) for row, v in zip(rows, ["supported", "not supported"], strict=False)]
    assert aggregate(rows)[0].verdict_text == "not supported 1/2"


@pytest.mark.parametrize(
    ("row", "tone"),
    [
        (suspect(), "good"),
        (suspect(verdict="inconclusive"), "unclear"),
        (suspect(verdict="not supported"), "bad"),
        (independent(), "good"),
        (independent(verdict="inconclusive"), "unclear"),
        (independent(verdict="supported"), "bad"),
    ],
)
def test_tone_compares_the_verdict_with_the_truth(row, tone):
    assert aggregate([row])[0].tone == tone


def test_headline_counts_proofs_and_false_claims():
    rows = [suspect("a"), suspect("b", verdict="inconclusive"), suspect("c", kind="removed")]
    made = report(*rows, independent("d", verdict="supported"), independent("e"))
    assert headline(made) == (
        "Ownership is supported for 2 of 3 models derived from the victim, "
        "and falsely claimed for 1 of 2 independent models."
    )


@given(st.floats(1e-12, 1))
def test_p_values_are_short_and_true_to_two_digits(p_value):
    assert len(format_p(p_value)) <= 7
    assert float(format_p(p_value)) == pytest.approx(p_value, rel=0.05)
