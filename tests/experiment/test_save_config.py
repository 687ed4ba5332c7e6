"""``meadef fit`` with W&B as logger: a second run in the same directory, and what the first one was told."""

import os

import pytest
import wandb
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from small import EXPERIMENTS, QUIET, SIZES
from wandb_records import offline_runs

from meadef_lightning.cli import main
from meadef_lightning.experiment import save_config
from meadef_lightning.watermark import WatermarkKey


@pytest.fixture
def fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # what other tests of this process have set up
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    key = WatermarkKey.draw(10, "fit")
    key.save("watermark.key.json")
    network = {"class_path": "meadef_lightning.victims.networks.DigitsCNN", "init_args": {"width": 4, "hidden": 16}}
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": ".", "project": "theirs"},
    }
    base = {
        "model": {"class_path": "SupervisedVictim", "init_args": {"network": network}},
        "data": {"class_path": "DigitsDataModule", "init_args": SIZES},
        "trainer": {**QUIET, "max_epochs": 3, "logger": logger, "limit_train_batches": 1, "limit_val_batches": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def run():
        try:
            main(["fit", "-c", "base.yaml", "-c", str(EXPERIMENTS / "overlays" / "watermark.yaml")])
        finally:
            wandb.finish()

    run.key = key
    return run


def test_second_run_in_a_directory_and_the_configuration_of_both(fit, tmp_path):
    fit()
    fit()
    runs = offline_runs(tmp_path)
    assert len({run.id for run in runs}) == 2
    for run in runs:
        saved = yaml.safe_load((run.directory / "config.yaml").read_text())
        assert saved["model"]["init_args"]["network"]["init_args"]["width"] == 4
        assert saved["trainer"]["callbacks"][0]["init_args"]["key"] == "watermark.key.json"
        assert run.config["data"]["init_args"]["victim_size"] == SIZES["victim_size"]
        told = run.config["trainer"]["callbacks"][0]["init_args"]
        assert "samples" in told
        assert "key" not in told
        assert fit.key.salt.encode() not in (run.directory / f"run-{run.id}.wandb").read_bytes()
    assert not (tmp_path / "config.yaml").exists()


def test_lightnings_own_callback_would_stop_the_second_run(fit, monkeypatch):
    """If this fails, Lightning has learnt it and `RunConfig` can go."""
    monkeypatch.setattr(save_config, "RunConfig", SaveConfigCallback)
    fit()
    with pytest.raises(RuntimeError, match="to NOT exist"):
        fit()
