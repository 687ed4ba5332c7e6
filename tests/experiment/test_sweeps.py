"""Sweep files: of the form that W&B asks for, and of parameters that the experiment has."""

import shlex

import pytest
import yaml
from small import EXPERIMENTS, ROOT
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from meadef_lightning import cli
from meadef_lightning.experiment import pipeline
from meadef_lightning.experiment.headlines import report_summary
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.rows import KeyInfo, SuspectRow, VictimRow

SWEEPS = sorted((EXPERIMENTS / "sweeps").glob("*.yaml"))
METHODS = {"bayes", "random", "grid"}


def corner(parameters):
    """One choice of an agent: the last value of every parameter."""
    return {
        name: {"value": spec["values"][-1] if "values" in spec else spec["max"]} for name, spec in parameters.items()
    }


def report():
    """A report with a theft, for the names of its headline numbers."""
    numbers = {"labels": "soft", "accuracy": 0.9, "fidelity": 0.9, "wsr_ci": (0.0, 1.0), "wfpr": 0.0, "p_value": 0.5}
    rows = [
        SuspectRow(name=kind, kind=kind, attack="none", queries=0, wsr=wsr, verdict="inconclusive", **numbers)
        for kind, wsr in (("victim", 1.0), ("extracted", 0.7), ("independent", 0.1))
    ]
    return Report("x", (0,), KeyInfo("0" * 64, True), VictimRow(0.9, 0.9, 1.0, 0.0), tuple(rows))


def test_there_are_sweeps():
    assert len(SWEEPS) >= 2


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_form(path):
    config = yaml.safe_load(path.read_text())
    assert set(config) <= {"name", "description", "program", "command", "method", "metric", "parameters", "run_cap"}
    assert config["method"] in METHODS
    assert config["metric"]["goal"] in ("maximize", "minimize")
    assert "--wandb" in config["command"]
    assert config["command"][-1] == "${args}"
    for spec in config["parameters"].values():
        assert set(spec) in ({"values"}, {"distribution", "min", "max"})
        assert config["method"] != "grid" or "values" in spec, "a grid needs values"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_wandbs_own_schema(path):
    sweeps = pytest.importorskip("sweeps", reason="the package in which W&B keeps the schema is not installed")
    assert not sweeps.schema_violations_from_proposed_config(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_metric_is_a_number_of_the_report(path):
    assert yaml.safe_load(path.read_text())["metric"]["name"] in report_summary(report())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_agents_command_is_understood(path, monkeypatch):
    """Puts the command together as ``wandb agent`` does, and stops where the experiment would begin."""
    monkeypatch.chdir(ROOT)
    for name, value in (("WANDB_SWEEP_ID", "sweep"), ("WANDB_RUN_ID", "run")):
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(pipeline, "run", lambda *arguments: started.append(arguments) or report())
    sweep = yaml.safe_load(path.read_text())
    values = corner(sweep["parameters"])
    macros = {**create_sweep_command_args({"args": values}), "program": [sweep["program"]]}
    command = []
    for part in create_sweep_command(list(sweep["command"])):
        command += macros[part[2:-1]] if part.startswith("${") else [part]
    program, *arguments = command
    assert program == "meadef"
    cli.main(arguments)
    experiment, output, told, tracking = started.pop()
    assert output.parts[0] == "runs"
    assert output.parts[-2:] == ("sweep", "run")
    assert shlex.split(told)[:2] == ["meadef", "run"]
    assert tracking.wandb
    for name, value in values.items():
        assert experiment.config(name) == value["value"]
