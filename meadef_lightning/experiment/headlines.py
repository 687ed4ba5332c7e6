"""The numbers that stand for a stage or a report where only a few have room: summaries of a tracker, objectives of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from meadef_lightning.experiment.report import Report


def stage_summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a stage's ``result.json`` in one level, lists left out: metrics, a verdict, a removal, a search."""
    numbers = {name: value for name, value in result.items() if not isinstance(value, (Mapping, list))}
    numbers |= result.get("metrics", {})
    if "test_accuracy" in numbers:
        numbers["accuracy"] = numbers["test_accuracy"]
    if "verdict" in result:
        numbers |= verdict_summary(result["verdict"])
    numbers |= {
        f"features/{name}": value
        for name, value in result.get("features", {}).items()
        if isinstance(value, (int, float, str))
    }
    if "curve" in result:
        numbers |= next(point for point in reversed(result["curve"]) if point["strength"] == result["chosen"])
    return numbers


def verdict_summary(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the headline numbers of a verdict, named as in a report."""
    low, high = verdict["wsr_ci"]
    return {
        "accuracy": verdict["natural_accuracy"],
        "wsr": verdict["wsr"],
        "wsr_low": low,
        "wsr_high": high,
        "wfpr": verdict["wfpr"],
        "p_value": verdict["decoy_p"],
        "mcnemar_p": verdict["mcnemar_p"],
        "verdict": verdict["verdict"],
    }


def report_summary(report: Report) -> dict[str, float]:
    """Returns the headline numbers of a report, for sweeps to optimise.

    Among them ``margin``: the lowest watermark success rate of a stolen model minus the highest of an independent one.
    """
    stolen = [row.wsr for row in report.suspects if row.kind == "extracted"]
    others = [row for row in report.suspects if row.kind == "independent"]
    derived = [row for row in report.suspects if row.kind != "independent"]
    numbers: dict[str, float] = {f"victim/{name}": value for name, value in asdict(report.victim).items()}
    numbers["derived"], numbers["independent"] = len(derived), len(others)
    numbers["proven"] = sum(row.verdict == "supported" for row in derived)
    numbers["falsely_claimed"] = sum(row.verdict == "supported" for row in others)
    numbers["independent/wsr_max"] = max(row.wsr for row in others)
    if stolen:
        numbers |= {"stolen/wsr_min": min(stolen), "stolen/wsr_mean": fmean(stolen)}
        numbers["margin"] = min(stolen) - numbers["independent/wsr_max"]
    return numbers
