"""The forms of a report for people: table, CSV and page."""

import base64
import csv
import dataclasses
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest

# the published schema, value by value; "a|b" lists what an enumeration allows
from reports import HOSTILE, PNG, independent, report, suspect, three_seeds
from rich.console import Console

from meadef_lightning.experiment.aggregate import aggregate
from meadef_lightning.experiment.artifacts import OutputError
from meadef_lightning.experiment.render import (
    CSV_COLUMNS,
    NOT_ASKED,
    ReportExtras,
    ReportFigure,
    detection_table,
    format_p,
    headline,
    package_versions,
    summary_table,
    to_csv,
    to_html,
    write_report,
)
from meadef_lightning.experiment.rows import DetectionRow, KeyInfo

# --- terminal


def shown(made, table=summary_table, **console):
    out = io.StringIO()
    Console(file=out, **console).print(table(made))
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


SEARCHES = (
    DetectionRow("activation-clustering", "independent-0", "inputs", 0.5, 0.25, True, 1.0, 0.9, 0.01),
    DetectionRow("mixture-scan", "victim", "model", 4.0, 3.5, True, 0.75, 1.0, 0.25, 0.0, 12.5),
)


@pytest.mark.parametrize("width", [80, 120])
def test_searches_say_whether_they_named_the_marks_class(width):
    text = shown(report(detection=SEARCHES), detection_table, width=width)
    assert "…" not in text
    assert re.search(rf"1\.00 +90 % +1 % +0\.5 +0\.25 +{NOT_ASKED} +{NOT_ASKED} +marked", text)
    assert re.search(r"0\.75 +100 % +25 % +4 +3\.5 +0 % +12\.5 +marked", text)


def test_the_page_says_so_too():
    page = to_html(report(detection=SEARCHES))
    told = re.findall(r'data-value="([^"]*)">([^<]*)</td>', page[page.index("Searches for the watermark") :])
    assert told[5:7] == [("", NOT_ASKED)] * 2
    assert told[12:14] == [("0.0", "0 %"), ("12.5", "12.5")]


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
