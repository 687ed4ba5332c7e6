"""``report.json`` as other programs read it, and its forms for people."""

import base64
import copy
import csv
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from meadef_lightning.experiment.aggregate import Estimate, aggregate
from meadef_lightning.experiment.artifacts import OutputError
from meadef_lightning.experiment.render import (
    CSV_COLUMNS,
    NOT_ASKED,
    ReportExtras,
    ReportFigure,
    format_p,
    headline,
    package_versions,
    summary_table,
    to_csv,
    to_html,
    write_report,
)
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.rows import DetectionRow, KeyInfo, PathPoint, RemovalRow, SuspectRow, VictimRow

# the published schema, value by value; "a|b" lists what an enumeration allows
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
                "decision": true, "auc": 0.0, "true_rate": 0.0, "false_rate": 0.0}]}
""")
HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror='a()'>\"'&"
PNG = b"\x89PNG\r\n\x1a\n" + b"not really a picture"


def suspect(name="soft-same", **changes):
    values = {
        "name": name, "kind": "extracted", "attack": "distillation", "labels": "soft", "queries": 1200,
        "accuracy": 0.95, "fidelity": 0.97, "wsr": 0.841, "wsr_ci": (0.802, 0.874), "wfpr": 0.021,
        "p_value": 1 / 1440, "verdict": "supported",
    }  # fmt: skip
    return SuspectRow(**{**values, **changes})


def independent(name="independent", **changes):
    return suspect(
        name,
        **{"kind": "independent", "attack": "", "queries": 0, "wsr": 0.03, "wsr_ci": (0.02, 0.05), "p_value": 0.61,
           "verdict": "not supported", **changes},
    )  # fmt: skip


def report(*suspects, **changes):
    values = {
        "experiment": "digits/supervised",
        "seeds": (0,),
        "key": KeyInfo("ab" * 32, True),
        "victim": VictimRow(0.969, 0.972, 1.0, 0.012),
        "suspects": suspects or (suspect(), independent()),
        "removal": (
            RemovalRow(
                "victim.wrk", "victim", "WRK", "epochs", 0.05, 1, (PathPoint(0, 0.97, 1, 0.01),), {"his own": 0.5}
            ),
        ),
        "detection": (DetectionRow("lof", "victim", "inputs", 1, 2.5, False, 0.5, 0.01, 0.02),),
    }
    return Report(**{**values, **changes})


def three_seeds(name, wsrs=(0.8, 0.85, 0.9), **changes):
    return [suspect(f"{name}/seed-{seed}", wsr=wsr, **changes) for seed, wsr in enumerate(wsrs)]


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
    ],
)
def test_damaged_reports_say_where(damage, message):
    obj = copy.deepcopy(report().to_dict())
    damage(obj)
    with pytest.raises(ValueError, match=message):
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


# --- terminal


def shown(made, **console):
    out = io.StringIO()
    Console(file=out, **console).print(summary_table(made))
    return out.getvalue()


def many():
    rows = [*three_seeds("soft-same"), *three_seeds("hard-other", verdict="not supported", labels="hard")]
    return [*rows, *three_seeds("independent", kind="independent", verdict="not supported", queries=0)]


@pytest.mark.parametrize("rows", [(suspect("soft-same-architecture", queries=50_000), independent()), many()])
def test_table_fits_100_columns_uncut_and_without_colour_in_a_file(rows):
    text = shown(report(*rows), width=100)
    assert "\x1b" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    lines = [re.split(r"\s+", line.strip()) for line in text.splitlines()]
    for row in aggregate(rows):
        line = " ".join(next(line for line in lines if line[0] == row.name))
        assert row.first.kind in line
        assert line.endswith(f"{row.wsr_text} {row.estimate('wfpr')} {format_p(row.p_value)} {row.verdict_text}")
    assert "without watermark 97.2" in text


def test_table_shows_labels_and_queries_only_where_an_oracle_was_asked():
    stolen, innocent = shown(report(), width=100).splitlines()[3:5]
    assert re.search(r"soft-same +extracted +soft +1,200 ", stolen)
    assert re.search(rf"independent +independent +{NOT_ASKED} +{NOT_ASKED} ", innocent)


def test_table_colours_on_a_terminal_only():
    made = report(suspect(verdict="not supported"), independent())
    text = shown(made, width=100, force_terminal=True, color_system="standard")
    assert "\x1b[1;31mnot supported" in text
    assert "\x1b[32mnot supported" in text


def test_table_takes_markup_in_names_literally():
    assert "[red]x[/red]" in shown(report(suspect("[red]x[/red]"), independent(), experiment="[b]e[/b]"), width=100)
    assert "[b]e[/b]" in shown(report(experiment="[b]e[/b]"), width=100)


# --- CSV


def test_csv_holds_the_victim_and_every_suspect_in_full():
    made = report(*many(), suspect('a,"b"'))
    lines = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert len(lines) == 1 + len(made.suspects)
    victim, *suspects = lines
    assert (victim["role"], victim["kind"], victim["name"]) == ("victim", "victim", "victim")
    assert {name: float(victim[name]) for name in ("accuracy", "clean_accuracy", "wsr", "wfpr")} == dataclasses.asdict(
        made.victim
    )
    for line, row in zip(suspects, made.suspects, strict=True):
        assert (line["experiment"], line["role"], line["name"]) == ("digits/supervised", "suspect", row.name)
        assert line["seed"] == ("" if row.seed is None else str(row.seed))
        assert (float(line["wsr_low"]), float(line["wsr_high"])) == row.wsr_ci
        assert (float(line["p_value"]), int(line["queries"])) == (row.p_value, row.queries)
        assert [line[name] for name in ("kind", "attack", "labels", "verdict", "clean_accuracy")] == [
            row.kind, row.attack, row.labels, row.verdict, "",
        ]  # fmt: skip


# --- HTML


class Page(HTMLParser):
    """What a browser would see: elements with attributes, the text, and the text of each table cell."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.rows, self.script = [], "", [], ""
        self.inside = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.inside:
            self.script += data
        elif "style" not in self.inside:
            self.text += data
        if "td" in self.inside or "th" in self.inside:
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


EXTRAS = ReportExtras(
    command="meadef run experiments/digits/supervised.yaml --output 'runs/a b'",
    config="data:\n  class_path: DigitsDataModule\n",
    splits={"victim": {"size": 700, "sha256": "ab" * 32}, "attacker": {"size": 600, "sha256": "cd" * 32}},
    versions={"torch": "2.15.0"},
    stage_seconds={"victim": 31.25, "verification": 8.75},
    alpha=0.001,
)


def test_page_tells_everything():
    made = report(suspect(), independent(), seeds=(3, 4))
    page = Page(to_html(made, extras=EXTRAS))
    text = re.sub(r"\s+", " ", page.text)
    for expected in (
        headline(made), "96.9 %", "97.2 %", "-0.3 points", "ab" * 32, "3, 4", "torch 2.15.0", EXTRAS.command,
        "class_path: DigitsDataModule", "40 s: victim 31.2 s, verification 8.8 s", "size 700", "cd" * 32, "= 0.001 fixed before",
        "never used for it", "This key was drawn uniformly",
    ):  # fmt: skip
        assert expected in text, expected
    cells = [[cell.strip() for cell in row] for row in page.rows]
    assert ["soft-same", "supported", "0.00069", "84.1 [80, 87]", "2.1", "95.0", "97.0", "extracted", "distillation",
            "soft", "1,200", "yes"] in cells  # fmt: skip
    assert ["independent", "not supported", "0.61", "3.0 [2, 5]", "2.1", "95.0", "97.0", "independent", *[NOT_ASKED] * 3,
            "no"] in cells  # fmt: skip
    assert "Every seed" not in text


def test_page_of_several_seeds_shows_means_and_every_seed():
    page = Page(to_html(report(*many())))
    names = [row[0].strip() for row in page.rows]
    assert {"soft-same", "soft-same/seed-0", "soft-same/seed-2"} <= set(names)
    assert "85.0±12.4" in page.text


def test_page_says_when_the_key_was_chosen_by_hand():
    text = Page(to_html(report(key=KeyInfo("ab", False)))).text
    assert "chosen by hand, not drawn: its p-values are indicative only" in text
    assert "drawn uniformly from" not in text


@pytest.mark.parametrize(
    ("rows", "tone"),
    [
        ([suspect(), independent()], "good"),
        ([suspect(verdict="inconclusive"), independent()], "unclear"),
        ([suspect(), independent(verdict="supported")], "bad"),
    ],
)
def test_page_headline_turns_red_on_a_false_claim(rows, tone):
    assert {"class": f"headline {tone}"} in Page(to_html(report(*rows))).all("p")


def test_page_asks_for_nothing_and_embeds_its_figures(tmp_path):
    (tmp_path / "bars.png").write_bytes(PNG)
    html = to_html(report(), [ReportFigure(tmp_path / "bars.png", "Bars", "WSR of all suspects")], EXTRAS)
    page = Page(html)
    assert "http:" not in html
    assert "https:" not in html
    assert not re.search(r"url\(|@import", html)
    assert not page.all("link")
    assert not page.all("iframe")
    assert not [attrs for _, attrs in page.elements if "src" in attrs and not attrs["src"].startswith("data:")]
    assert not [attrs for _, attrs in page.elements if "href" in attrs]
    (image,) = page.all("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert image["alt"] == "WSR of all suspects"


def test_policy_allows_exactly_the_one_script():
    page = Page(to_html(report()))
    (policy,) = [attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(page.all("script")) == 1
    assert "addEventListener" in page.script


def test_page_escapes_hostile_texts(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    extras = ReportExtras(
        command=HOSTILE, config=f"</pre>{HOSTILE}", splits={HOSTILE: {HOSTILE: HOSTILE}, "list": [HOSTILE], "n": 3},
        versions={HOSTILE: HOSTILE}, stage_seconds={HOSTILE: 1.0},
    )  # fmt: skip
    figure = ReportFigure(tmp_path / "a.png", HOSTILE, HOSTILE)
    made = report(suspect(HOSTILE, attack=HOSTILE), independent(), experiment=HOSTILE, key=KeyInfo(HOSTILE, True))
    page, plain = Page(to_html(made, [figure], extras)), Page(to_html(report(), [figure], EXTRAS))
    assert len(page.all("script")) == 1
    assert page.script == plain.script
    assert [image["alt"] for image in page.all("img")] == [HOSTILE]
    assert page.text.count(HOSTILE) >= 10
    assert {name for _, attrs in page.elements for name in attrs} <= {name for _, a in plain.elements for name in a}


def test_elements_are_balanced(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    html = to_html(report(*many()), [ReportFigure(tmp_path / "a.png", "t", "a")], EXTRAS)
    for tag in ("table", "tr", "td", "th", "section", "div", "dl", "dd", "p", "details", "pre", "main", "body", "html"):
        opened, closed = len(re.findall(rf"<{tag}[ >]", html)), html.count(f"</{tag}>")
        assert opened == closed, tag


def test_same_report_same_files(tmp_path):
    for name in ("a", "b"):
        write_report(report(), tmp_path / name, extras=EXTRAS)
    for file in ("report.json", "report.html", "summary.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bad_figure_and_bad_directory_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"broken\.png is not a PNG file"):
        write_report(report(), tmp_path / "out", [ReportFigure(tmp_path / "broken.png", "t", "a")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="--output"):
        write_report(report(), tmp_path / "broken.png")


def test_versions_name_what_a_result_depends_on():
    import torch

    assert package_versions()["torch"] == torch.__version__.split("+")[0]
    assert {"python", "lightning", "meadef-lightning"} <= set(package_versions())
