"""What W&B is told of an experiment, read back from the files of its offline runs."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small import merged, shrink, write
from wandb_records import offline_runs

from meadef_lightning.cli import main
from meadef_lightning.experiment.headlines import report_summary
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.tracking import Tracker, Tracking, default_output, public
from meadef_lightning.verification import check_evidence
from meadef_lightning.watermark import WatermarkKey

SECRET = "correct horse battery staple"  # noqa: S105
STAGES = {
    **dict.fromkeys(("reference", "victim", "clean", "independent"), "train"),
    "soft": "extract",
    "victim.noise": "remove",
    "search-strip-victim": "detect",
    **{f"verify-{name}": "verify" for name in ("victim", "clean", "soft", "independent", "victim.noise")},
    "report": "report",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def config():
    config = shrink(merged("digits/supervised.yaml"), {"max_epochs": 2, "limit_val_batches": 1}, batch_size=20)
    config["extraction"] = config["extraction"][:1]
    noise = {"class_path": "meadef_lightning.removal.WeightNoise"}
    config["removal"] = [{"name": "noise", "method": noise}]
    config["detection"] = [
        {"name": "strip", "method": {"class_path": "meadef_lightning.detection.STRIP", "init_args": {"overlays": 5}}}
    ]
    return config


@pytest.fixture(scope="module")
def tracked(config, tmp_path_factory):
    """Runs the same command twice in one directory; the secret stands on the command line, where W&B would look for it."""
    root = tmp_path_factory.mktemp("tracked")
    arguments = ["run", str(write(config, root / "small.yaml")), "--output", str(root / "out"), "--wandb"]
    arguments += ["--watermark.key.public_secret", SECRET]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_PROJECT", "thieves")
        patch.setattr(sys, "argv", ["meadef", *arguments])
        main(arguments)
        before = sorted((root / "out" / "wandb").iterdir())
        main(arguments)
        assert sorted((root / "out" / "wandb").iterdir()) == before, "the second run told something again"
    return root / "out"


@pytest.fixture(scope="module")
def runs(tracked):
    found = offline_runs(tracked)
    assert len(found) == len(STAGES)
    return {run.name: run for run in found}


@pytest.fixture(scope="module")
def key(tracked):
    return WatermarkKey.load(tracked / "watermark.key.json")


def columns(path):
    """Rows of a CSV file of metrics, numbers as numbers, empty cells left out."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def told_metrics(run):
    """Rows of a training's metrics, named as in a CSV file."""
    return [
        {"step" if name == "trainer/global_step" else name: value for name, value in row.items()}
        for row in run.rows("_step")
    ]


def test_one_finished_run_for_every_stage(runs):
    assert {name: run.kind for name, run in runs.items()} == STAGES
    assert {run.group for run in runs.values()} == {"digits/supervised"}
    assert {run.project for run in runs.values()} == {"thieves"}
    assert len({run.id for run in runs.values()}) == len(STAGES)
    assert all(run.kinds[-1] == "exit" for run in runs.values())


def test_every_run_has_the_whole_configuration_and_of_the_key_the_commitment(runs, config, key):
    for name, run in runs.items():
        assert run.config["data"]["init_args"]["victim_size"] == config["data"]["init_args"]["victim_size"]
        assert run.config["watermark"]["callback"]["init_args"]["start"] == 0.3
        assert run.config["extraction"][0]["queries"]["init_args"]["views"] == 2
        assert run.config["key"] == {"commitment": key.commitment(), "drawn_uniformly": True}
        assert "key" not in run.config["watermark"]
        assert run.config["stage"]["name"] == name
        assert "torch" in run.config["versions"]


@pytest.mark.parametrize("name", ["victim", "soft"])
def test_history_is_that_of_the_training(runs, tracked, name):
    rows = columns(tracked / name / "metrics.csv")
    assert told_metrics(runs[name]) == [pytest.approx(row) for row in rows]
    assert len(rows) > 4
    assert [row["_step"] for row in runs[name].history] == list(range(len(rows)))
    result = json.loads((tracked / name / "result.json").read_text())
    assert runs[name].summary["accuracy"] == result["metrics"]["test_accuracy"]


def test_verdicts_are_summaries(runs, tracked):
    report = Report.load(tracked / "report.json")
    for row in report.suspects:
        summary = runs[f"verify-{row.name}"].summary
        for name in ("accuracy", "fidelity", "wsr", "wfpr", "p_value", "verdict"):
            assert summary[name] == getattr(row, name)
        assert (summary["wsr_low"], summary["wsr_high"]) == row.wsr_ci
        assert list(runs[f"verify-{row.name}"].pictures()) == ["figures/decoys"]


def test_removals_are_curves(runs, tracked):
    (row,) = json.loads((tracked / "report.json").read_text())["removal"]
    assert runs["victim.noise"].rows("_step")[:-1] or len(row["curve"]) == 1
    told = [point for point in runs["victim.noise"].rows("_step") if "removal/strength" in point]
    assert told == [{f"removal/{name}": value for name, value in point.items()} for point in row["curve"]]


def test_report_is_tables_and_pictures(runs, tracked):
    run, report = runs["report"], json.loads((tracked / "report.json").read_text())
    suspects = run.table("suspects")
    for told, row in zip(suspects, report["suspects"], strict=True):
        low, high = row.pop("wsr_ci")
        assert told == {**row, "wsr_low": low, "wsr_high": high}
    assert run.table("detection") == report["detection"]
    points = [{**row, **point} for row in report["removal"] for point in row.pop("curve")]
    assert run.table("removal") == points
    pictures = run.pictures()
    assert set(pictures) == {f"figures/{name}" for name in ("wsr", "samples", "features", "decoys", "removal-victim")}
    assert pictures["figures/samples"][0].read_bytes() == (tracked / "figures" / "samples.png").read_bytes()
    assert run.summary["victim/accuracy"] == report["victim"]["accuracy"]
    kind, files = run.artifacts["digits-supervised-report-files"]
    assert (kind, sorted(files)) == ("report", ["report.json", "summary.csv"])


def test_margin_is_the_gap_between_thefts_and_others(tracked):
    report = Report.load(tracked / "report.json")
    wsr = {row.name: row.wsr for row in report.suspects}
    summary = report_summary(report)
    assert summary["margin"] == pytest.approx(wsr["soft"] - max(wsr["clean"], wsr["independent"]))
    assert (summary["derived"], summary["independent"]) == (3, 2)


def test_evidence_and_weights_are_artifacts(runs, tracked, key):
    kind, files = runs["verify-soft"].artifacts["digits-supervised-verify-soft-evidence"]
    assert (kind, list(files)) == ("evidence", ["evidence.json"])
    assert check_evidence(files["evidence.json"], key).wsr == runs["verify-soft"].summary["wsr"]
    assert tracked in files["evidence.json"].parents, "it must not lie in the home directory, whence nobody copies it"
    kind, files = runs["victim"].artifacts["digits-supervised-victim-model"]
    assert kind == "model"
    assert files["checkpoints/model.ckpt"] == tracked / "victim" / "checkpoints" / "model.ckpt"
    described = yaml.safe_load(files["config.yaml"].read_text())
    assert described["model"]["class_path"].endswith("SupervisedVictim")


def test_nothing_of_the_key_is_in_anything_that_would_be_sent(runs, tracked, key):
    fields = [
        field for field in key.to_dict() if field not in ("drawn_uniformly", "num_classes", "seed", "space", "combiner")
    ]
    secrets = [
        SECRET,
        key.salt,
        "public_secret",
        "watermark.key",
        *(f'"{name}"' for name in fields if name != "schema_version"),
    ]
    sent = [path for path in (tracked / "wandb").rglob("*") if path.is_file()]
    sent += [path for run in runs.values() for _, files in run.artifacts.values() for path in files.values()]
    assert len(sent) > 50
    for path in sent:
        content = path.read_bytes()
        found = [word for word in secrets if word.encode() in content or json.dumps(word).encode()[1:-1] in content]
        # "target_class" is also an argument of patch backdoors, which are no secret; there is none here
        assert not found, (path, found)
    # the search can find what it looks for
    assert SECRET.encode() in (tracked / "config.yaml").read_bytes()
    assert key.salt.encode() in (tracked / "watermark.key.json").read_bytes()


def test_finished_stages_are_told_afterwards_and_an_agent_gets_the_report(tracked, config, tmp_path, monkeypatch):
    """Part of the record is gone, as if the experiment had run without W&B; now an agent asks for it, without weights and samples."""
    output = tmp_path / "out"
    shutil.copytree(tracked, output, ignore=shutil.ignore_patterns("wandb"))
    for directory in ("victim", "."):
        (output / directory / "wandb.json").unlink()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "run456")
    assert default_output("a/b") == Path("runs/a/b/sweep123/run456")
    options = [
        "--wandb",
        "--wandb_checkpoints",
        "false",
        "--wandb_samples",
        "false",
        "--watermark.key.public_secret",
        SECRET,
    ]
    main(["run", str(write(config, tmp_path / "small.yaml")), "--output", str(output), *options])
    victim, report = offline_runs(output)
    assert told_metrics(victim) == [pytest.approx(row) for row in columns(output / "victim" / "metrics.csv")]
    assert (victim.sweep, report.sweep) == ("", "sweep123")
    assert victim.id != "run456" == report.id
    assert {victim.group, report.group} == {"digits/supervised/run456"}
    assert not victim.artifacts
    assert set(report.pictures()) == {"figures/wsr", "figures/decoys", "figures/removal-victim"}


def test_a_single_verdict_is_told(tracked, tmp_path, key):
    data = yaml.safe_load((tracked / "config.yaml").read_text())["data"]
    (tmp_path / "verify.yaml").write_text(yaml.safe_dump({"data": data}))
    arguments = ["verify", "--config", str(tmp_path / "verify.yaml"), "--key", str(tracked / "watermark.key.json")]
    arguments += ["--suspect", str(tracked / "soft"), "--output", str(tmp_path / "out"), "--wandb"]
    arguments += ["--verification.samples", "40", "--verification.decoys", "99", "--verification.decoy_samples", "4"]
    main(arguments)
    main(arguments)
    for run in offline_runs(tmp_path / "out"):
        verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
        assert (run.name, run.kind, run.group, run.project) == ("soft", "verify", "verify", "meadef")
        assert run.config["key"]["commitment"] == key.commitment()
        assert run.config["verification"]["samples"] == 40
        assert run.table("suspects")[0]["p_value"] == run.summary["p_value"] == verdict["decoy_p"]
        assert list(run.pictures()) == ["figures/decoys"]
        assert run.artifacts["verify-soft-evidence"][0] == "evidence"
    assert len(offline_runs(tmp_path / "out")) == 2


def test_without_wandb_there_are_csv_files_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="wandb is not installed.*CSV"):
        tracker = Tracking(wandb=True).tracker(tmp_path, "x", {})
    assert type(tracker) is Tracker
    assert type(Tracking().tracker(tmp_path, "x", {})) is Tracker
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert type(Tracking(wandb=True).tracker(tmp_path, "x", {})) is Tracker


def test_a_run_that_is_under_way_is_not_taken_over(tmp_path, key):
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as theirs:
        report = Tracking(wandb=True).tracker(tmp_path, "x", {})
        with pytest.raises(MisconfigurationException, match=rf"{theirs.id} is under way.*wandb.finish\(\)"):
            report.verdict("suspect", None, tmp_path, key)


def test_public_leaves_out_what_is_secret_and_nothing_else():
    written_out = {"class_path": "meadef_lightning.WatermarkKey", "init_args": {"target_class": 3}}
    config = {
        "watermark": {"key": {"public_secret": "s"}, "callback": {"input_key": 0, "other": written_out}},
        "oracle": {"api_key": "k", "url": "https://me:pw@example.org/x", "owner_secret": "s", "samples": 3},
        "list": [{"salt": "s", "a": 1}, written_out, (1, None, True)],
        "suspect": "http://me:p@ss@example.org:80/x@y",
    }
    assert public(config) == {
        "watermark": {"callback": {"input_key": 0}},
        "oracle": {"url": "https://example.org/x", "samples": 3},
        "list": [{"a": 1}, [1, None, True]],
        "suspect": "http://example.org:80/x@y",
    }
