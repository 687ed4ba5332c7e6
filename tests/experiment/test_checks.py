"""Mistakes that are told before anything is trained, read or asked."""

import copy
from pathlib import Path

import pytest
import small
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.cli import main
from meadef_lightning.experiment.checks import check_files
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run

TUNING = {"class_path": "meadef_lightning.removal.FineTuning"}


@pytest.fixture(scope="module")
def config():
    return small.shrink(small.merged("digits/supervised.yaml"))


def changed(config, path, value):
    config = copy.deepcopy(config)
    *parents, last = path
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    return config


def removal(**arguments):
    return [{"name": "tune", "of": ["victim"], "method": TUNING, **arguments}]


def search(method, name, *of):
    return [{"name": name, "of": list(of), "method": {"class_path": f"meadef_lightning.detection.{method}"}}]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["experiment"], "../evil", r"experiment='../evil' is the name of a directory below runs/"),
        (["experiment"], "/evil", "without '..'"),
        (["victim", "trainer"], {"max_epoch": 3}, r"The Trainer of victim takes no 'max_epoch'; did you mean 'max_epochs'\?"),
        (["victim", "trainer"], {"max_epochs": 0}, "victim has max_epochs=0, which trains nothing"),
        (["extraction", 1, "trainer"], {"max_epochs": -2}, "extraction 'hard' has max_epochs=-2"),
        (["independent", 0, "trainer"], {"max_steps": 0}, "independent 'independent' has max_steps=0"),
        (["extraction", 0, "budget"], 0, "extraction 'soft' has budget=0, with which it could ask nothing"),
        (["extraction", 0, "budgets"], [0, 10], r"'soft' has budgets=\[0, 10\]; give different numbers of queries, each at least 1"),
        (["extraction", 0, "budgets"], [10, 10], "give different numbers"),
        (["removal"], removal(of=[]), r"removal 'tune' acts on \[\]: name at least one model"),
        (["removal"], removal(of=["victim", "victim"]), "each once"),
        (["removal"], removal(points=-1), "removal 'tune' has points=-1.0, a share of accuracy"),
        (["removal"], removal(of=["clean"]), r"removal acts on \['clean'\], which this experiment does not have. There are: victim, soft"),
        (["detection"], search("LocalOutlierFactor", "lof", "clean", "independent-0"), r"acts on \['independent-0'\].*There are: .*, clean, independent;"),
        (["detection"], search("ABS", "abs", "victim", "clean"), r"detection 'abs' acts on \['clean'\]: a search of models takes the clean"),
        (["removal"], removal(share=0), "removal 'tune' has share=0.0, a share of the attacker's images"),
    ],
)  # fmt: skip
def test_the_specification_alone(config, path, value, message, tmp_path):
    file = small.write(changed(config, path, value), tmp_path / "x.yaml")
    with pytest.raises(MisconfigurationException, match=message):
        load_experiment([file])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["verification", "alpha"], 2, "verification: alpha=2.0 must lie strictly between 0 and 1"),
        (["verification", "samples"], 0, "verification: samples=0 must be at least 1"),
        (["verification", "decoys"], 0, "verification: decoys=0 must be between 1"),
        (["watermark", "callback", "init_args", "start"], 3.0, "watermark.callback: .*start=3"),
        (["extraction", 0, "queries", "init_args", "queries"], 0, "extraction 'soft': queries=0 is less than"),
        (
            ["extraction", 1, "policy"],
            {"class_path": "meadef_lightning.oracle.TopK", "init_args": {"k": 99}},
            "extraction 'hard': TopK keeps k=99 classes, but the victim has 10",
        ),
    ],
)  # fmt: skip
def test_what_stages_refuse_is_told_before_the_first_one(config, path, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("something was trained"))
    file = small.write(changed(config, path, value), tmp_path / "x.yaml")
    with pytest.raises(MisconfigurationException, match=message):
        run(load_experiment([file]), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"experiment: [1\n", "cannot be read as YAML: while parsing a flow sequence"),
        (b"\xe8\x00", "cannot be read as YAML: 'utf-8' codec"),
        (b"", "holds nothing; it must be a mapping of experiment, data"),
        (b"- 1", "holds list; it must be a mapping"),
        (b"grid: x\naxes: {}\n", "is a grid of experiments; run it with: meadef grid"),
        (b"seeds: [1]\n", "can only go on top of an experiment: give that first, e.g. experiments/digits"),
    ],
)
def test_files_that_are_no_experiment(content, message, tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    with pytest.raises(MisconfigurationException, match=r"odd\.yaml") as stop:
        check_files([file])
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_an_overlay_goes_on_top_of_an_experiment_and_a_missing_file_is_named(tmp_path):
    overlay, whole = small.EXPERIMENTS / "overlays" / "paper.yaml", small.EXPERIMENTS / "digits" / "supervised.yaml"
    check_files([whole, overlay])
    check_files([overlay], whole=True)
    with pytest.raises(MisconfigurationException, match=r"no experiment file .*none\.yaml; see experiments/"):
        check_files([whole, tmp_path / "none.yaml"])


def test_every_shipped_experiment_passes():
    for file in Path(small.EXPERIMENTS).glob("*/*.yaml"):
        if (
            "experiment" in (found := yaml.safe_load(file.read_text()))
            and "axes" not in found
            and "command" not in found
        ):
            check_files([file])


def test_the_command_line_says_so(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("seeds: [1]\n")
    with pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path / "x.yaml")])
    assert "can only go on top of an experiment" in str(stop.value.code)
