"""The shipped grids: each of them is read and expanded, and one cell of a reduced Table I really runs."""

import csv
import os
import re
import subprocess

import pytest
import yaml
from small import EXPERIMENTS, QUIET, SIZES, TRAINER, VERIFICATION, fake_fashion_mnist

from meadef_lightning.cli import main
from meadef_lightning.experiment.grid import read_grid
from meadef_lightning.experiment.load import load_experiment

FILES = sorted([*(EXPERIMENTS / "paper").glob("*.yaml"), EXPERIMENTS / "digits" / "grid.yaml"])
SCHEDULERS = EXPERIMENTS / "schedulers"
SHORT = {**TRAINER, **QUIET}
NETWORK = {"network": {"class_path": "meadef_lightning.victims.networks.MLP"}}


def covering(grid):
    """Cells of the first run that together show every entry of every other axis."""
    missing = {(axis, choice.name) for axis, choices in grid.axes.items() for choice in choices if axis != "run"}
    first = [cell for cell in grid.cells() if cell.labels["run"] == "0"]
    found = first[:1]
    for cell in first:
        labels = set(cell.labels.items())
        # a cell whose entries are all new, else the product would be read
        if labels & missing and not (labels - {("run", "0")}) - missing:
            found = found if cell is first[0] else [*found, cell]
            missing -= labels
    return found, missing


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_entry_of_every_axis_is_an_experiment(file):
    grid = read_grid(file)
    assert grid.name == file.relative_to(EXPERIMENTS).with_suffix("").as_posix()
    assert grid.table is not None
    assert grid.figure is not None
    cells, missing = covering(grid)
    assert not missing
    for cell in cells:
        experiment = grid.experiment(cell)
        assert (experiment.name, experiment.seeds) == (f"{grid.name}/{cell.name}", [0])
    for number, run in enumerate(grid.axes["run"]):  # runs differ in seed, and at most in key
        assert set(run.overrides) <= {"seeds", "watermark"}
        assert run.overrides["seeds"] == [number]


def test_a_page_says_which_grid_is_which_table_and_figure():
    page = (EXPERIMENTS / "paper" / "README.md").read_text("utf-8")
    named = re.findall(r"\]\((\w+\.yaml)\)", page)
    assert sorted(named) == [file.name for file in FILES if file.parent.name == "paper"]


def reduced_table(tmp_path):
    """Table I with one data set, synthetic, two runs, and trainings of three steps of a network that is quick."""
    content = yaml.safe_load((EXPERIMENTS / "paper" / "table1.yaml").read_text())
    data_set = content["axes"]["data_set"][0]
    assert data_set["name"] == "fashion_mnist"
    arguments = {**SIZES, "root": str(fake_fashion_mnist(tmp_path / "data")), "download": False, "batch_size": 16}
    thefts = data_set["overrides"]["extraction"]
    for theft in thefts:
        theft |= {
            "trainer": SHORT,
            "student": {"class_path": "meadef_lightning.extraction.Student", "init_args": NETWORK},
        }
    thefts[1]["queries"]["init_args"] = {"seeds": 10, "rounds": 1, "epochs": 1}
    thefts[2]["queries"]["init_args"] = {"queries": 24, "pool": {"class_path": "meadef_lightning.extraction.Photographs", "init_args": {"size": 40}}}  # fmt: skip
    data_set["overrides"] |= {
        "data": {"init_args": arguments},
        "victim": {"model": {"init_args": NETWORK}, "trainer": SHORT},
        "independent": [{"name": "independent", "count": 1, "model": {"class_path": "meadef_lightning.victims.SupervisedVictim", "init_args": NETWORK}, "trainer": SHORT}],
        "verification": VERIFICATION,
    }  # fmt: skip
    content["axes"] = {"data_set": [data_set], "run": content["axes"]["run"][:2]}
    path = tmp_path / "table1.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_reduced_table_of_the_paper(tmp_path, capfd):
    """One of two cells runs, by `meadef run` in a process of its own; the merged files hold it, the plan knows what it took."""
    command = ["grid", str(reduced_table(tmp_path)), "--output", str(tmp_path / "out")]
    main([*command, "--only", "fashion_mnist-1"])
    with (tmp_path / "out" / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["suspect"] for row in rows] == [
        "victim",
        "clean",
        "distillation",
        "jacobian",
        "knockoff",
        "independent",
    ]
    assert {(row["data_set"], row["run"], row["seed"]) for row in rows} == {("fashion_mnist", "1", "1")}
    text = (tmp_path / "out" / "grid.md").read_text()
    assert "| fashion_mnist |" in text
    assert "1 of 2 cells are done" in text
    assert (tmp_path / "out" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "Ownership is supported" in (tmp_path / "out" / "fashion_mnist-1" / "run.log").read_text()
    capfd.readouterr()
    main([*command, "--dry-run"])
    plan = capfd.readouterr().out
    assert "2 of 2 cells" in plan
    assert "times follow the stages that are done" in plan
    assert "~" in plan.split("fashion_mnist-0", 1)[1].split("open", 1)[1][:60]  # calibrated by the other cell


def test_the_sweep_names_the_cells_of_its_grid(tmp_path, capsys):
    sweep = yaml.safe_load((SCHEDULERS / "wandb_sweep.yaml").read_text())
    grid = EXPERIMENTS / "digits" / "grid.yaml"
    assert sweep["parameters"]["only"]["values"] == [cell.name for cell in read_grid(grid).cells()]
    cell = sweep["parameters"]["only"]["values"][5]
    assert sweep["command"][:2] == ["meadef", "grid"]
    assert sweep["command"][2] == "experiments/digits/grid.yaml"
    # as the agent fills it in
    arguments = [f"--only={cell}" if part == "${args}" else part for part in [str(grid), *sweep["command"][3:]]]
    main(["grid", *arguments, "--dry-run", "--output", str(tmp_path)])
    assert "1 of 8 cells" in capsys.readouterr().out
    assert load_experiment([tmp_path / cell / "cell.yaml"]).name == f"digits/grid/{cell}"
    assert all(line.endswith(" --wandb") for line in (tmp_path / "commands.txt").read_text().splitlines())


def test_the_slurm_script_runs_the_line_of_its_task(tmp_path):
    (tmp_path / "commands.txt").write_text('meadef run a\nmeadef run "b c"\nmeadef run d\n')
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(
        ["bash", str(SCHEDULERS / "slurm_array.sh"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "meadef|run|b c|"
