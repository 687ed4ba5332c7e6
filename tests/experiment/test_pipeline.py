"""The pipeline: same seed, same report; interrupted or not; and nothing overwritten."""

import hashlib
import json
import os
import re
import signal
import stat

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from small import QUIET, merged, shrink, write

from meadef_lightning.experiment import stages
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run
from meadef_lightning.experiment.training import derived_seed
from meadef_lightning.experiment.weights import MODEL, load_weights
from meadef_lightning.verification import check_evidence
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.watermark import WatermarkKey

TRAINER = {"max_epochs": 4, "limit_val_batches": 1}


@pytest.fixture(scope="module")
def config():
    """Victim, one theft and one control, with augmentation, so that random numbers matter in every epoch."""
    config = shrink(merged("digits/supervised.yaml"), TRAINER, batch_size=40)
    config["extraction"] = config["extraction"][:1]
    config["extraction"][0]["queries"]["init_args"] = {
        "batch_size": 40,
        "augmentation": config["data"]["init_args"]["augmentation"],
    }
    return config


def start(config, tmp_path, output, *overrides):
    return run(load_experiment([write(config, tmp_path / "experiment.yaml")], list(overrides)), output)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    start(config, root, root / "out")
    return root / "out"


def weights(directory):
    return torch.load(directory / MODEL, weights_only=True)["state_dict"]


def test_report_tells_what_happened(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["seeds"] == [0]
    assert [(row["name"], row["kind"]) for row in report["suspects"]] == [
        *(("victim", "victim"), ("clean", "independent"), ("soft", "extracted"), ("independent", "independent")),
    ]
    by_name = {row["name"]: row for row in report["suspects"]}
    assert report["victim"]["accuracy"] == by_name["victim"]["accuracy"]
    assert report["victim"]["clean_accuracy"] == by_name["clean"]["accuracy"]
    assert by_name["victim"]["fidelity"] == 1
    assert by_name["soft"]["queries"] == 80
    assert by_name["soft"]["attack"] == "Distillation"


@pytest.mark.parametrize("name", ["victim", "clean", "soft", "independent"])
def test_stage_directories_hold_what_the_design_says(finished, name):
    stage = json.loads((finished / name / "stage.json").read_text())
    assert (stage["status"], stage["error"]) == ("done", None)
    assert sorted(path.name for path in (finished / name / "checkpoints").iterdir()) == ["model.ckpt"]
    lines = (finished / name / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,step")
    assert len(lines) > 4
    assert (finished / f"verify-{name}" / "figures" / "decoys.png").exists()


def test_accuracies_are_those_of_the_models_on_disk(finished, config):
    experiment = load_experiment([finished / "config.yaml"])
    spec = experiment.build()
    model = load_weights(spec.victim.model, spec.data, finished / "victim" / MODEL)
    x, y = spec.data.tensors("test")
    with torch.no_grad():
        accuracy = float((model(x).argmax(-1) == y).float().mean())
    report = json.loads((finished / "report.json").read_text())
    assert report["victim"]["accuracy"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.filterwarnings("ignore:The training ended without a single watermarked step")
def test_the_clean_twin_differs_by_the_watermark_only(finished, config, tmp_path):
    """With a watermark that starts after the end the two trainings are the same, bit for bit."""
    never = json.loads(json.dumps(config))
    never["watermark"]["callback"] = {
        "class_path": "meadef_lightning.watermark.WatermarkCallback",
        "init_args": {"start": 0.999},
    }
    start(never, tmp_path, tmp_path / "out")
    victim, clean = weights(tmp_path / "out" / "victim"), weights(tmp_path / "out" / "clean")
    assert all(torch.equal(victim[name], clean[name]) for name in clean)
    marked, clean = weights(finished / "victim"), weights(finished / "clean")
    assert not all(torch.equal(marked[name], clean[name]) for name in clean)


def test_key_stays_secret(finished):
    key_file = finished / "watermark.key.json"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    key = WatermarkKey.load(key_file)
    for path in finished.rglob("*"):
        if path.is_file() and path != key_file:
            assert key.salt.encode() not in path.read_bytes(), path
    assert key.commitment() == json.loads((finished / "report.json").read_text())["key"]["commitment"]


@pytest.mark.parametrize("name", ["victim", "soft"])
def test_evidence_is_checked_offline(finished, name):
    key = WatermarkKey.load(finished / "watermark.key.json")
    verdict = check_evidence(finished / f"verify-{name}" / "evidence.json", key)
    rows = {row["name"]: row for row in json.loads((finished / "report.json").read_text())["suspects"]}
    assert (verdict.wsr, verdict.decoy_p, verdict.verdict) == tuple(
        rows[name][k] for k in ("wsr", "p_value", "verdict")
    )


def digest(directory):
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in ("report.json", "summary.csv")
    }


def test_second_run_trains_nothing_and_says_the_same(finished, config, tmp_path, monkeypatch):
    before, models = digest(finished), [(p, p.stat().st_mtime_ns) for p in finished.rglob("*.ckpt")]
    monkeypatch.setattr(stages, "fit", lambda *_: pytest.fail("a finished stage was trained again"))
    start(config, tmp_path, finished)
    assert digest(finished) == before
    assert models == [(p, p.stat().st_mtime_ns) for p in finished.rglob("*.ckpt")]


def test_interrupted_run_ends_in_the_same_report(finished, config, tmp_path, monkeypatch):
    whole_step = SupervisedVictim.training_step

    def interrupted_step(self, batch):
        if self.watermark and self.trainer.current_epoch == 2 and self.trainer.fit_loop.batch_idx == 1:
            raise KeyboardInterrupt
        return whole_step(self, batch)

    monkeypatch.setattr(SupervisedVictim, "training_step", interrupted_step)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        start(config, tmp_path, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "victim" / "stage.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "interrupted")
    monkeypatch.undo()
    start(config, tmp_path, tmp_path / "out")
    resumed, whole = weights(tmp_path / "out" / "victim"), weights(finished / "victim")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(
        (finished / "report.json").read_text()
    )
    epochs = [line.split(",")[0] for line in (tmp_path / "out" / "victim" / "metrics.csv").read_text().splitlines()[1:]]
    assert {"0", "1", "2", "3"} <= set(epochs)


def test_sigterm_in_the_last_test_batch_ends_the_run(config, tmp_path, monkeypatch):
    whole_step = SupervisedVictim.test_step

    def told(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedVictim, "test_step", told)
        with pytest.raises(SIGTERMException):
            start(config, tmp_path, tmp_path / "out", "--trainer.limit_test_batches", "1")
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/stage.json"))
    assert (record["status"], record["error"]) == ("failed", "interrupted")
    assert not list((tmp_path / "out").glob("*/result.json"))


def test_other_configuration_in_the_same_directory_is_refused(finished, config, tmp_path):
    before = digest(finished)
    with pytest.raises(MisconfigurationException, match=r"reference.*other inputs.*'config' differs.*--output"):
        start(config, tmp_path, finished, "--victim.model.init_args.label_smoothing", "0.2")
    assert digest(finished) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"independent": []}, "at least one independent model"),
        ({"seeds": [1, 1]}, "seeds=.* must be different"),
        ({"watermark": {"key": {}}}, "exactly one of file, secret_env and public_secret"),
        ({"watermark": {"key": {"secret_env": "MEADEF_UNSET"}}}, "MEADEF_UNSET.*is not set. Export it"),
        ({"watermark": {"key": {"file": "missing.json"}}}, r"Cannot read the watermark key missing.json"),
        ({"watermark": {"key": {"public_secret": "x", "without": ["Blend"]}}}, r"can be left out are .*'PixelBlend'"),
        ({"watermark": {"key": {"file": "k.json", "without": ["PixelBlend"]}}}, r"k\.json is drawn already.*--without"),
        ({"victim": {"trainer": {"logger": True}}}, "sets the Trainer's .*logger"),
    ],
)
def test_bad_configurations(config, tmp_path, change, message):
    changed = json.loads(json.dumps(config))
    for name, value in change.items():
        if isinstance(value, dict):
            changed[name] = {**changed[name], **value}
        else:
            changed[name] = value
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        start(changed, tmp_path, tmp_path / "out")


def test_names_must_be_distinct(config, tmp_path):
    changed = json.loads(json.dumps(config))
    changed["extraction"] = [changed["extraction"][0]] * 2
    with pytest.raises(MisconfigurationException, match=r"twice: \['soft'\]"):
        start(changed, tmp_path, tmp_path / "out")


def test_unknown_option_is_explained(config, tmp_path):
    changed = {**config, "attacks": []}
    with pytest.raises(MisconfigurationException, match=r"experiment.yaml is not valid.*attacks"):
        start(changed, tmp_path, tmp_path / "out")


def test_several_seeds_are_reported_apart(config, tmp_path):
    small = shrink(json.loads(json.dumps(config)))
    small["seeds"] = [0, 3]
    start(small, tmp_path, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seeds"] == [0, 3]
    assert {row["name"] for row in report["suspects"]} == {
        f"{name}/seed-{seed}" for name in ("victim", "clean", "soft", "independent") for seed in (0, 3)
    }
    accuracies = [row["accuracy"] for row in report["suspects"] if row["kind"] == "victim"]
    assert report["victim"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert (tmp_path / "out" / "seed-3" / "victim" / "checkpoints" / "model.ckpt").exists()


def test_epoch_seed_depends_on_epoch_and_seed():
    seeds = {derived_seed(seed, f"epoch {epoch}") for seed in range(10) for epoch in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_unsafe_checkpoints_are_refused(tmp_path, config):
    spec = load_experiment([write(config, tmp_path / "experiment.yaml")]).build()
    path = tmp_path / "model.ckpt"

    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    for content, message in (
        (Bomb(), "cannot be|can be read safely"),
        ({"state_dict": {"x": torch.zeros(1)}}, "do not fit"),
    ):
        torch.save(content, path)
        with pytest.raises(MisconfigurationException, match=message):
            load_weights(spec.victim.model, spec.data, path)
    assert not (tmp_path / "exploded").exists()
    path.write_bytes(b"PK damaged")
    with pytest.raises(MisconfigurationException, match=re.escape(str(path))):
        load_weights(spec.victim.model, spec.data, path)


def test_quiet_trainer_options_exist():
    assert set(QUIET) == {"enable_progress_bar", "accelerator"}
