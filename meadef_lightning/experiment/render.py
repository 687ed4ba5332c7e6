"""The readable forms of a report: terminal table, CSV, HTML. Only these show percent."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meadef_lightning.experiment.aggregate import AggregateRow, aggregate
from meadef_lightning.experiment.artifacts import csv_text, make_directory, write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from rich.table import Table

from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.rows import PAPER_THRESHOLD

CSV_COLUMNS = (
    *("experiment", "role", "name", "seed", "kind", "attack", "labels", "queries", "accuracy", "clean_accuracy"),
    *("fidelity", "wsr", "wsr_low", "wsr_high", "wfpr", "p_value", "verdict"),
)
NOT_ASKED = "\N{EN DASH}"  # stands for labels and queries where no oracle was asked


def _claims(report: Report) -> tuple[int, int, int, int]:
    """Supported and all suspects derived from the victim, supported and all independent ones."""
    owned = [row.verdict == "supported" for row in report.suspects if row.kind != "independent"]
    others = [row.verdict == "supported" for row in report.suspects if row.kind == "independent"]
    return sum(owned), len(owned), sum(others), len(others)


def headline(report: Report) -> str:
    """The result in one sentence: thefts proven, and false claims."""
    proven, owned, false, others = _claims(report)
    return (
        f"Ownership is supported for {proven} of {owned} models derived from the victim, "
        f"and falsely claimed for {false} of {others} independent models."
    )


def format_p(p_value: float) -> str:
    """A p-value with two significant digits, in at most seven characters."""
    return f"{p_value:.2g}"


def summary_table(report: Report) -> Table:
    """The report as a compact table for a terminal of 100 columns; rich drops the colours where there is none.

    Args:
        report: what to show. Suspects of several seeds are joined: mean ± 95 % t-interval, largest p-value.

    Returns:
        A rich table; print it with ``rich.console.Console().print``.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    victim = report.victim
    table = Table(
        title=Text(report.experiment, style="bold"),
        caption=Text(
            f"{headline(report)}\n"
            f"Rates in % with 95 % intervals. Victim: accuracy {100 * victim.accuracy:.1f} (without watermark "
            f"{100 * victim.clean_accuracy:.1f}), WSR {100 * victim.wsr:.1f}, WFPR {100 * victim.wfpr:.1f}."
        ),
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("suspect", overflow="fold", min_width=12)
    for name in ("kind", "labels"):
        table.add_column(name, no_wrap=True)
    for name in ("queries", "acc.", "fid.", "WSR", "WFPR", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    colours = {"good": "green", "unclear": "yellow", "bad": "bold red"}
    for row in aggregate(report.suspects):
        asked = row.first.kind in ("extracted", "removed")
        table.add_row(
            Text(row.name),
            row.first.kind,
            row.first.labels if asked else NOT_ASKED,
            f"{row.queries:,}" if asked else NOT_ASKED,
            *(str(row.estimate("accuracy")), str(row.estimate("fidelity")), row.wsr_text, str(row.estimate("wfpr"))),
            format_p(row.p_value),
            Text(row.verdict_text, style=colours[row.tone]),
        )
    return table


def detection_table(report: Report) -> Table:
    """What the searches for a watermark found, as a compact table for a terminal.

    Args:
        report: what to show.

    Returns:
        A rich table, one row a detector and model.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="Searches for a watermark", box=box.SIMPLE_HEAD, padding=0, show_edge=False, title_justify="left"
    )
    for name in ("search", "in", "of"):
        table.add_column(name, overflow="fold")  # on a narrow terminal, rather than cut
    for name in ("AUC", "found", "false\nalarms", "score", "threshold", "named\ntarget", "key\nrank"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    for row in report.detection:
        rates = (NOT_ASKED if rate is None else f"{100 * rate:.0f} %" for rate in (row.true_rate, row.false_rate))
        table.add_row(
            Text(row.attack),
            Text(row.target),
            row.level,
            NOT_ASKED if row.auc is None else f"{row.auc:.2f}",
            *rates,
            *(f"{value:.3g}" for value in (row.score, row.threshold)),
            NOT_ASKED if row.named_target is None else f"{100 * row.named_target:.0f} %",
            NOT_ASKED if row.key_rank is None else f"{row.key_rank:.6g}",
            Text("marked" if row.decision else "clean", style="yellow" if row.decision else ""),
        )
    return table


def package_versions() -> dict[str, str]:
    """Versions of what a result depends on, by package name; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in ("meadef-lightning", "torch", "torchvision", "lightning", "torchmetrics", "torchjd", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@dataclass(frozen=True)
class ReportFigure:
    """A PNG file to embed in ``report.html``.

    Args:
        path: the file.
        title: caption below the picture.
        alt: what the picture shows, for people who do not see it.
    """

    path: str | os.PathLike[str]
    title: str
    alt: str

    @property
    def data_uri(self) -> str:
        """The file as a ``data:`` URI; raises ValueError if it is not a PNG."""
        data = Path(self.path).read_bytes()
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"{self.path} is not a PNG file; draw the figure again")
        return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


@dataclass(frozen=True)
class ReportExtras:
    """What ``report.html`` tells besides the results; every part may be missing. Never holds anything of the key.

    Args:
        command: the shell command that reproduces the experiment.
        config: its configuration as YAML.
        splits: `SplitDataModule.split_summary()`: per split its size and digest.
        versions: package versions, by name.
        stage_seconds: time spent, by stage.
        alpha: significance level that was fixed before the verification.
    """

    command: str = ""
    config: str = ""
    splits: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=package_versions)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    alpha: float | None = None


def to_csv(report: Report) -> str:
    """The report as CSV with the columns `CSV_COLUMNS`: the victim, then one line a suspect; rates are fractions."""
    lines: list[dict[str, Any]] = [{**dataclasses.asdict(report.victim), "role": "victim", "name": "victim"}]
    lines[0]["kind"] = "victim"
    for row in report.suspects:
        low, high = row.wsr_ci
        lines.append({**dataclasses.asdict(row), "role": "suspect", "seed": row.seed, "wsr_low": low, "wsr_high": high})
    return csv_text(CSV_COLUMNS, ({"experiment": report.experiment, **line} for line in lines))


def to_html(report: Report, figures: Sequence[ReportFigure] = (), extras: ReportExtras | None = None) -> str:
    """The report as one HTML page that asks for nothing from the network; all texts are escaped.

    Args:
        report: what to show.
        figures: PNG files to embed, in this order.
        extras: how the result came about.

    Raises:
        ValueError: if a figure is not a PNG file.
    """
    import jinja2

    # a policy by hash: should a hostile text ever get through the escaping, it still could not run or phone home
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["csp_hash"] = lambda script: base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.filters["format_p"] = format_p
    template = resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8")
    proven, owned, false, _ = _claims(report)
    return environment.from_string(template).render(
        report=report,
        headline=headline(report),
        tone="bad" if false else "good" if proven == owned else "unclear",
        rows=aggregate(report.suspects),
        single_rows=[AggregateRow(row.name, (row,)) for row in report.suspects],
        removals=[
            (row, row.curve[0], next((point for point in row.curve if point.strength == row.chosen), None))
            for row in report.removal
        ],
        paper_threshold=PAPER_THRESHOLD,
        figures=figures,
        extras=extras or ReportExtras(),
    )


def write_report(
    report: Report,
    directory: str | os.PathLike[str],
    figures: Sequence[ReportFigure] = (),
    extras: ReportExtras | None = None,
) -> Path:
    """Writes ``report.html``, ``summary.csv`` and, last, ``report.json``, each atomically.

    Args:
        report: what was found.
        directory: where to; created if need be.
        figures: PNG files to embed in the page.
        extras: what the page tells besides the results.

    Returns:
        The path of ``report.json``.

    Raises:
        ValueError: if a figure is not a PNG file.
        OutputError: if the directory cannot be written.
    """
    page = to_html(report, figures, extras)
    root = make_directory(directory)
    write_text_atomic(root / "report.html", page)
    write_text_atomic(root / "summary.csv", to_csv(report))
    return write_json_atomic(root / "report.json", report.to_dict())
