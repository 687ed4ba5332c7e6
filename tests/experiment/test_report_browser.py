"""``report.html`` in a real browser: on a phone, a desktop and paper, in daylight and in the dark."""

import io
import re

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

from meadef_lightning.experiment.render import ReportExtras, ReportFigure, write_report
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.rows import DetectionRow, KeyInfo, PathPoint, RemovalRow, SuspectRow, VictimRow

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Google Chrome on the PATH")

PHONE, DESKTOP, PAPER = 390, 1280, 718  # the last is A4 without its margins, at 96 dots an inch
LONG = "a-suspect-with-a-name-much-longer-than-a-phone-is-wide-and-without-any-space-in-it"
WSRS = {"soft": 0.93, "hard": 0.41, LONG: 1.0, "victim.FinePruning": 0.09}

# the contrast of every text with what is behind it (WCAG 2.2, 1.4.3), smallest first
CONTRAST = """(() => {
  const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => { const [r, g, b] = numbers(colour); return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
  const behind = node => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor, [, , , alpha = 1] = numbers(colour); if (alpha > 0) return colour; }
    return "rgb(255, 255, 255)"; };
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility()) continue;
    const [low, high] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()"""


def suspects():
    for seed in (0, 1, 2):
        for name, wsr in WSRS.items():
            kind = "removed" if "." in name else "extracted"
            high = min(1, wsr + 0.03)
            # enough digits for numbers to be compared as numbers: 10 queries, 900 queries, 2,000 queries
            queries = {"soft": 2000, "hard": 900}.get(name, 10)
            yield SuspectRow(
                f"{name}/seed-{seed}", kind, "distillation", "hard" if name == "hard" else "soft", queries, 0.9, 0.95,
                wsr, (max(0, wsr - 0.03), high), 0.02, 0.5 ** (10 * wsr), "supported" if wsr > 0.9 else "inconclusive",
            )  # fmt: skip
        yield SuspectRow(
            f"independent/seed-{seed}",
            "independent",
            "",
            "soft",
            0,
            0.91,
            0.9,
            0.01,
            (0, 0.03),
            0.01,
            0.6,
            "not supported",
        )


def curve(end):
    return tuple(PathPoint(i, 0.95 - 0.01 * i, 1 - (1 - end) * i / 4, 0.02) for i in range(5))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    ramp = np.broadcast_to(np.linspace(0, 255, 1600, dtype=np.uint8)[None, :, None], (900, 1600, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(directory / "ramp.png")
    figures = [ReportFigure(directory / "ramp.png", f"Figure {i}", f"A ramp, the {i}th") for i in range(3)]
    report = Report(
        "digits/robustness",
        (0, 1, 2),
        KeyInfo("ab" * 32, True),
        VictimRow(0.969, 0.972, 1.0, 0.012),
        tuple(suspects()),
        removal=tuple(
            RemovalRow(f"{target}.FinePruning", target, "FinePruning", "share of channels", 0.05, 3, curve(end))
            for target, end in (("victim", 0.9), ("patched", 0.05))
        ),
        detection=(
            DetectionRow("STRIP", "victim", "inputs", 0.9, 0.5, False, 0.52, 0.02, 0.01),
            DetectionRow("STRIP", "patched", "inputs", 0.2, 0.5, True, 1.0, 1.0, 0.02),
            DetectionRow("NeuralCleanse", "victim", "model", 1.5, 2.0, False, None, None, 0.0, 0.0, 25.5),
            DetectionRow("NeuralCleanse", "patched", "model", 12.0, 2.0, True, 0.95, None, 0.0, 1.0),
        ),
    )
    extras = ReportExtras(
        command=f"meadef run experiments/digits/robustness.yaml --output 'runs/{LONG}/{LONG}'",
        config="data:\n  class_path: meadef_lightning.data.DigitsDataModule\n" + f"  note: {LONG}{LONG}\n" * 3,
        splits={"victim": {"size": 700, "sha256": "cd" * 32}, "attacker": {"size": 600, "sha256": "ef" * 32}},
        stage_seconds={"victim": 31.2, "extraction": 12.0},
        alpha=1e-3,
    )
    write_report(report, directory, figures, extras)
    return (directory / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("dark", [False, True])
def test_screens(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    browser.js("document.querySelectorAll('details').forEach(details => details.open = true)")
    pixels = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"))
    assert pixels.shape[1] == width  # and so nothing sticks out
    assert browser.js("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert (np.median(pixels) < 60) == dark
    assert len(np.unique(pixels)) > 100
    assert (pixels.std(axis=1) > 1).mean() > 0.3  # rows of pixels with something on them
    assert browser.complaints() == []
    contrast, text = browser.js(CONTRAST)[0]
    assert contrast >= 4.5, text
    assert browser.js("[...document.images].every(image => image.naturalWidth === 1600 && image.alt)")


def test_what_sticks_out_and_what_phones_home_is_noticed(browser, tmp_path):
    """The checks above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta name="viewport" content="width=device-width"><p style="width: 900px; color: #999">wide</p>'
        '<script>console.error("oops"); throw Error("x")</script><img src="http://127.0.0.1:9/x.png">'
    )
    browser.open(bad.as_uri(), PHONE)
    assert browser.js("document.documentElement.scrollWidth") > PHONE
    complaints = str(browser.complaints())
    for expected in ("oops", "Error: x", "http://127.0.0.1:9/x.png"):
        assert expected in complaints
    assert browser.js(CONTRAST)[0][0] == pytest.approx(2.85, abs=0.01)  # #999 on white


def column(browser, table, heading):
    """Clicks a heading and returns the first cells and that column's."""
    table = f'[aria-label="{table}"] table'
    heads = browser.js(f"[...document.querySelectorAll('{table} thead th')].map(head => head.textContent)")
    number = heads.index(heading) + 1
    browser.click(f"{table} thead th:nth-child({number}) button")
    return browser.js(
        f"[...document.querySelectorAll('{table} tbody tr')].map(row => [row.cells[0].textContent, row.cells[{number - 1}].textContent])"
    )


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_tables_are_sorted_by_a_click(browser, page, width):
    browser.open(page, width)
    suspects, searches, removals = "Suspects", "Searches", "Attempts to remove it"
    expected = sorted(WSRS | {"independent": 0.01}, key=(WSRS | {"independent": 0.01}).get)
    assert [name for name, _ in column(browser, suspects, "WSR")] == expected
    assert [name for name, _ in column(browser, suspects, "WSR")] == expected[::-1]
    assert [text for _, text in column(browser, suspects, "queries")] == ["10", "10", "900", "2,000", "\N{EN DASH}"]
    assert [text for _, text in column(browser, suspects, "queries")] == ["2,000", "900", "10", "10", "\N{EN DASH}"]
    assert [text for _, text in column(browser, searches, "AUC")] == ["0.52", "0.95", "1.00", "\N{EN DASH}"]
    assert [text for _, text in column(browser, searches, "found")] == ["2 %", "100 %", "\N{EN DASH}", "\N{EN DASH}"]
    assert [text for _, text in column(browser, searches, "named target")][:2] == ["0 %", "100 %"]
    assert [text for _, text in column(browser, searches, "key rank")] == ["25.5", *["\N{EN DASH}"] * 3]
    assert [text for _, text in column(browser, searches, "score")] == ["0.2", "0.9", "1.5", "12"]
    assert [text for _, text in column(browser, removals, "WSR after")] == ["28.8", "92.5"]
    assert browser.js("document.querySelectorAll('[aria-sort]').length") == 3
    assert browser.complaints() == []


def test_a_keyboard_sorts_too(browser, page):
    browser.open(page)
    browser.js("document.querySelector('thead th:nth-child(4) button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    assert browser.js("document.querySelector('tbody th').textContent") == "independent"
    assert browser.js("document.querySelector('thead th:nth-child(4)').ariaSort") == "ascending"


def test_the_accessibility_tree_names_tables_headings_and_pictures(browser, page):
    browser.open(page)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    assert [name for role, name in named if role == "image"] == [f"A ramp, the {i}th" for i in range(3)]
    assert {"Suspects", "Searches", "Attempts to remove it"} <= {name for role, name in named if role == "region"}
    assert {"WSR", "AUC", "WSR after"} <= {name for role, name in named if role == "columnheader"}
    assert {"soft", "STRIP"} <= {name for role, name in named if role == "rowheader"}


def test_paper(browser, page):
    browser.open(page, PAPER, media="print")
    sides = browser.js("[...document.querySelectorAll('table, pre, img')].map(e => e.getBoundingClientRect().right)")
    assert max(sides) <= PAPER
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8
