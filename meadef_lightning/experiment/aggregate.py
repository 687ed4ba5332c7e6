"""Suspects over seeds: means with their intervals, and the weakest p-value."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meadef_lightning.experiment.rows import SuspectRow, Verdict


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
        return f"{self}"

    def __format__(self, sign: str) -> str:
        """In percent, as ``84.1±3.2``; ``+`` writes the sign of a difference."""
        spread = "" if self.half_width is None else f"±{100 * self.half_width:.1f}"
        return f"{100 * self.mean:{sign}.1f}{spread}"


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
