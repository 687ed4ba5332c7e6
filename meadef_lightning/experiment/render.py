"""The readable forms of a report: terminal table, CSV, HTML. Only these show percent."""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import hashlib
import io
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from rich.table import Table

from meadef_lightning.experiment.report import PAPER_THRESHOLD, Report, SuspectRow, Verdict

CSV_COLUMNS = (
    *("experiment", "role", "name", "seed", "kind", "attack", "labels", "queries", "accuracy", "clean_accuracy"),
    *("fidelity", "wsr", "wsr_low", "wsr_high", "wfpr", "p_value", "verdict"),
)
NOT_ASKED = "\N{EN DASH}"  # stands for labels and queries where no oracle was asked


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: the mean, in [0, 1].
        half_width: half the width of its 95 % t-interval; None for a single value.
    """

    mean: float
    half_width: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean and 95 % interval ``t_{0.975, n-1} · s / sqrt(n)`` of n independent values (n = 1: no interval)."""
        from scipy.stats import t

        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return cls(mean, float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n))

    def __str__(self) -> str:
        spread = "" if self.half_width is None else f"±{100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class AggregateRow:
    """The rows of one suspect over seeds; of one seed, the row itself.

    Args:
        name: the suspect's name, without seed where several rows were joined.
        members: the joined rows, at least one; all of one kind, attack and answer type.
    """

    name: str
    members: tuple[SuspectRow, ...]

    def estimate(self, metric: Literal["accuracy", "fidelity", "wsr", "wfpr"]) -> Estimate:
        """Mean and 95 % t-interval of a rate over the members."""
        return Estimate.of([getattr(row, metric) for row in self.members])

    @property
    def first(self) -> SuspectRow:
        """The first member, which stands for kind, attack and answer type."""
        return self.members[0]

    @property
    def queries(self) -> int:
        """Mean number of queries, rounded."""
        return round(math.fsum(row.queries for row in self.members) / len(self.members))

    @property
    def wsr_interval(self) -> tuple[float, float]:
        """95 % interval of the WSR: Wilson's within one model, Student's over seeds (cut to [0, 1])."""
        wsr = self.estimate("wsr")
        if wsr.half_width is None:
            return self.first.wsr_ci
        return max(0.0, wsr.mean - wsr.half_width), min(1.0, wsr.mean + wsr.half_width)

    @property
    def wsr_text(self) -> str:
        """The WSR in percent, as ``84.1 [80, 87]`` for one model and ``84.1±3.2`` over seeds."""
        wsr, (low, high) = self.estimate("wsr"), self.wsr_interval
        return f"{wsr} [{100 * low:.0f}, {100 * high:.0f}]" if wsr.half_width is None else str(wsr)

    @property
    def p_value(self) -> float:
        """The largest p-value: the claim is only as strong as its weakest seed."""
        return max(row.p_value for row in self.members)

    @property
    def verdict(self) -> Verdict:
        """The most frequent verdict; of equally frequent ones the weaker."""
        times = Counter(row.verdict for row in self.members)
        return max(("not supported", "inconclusive", "supported"), key=lambda verdict: times[verdict])

    @property
    def verdict_text(self) -> str:
        """The verdict; where the seeds disagree, with the number of those that gave it."""
        agree = sum(row.verdict == self.verdict for row in self.members)
        return self.verdict if agree == len(self.members) else f"{self.verdict} {agree}/{len(self.members)}"

    @property
    def tone(self) -> Literal["good", "unclear", "bad"]:
        """Whether the verdicts are what they should be for such a model; ``bad`` if any member's is wrong."""
        if any(row.surprising for row in self.members):
            return "bad"
        return "unclear" if any(row.verdict == "inconclusive" for row in self.members) else "good"


def aggregate(rows: Sequence[SuspectRow]) -> list[AggregateRow]:
    """Joins rows that differ only in the ``/seed-<n>`` at the end of their names.

    Args:
        rows: suspects of one report.

    Returns:
        One row a suspect, in order of first appearance. A suspect that occurs once keeps its full name.
    """
    groups: dict[tuple[str, ...], list[SuspectRow]] = {}
    for row in rows:
        groups.setdefault((row.base_name, row.kind, row.attack, row.labels), []).append(row)
    return [
        AggregateRow(members[0].name if len(members) == 1 else name[0], tuple(members))
        for name, members in groups.items()
    ]


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
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"experiment": report.experiment, **line} for line in lines)
    return text.getvalue()


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
