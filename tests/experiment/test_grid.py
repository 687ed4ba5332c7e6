"""Grids: expansion, costs, merged results, and the loop that runs cells. What really trains is in test_paper_grids."""

import signal
import stat
import subprocess
import sys
import time
from itertools import product

import pytest
import yaml
from grids import GRID, NETWORK, changed, report, suspects
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small import EXPERIMENTS

from meadef_lightning.cli import main
from meadef_lightning.experiment.grid import grid_of, read_grid
from meadef_lightning.experiment.grid_cost import duration, seconds_per_operation, seen, work_of
from meadef_lightning.experiment.load import load_experiment


def small(tmp_path, content=GRID):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# ---- expansion


def test_product_without_exclusions_last_axis_fastest():
    cells = grid_of(GRID, EXPERIMENTS).cells()
    wanted = [pair for pair in product(["cnn", "mlp"], "012") if pair != ("mlp", "1")]
    assert [tuple(cell.labels.values()) for cell in cells] == wanted
    assert [cell.number for cell in cells] == [1, 2, 3, 4, 5]
    assert cells[3].name == "mlp-0"


def test_cells_are_chosen_by_name_pattern_and_number():
    grid = grid_of(GRID, EXPERIMENTS)
    assert [cell.name for cell in grid.select(["mlp-*", "2"])] == ["cnn-1", "mlp-0", "mlp-2"]
    assert len(grid.select([])) == 5
    with pytest.raises(MisconfigurationException, match=r"no cell 'mlp-1'. Its 5 cells are cnn-0"):
        grid.select(["cnn-0", "mlp-1"])


def test_a_cell_is_what_meadef_run_makes_of_the_same_files(tmp_path):
    """Against jsonargparse's own merging of files on disk: another network drops arguments that only the old one had."""
    files = [EXPERIMENTS / "digits" / "supervised.yaml"]
    for i, part in enumerate([GRID["overrides"], GRID["axes"]["network"][1]["overrides"], {"seeds": [2]}]):
        files.append(tmp_path / f"{i}.yaml")
        files[-1].write_text(yaml.safe_dump(part))
    wanted = load_experiment(files, ["--experiment", "tests/small/mlp-2"])
    grid = grid_of(GRID, EXPERIMENTS)
    text = grid.experiment(grid.select(["mlp-2"])[0]).yaml()
    assert text == wanted.yaml()
    content = yaml.safe_load(text)
    assert content["victim"]["model"]["init_args"]["network"]["class_path"].endswith("MLP")
    assert (content["victim"]["trainer"], content["seeds"]) == ({"max_epochs": 7}, [2])
    (tmp_path / "cell.yaml").write_text(text)
    assert (
        load_experiment([tmp_path / "cell.yaml"]).yaml() == text
    )  # so that a finished cell is known by its configuration


def test_an_invalid_cell_is_named():
    content = changed()
    content["axes"]["run"][2]["overrides"] = {"victim": {"trainre": 1}}
    grid = grid_of(content, EXPERIMENTS)
    with pytest.raises(
        MisconfigurationException, match=r"Cell 'cnn-2' of the grid 'tests/small' is no experiment.*trainre"
    ):
        grid.experiment(grid.select(["cnn-2"])[0])


AXES = GRID["axes"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"metrics": ["wsr"]}, r"unknown \['metrics'\]"),
        ({"grid": "a b"}, "must be a name"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": {"labels": AXES["run"]}}, "'labels' needs a name.*no column of the results"),
        ({"axes": {"run": []}}, "list of entries, at least one"),
        ({"axes": {"run": [{"name": 0}, {"name": "0"}]}}, "entries of the same name"),
        ({"axes": {"run": [{"name": False}]}}, "named False.*quote them"),
        ({"axes": {"run": [{"name": "0", "override": {}}]}}, r"unknown \['override'\]"),
        ({"axes": {"run": [{"overrides": {}}]}}, r"lacks \['name'\]"),
        ({"axes": {"run": [{"name": "../up"}]}}, "names consist of"),
        ({"axes": {"a": [{"name": "x-y"}, {"name": "x"}], "b": [{"name": "z"}, {"name": "y-z"}]}, "exclude": [], "table": None, "figure": None}, r"several cells are named \['x-y-z'\]"),
        ({"experiment": ["nowhere.yaml"]}, "no file nowhere.yaml"),
        ({"exclude": [{"run": [0, 1, 2]}]}, "leaves no cell"),
        ({"exclude": [{"run": 7}]}, r"run=7 is not among"),
        ({"exclude": [{}]}, "empty combination"),
        ({"table": {"rows": "network", "columns": "group"}}, r"what to do with \['run'\]"),
        ({"table": {"rows": "network", "over": "run"}}, "would average different suspects"),
        ({"table": {"rows": "network", "over": "run", "where": {"kind": "victim"}, "metrics": ["p_value"]}}, "rates of suspects are"),
        ({"table": {"rows": ["network", "colour"], "columns": "group", "over": "run"}}, r"names \['colour'\]"),
        ({"table": {"columns": "group"}}, "needs rows"),
        ({"figure": {"y": ["wsr"]}}, "needs x"),
        ({"figure": {"of": "detection", "x": "target", "y": ["auc"], "over": ["run", "network"]}}, "average different detectors"),
        ({"figure": {"x": "queries", "series": "group", "colour": "red"}}, r"unknown \['colour'\]"),
    ],
)  # fmt: skip
def test_bad_grids_are_refused(members, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        read_grid(small(tmp_path, changed(**members)))


def test_unreadable_grids_are_refused(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("grid: [")
    for file in ("bad.yaml", "none.yaml"):
        with pytest.raises(SystemExit, match="cannot be read"):
            main(["grid", str(tmp_path / file)])


def test_help_does_not_wait_for_torch():
    code = "import sys; from meadef_lightning.cli import main\ntry: main(['grid', '--help'])\nfinally: sys.stderr.write(str('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--wandb" in done.stdout
    assert done.stderr == "False"


# ---- costs


def test_costs_follow_the_formula_of_fully_connected_layers():
    grid = grid_of(GRID, EXPERIMENTS)
    work = work_of(grid.experiment(grid.select(["mlp-0"])[0]))
    forward = 2 * (
        256 * 256 + 256 * 128 + 128 * 10
    )  # the digits' 16x16 pixels, hidden layers of 256 and 128, ten classes
    assert work["victim"] == work["clean"] == work["reference"] == 3 * forward * 7 * 900
    assert work["soft-other-network"] == 3 * forward * 15 * 400 * 8  # eight views of 400 images
    assert {"independent-0", "independent-1", "independent-2"} < set(work)
    assert work["soft"] > work["soft-other-network"]


def test_images_seen_within_the_trainers_limits():
    assert seen(1000, {"max_epochs": 3}, 64) == 3000
    assert seen(1000, {"max_epochs": 3, "limit_train_batches": 2}, 64) == 3 * 128
    assert seen(1000, {"max_epochs": 3, "limit_train_batches": 0.5}, 64) == 1500
    assert seen(1000, {"max_epochs": 3, "max_steps": 10}, 64) == 640
    assert seen(1000, {"max_steps": 10}, 64) == 640


def test_seconds_of_all_stages_over_operations_of_trainings():
    assert seconds_per_operation([(8.0, 4.0), (2.0, None)]) == pytest.approx(2.5)
    assert seconds_per_operation([(2.0, None)]) is None
    assert [duration(value) for value in (45, 700, 7200)] == ["45 s", "12 min", "2.0 h"]


# ---- the loop

MODEL = {"class_path": "meadef_lightning.victims.SupervisedVictim", "init_args": {"network": NETWORK}}
TINY = {
    "experiment": "tiny",
    "data": {"class_path": "meadef_lightning.data.DigitsDataModule"},
    "victim": {"model": MODEL},
    "watermark": {"key": {"public_secret": "tiny"}},
    "independent": [{"name": "independent", "model": MODEL}],
}
"""An experiment that is read quickly."""
FAKE = """#!/bin/sh
# stands for the interpreter: `FAKE -m meadef_lightning run CELL.yaml --output DIR OPTIONS`
echo "$@" >> {calls}
case "$4" in
  */cnn-1/*) echo "Traceback"; echo "meadef run: the data are missing" >&2; exit 1;;
  */cnn-2/*) kill -9 $$;;
esac
cp "$4" "$6/config.yaml"; cp {report} "$6/report.json"
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Cells that take no time: two succeed, one fails with a message, one is killed."""
    from meadef_lightning.experiment.artifacts import write_json_atomic

    write_json_atomic(tmp_path / "report.json", report(suspects(0.7, 0.0, 0.2)).to_dict())
    script = tmp_path / "fake.sh"
    script.write_text(FAKE.format(calls=tmp_path / "calls", report=tmp_path / "report.json"))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("meadef_lightning.experiment.grid_run.sys.executable", str(script))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def test_failures_are_told_and_the_others_go_on(fake, capsys):
    command = [
        "grid",
        str(small(fake, changed(experiment=["tiny.yaml"]))),
        "--output",
        str(fake / "out"),
        "--only",
        "cnn-*",
        "mlp-0",
        "--wandb",
        "--",
        "--wandb_samples",
        "false",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert "2 of 4 cells failed" in out
    assert "cnn-1: the data are missing (see " in out
    assert "cnn-2: killed by SIGKILL" in out
    assert "4/4 mlp-0: done" in err
    assert "2 of 5 cells are done" in (fake / "out" / "grid.md").read_text()
    assert (fake / "out" / "grid.png").exists()
    calls = (fake / "calls").read_text().splitlines()
    assert len(calls) == 4
    directory = fake / "out" / "cnn-0"
    assert (
        calls[0] == f"-m meadef_lightning run {directory}/cell.yaml --output {directory} --wandb --wandb_samples false"
    )

    with pytest.raises(SystemExit):  # again: what is done is left alone
        main([*command[:4], "--only", "cnn-0", "cnn-1"])
    assert len((fake / "calls").read_text().splitlines()) == 5
    assert "1/2 cnn-0: done before" in capsys.readouterr().err

    content = changed(
        experiment=["tiny.yaml"], overrides={"verification": {"samples": 41}}
    )  # another configuration is another result
    main(["grid", str(small(fake, content)), "--output", str(fake / "out"), "--only", "1"])
    assert len((fake / "calls").read_text().splitlines()) == 6


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_sigterm_ends_the_grid_and_its_cell(fake, capsys, monkeypatch, start):
    """The cell sends it to the grid, also while it is still being started, waits to be told itself, and says so."""
    begin = subprocess.Popen.__init__

    def slow(*args, **kwargs):
        begin(*args, **kwargs)
        time.sleep(start)

    monkeypatch.setattr(subprocess.Popen, "__init__", slow)
    (fake / "fake.sh").write_text(
        f"#!/bin/sh\ntrap 'echo told >> {fake}/calls; exit 143' TERM\nkill -TERM $PPID\nwhile :; do sleep 0.05; done\n"
    )
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main(["grid", str(small(fake, changed(experiment=["tiny.yaml"]))), "--output", str(fake / "out")])
    assert stopped.value.code == 143
    assert (fake / "calls").read_text() == "told\n"  # one cell, and no other was begun
    assert "the same command goes on from here" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


def test_dry_run_trains_nothing_and_leaves_commands_that_run(fake, capsys):
    output = fake / "out"
    main(
        [
            "grid",
            str(small(fake, changed(experiment=["tiny.yaml"]))),
            "--output",
            str(output),
            "--dry-run",
            "--only=mlp-2",
        ]
    )
    out = capsys.readouterr().out
    assert "1 of 5 cells" in out
    assert "estimate" in out
    assert not (fake / "calls").exists()
    assert load_experiment([output / "mlp-2" / "cell.yaml"]).name == "tests/small/mlp-2"
    commands = (output / "commands.txt").read_text().splitlines()
    assert len(commands) == 5
    assert commands[4] == f"meadef run {output}/mlp-2/cell.yaml --output {output}/mlp-2"
    with pytest.raises(SystemExit, match="nothing to merge"):
        main(["grid", str(small(fake, changed(experiment=["tiny.yaml"]))), "--output", str(output), "--merge"])


def test_options_of_run_become_part_of_the_cells_and_are_checked_with_them(fake, capsys):
    command = [
        "grid",
        str(small(fake, changed(experiment=["tiny.yaml"]))),
        "--output",
        str(fake / "out"),
        "--only",
        "mlp-2",
    ]
    main([*command, "--dry-run", "--", "--trainer.max_epochs", "7", "--wandb_samples", "false"])
    cell = fake / "out" / "mlp-2" / "cell.yaml"
    assert load_experiment([cell]).config("victim.trainer")["max_epochs"] == 7
    # so that a cell which ran with them counts as done
    main([*command, "--", "--trainer.max_epochs", "7"])
    main([*command, "--", "--trainer.max_epochs", "7"])
    assert "1/1 mlp-2: done before" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"Cell 'mlp-2' .*unrecognized arguments: --bogus 3"):
        main([*command, "--dry-run", "--", "--bogus", "3"])


def test_merge_takes_what_is_done(fake, capsys):
    directory = fake / "out" / "cnn-0"
    directory.mkdir(parents=True)
    for name in ("cell.yaml", "config.yaml"):
        (directory / name).write_text("experiment: a\n")
    (directory / "report.json").write_bytes((fake / "report.json").read_bytes())
    main(["grid", str(small(fake, changed(experiment=["tiny.yaml"]))), "--output", str(fake / "out"), "--merge"])
    assert "1 of 5 cells are done" in capsys.readouterr().out
    assert not (fake / "calls").exists()
