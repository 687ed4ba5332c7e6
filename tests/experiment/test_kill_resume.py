"""A run that is killed in every kind of stage, again and again, ends like one that nothing happened to."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from small import merged, shrink, write

WORKER = Path(__file__).with_name("kill_worker.py")

NETWORK = {"class_path": "meadef_lightning.victims.networks.DigitsCNN", "init_args": {"width": 4, "hidden": 16}}
TRAINER = {"max_epochs": 3, "limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 1}
THEFT = {
    "name": "theft",
    "queries": {"class_path": "meadef_lightning.extraction.JacobianDataModule", "init_args": {"seeds": 10, "rounds": 2, "epochs": 1, "batch_size": 8}},
    "student": {"class_path": "meadef_lightning.extraction.Student", "init_args": {"network": NETWORK}},
}  # fmt: skip
REMOVAL = {"class_path": "meadef_lightning.removal.FineTuning", "init_args": {"epochs": 2, "batch_size": 32}}
DETECTION = {"class_path": "meadef_lightning.detection.LocalOutlierFactor"}


def small():
    config = shrink({**merged("digits/supervised.yaml"), "extraction": [THEFT]}, TRAINER, batch_size=40)
    config["victim"]["model"]["init_args"]["network"] = NETWORK
    config["independent"][0]["model"]["init_args"]["network"] = NETWORK
    # the thief bears any loss, so that the scrubbed model is another than the stolen one
    config["removal"] = [{"name": "fine-tuning", "of": ["theft"], "points": 1.0, "method": REMOVAL}]
    config["detection"] = [{"name": "lof", "of": ["theft"], "method": DETECTION}]
    return config


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The undisturbed run's directory, the killed one's, and what was seen after every kill."""
    root = tmp_path_factory.mktemp("killed")
    file = write(small(), root / "experiment.yaml")
    worker = [sys.executable, str(WORKER), *map(str, (file, root / "straight", root / "killed"))]
    # it forks, which threads and a GPU do not survive
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(worker, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return root / "straight", root / "killed", told


def test_every_run_was_killed_where_it_should(outputs):
    ends = {line["point"]: line["signal"] for line in outputs[2] if "point" in line}
    assert ends == dict.fromkeys(ends, signal.SIGKILL)
    assert len(ends) == 12


def test_a_second_run_in_the_directory_is_refused(outputs):
    (refused,) = [line["refused"] for line in outputs[2] if "refused" in line]
    assert re.search(r"^Another run is at work in .*/killed, .*--output", refused)


def test_a_result_without_a_record_is_not_taken_for_done(outputs):
    states = {line["point"]: line["states"] for line in outputs[2] if "point" in line}
    assert states["victim, result written"] == {"reference": "done", "victim": "running"}
    assert states["theft, in a batch"]["theft"] == states["verify-theft, evidence written"]["verify-theft"] == "running"
    assert states["detection, result not written"]["search-lof-theft"] == "running"
    assert states["removal, weights written"]["theft.fine-tuning"] == "running"
    assert set(states["report, page written"].values()) == {"done"}


def test_reports_are_equal(outputs):
    straight, killed, _ = outputs
    for name in ("report.json", "summary.csv", "config.yaml"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name
    keys = [json.loads((output / "watermark.key.json").read_text()) for output in (straight, killed)]
    assert keys[0] == keys[1]


def test_results_are_equal_weights_included(outputs):
    """``result.json`` holds the weights' digest, WSR and p-values, queries, and the metrics of the last epoch."""
    straight, killed, _ = outputs
    files = sorted(path.relative_to(straight) for path in straight.glob("*/result.json"))
    assert len(files) == 12
    for file in files:
        assert json.loads((killed / file).read_text()) == json.loads((straight / file).read_text()), file
    for model in straight.glob("*/checkpoints/model.ckpt"):
        assert (killed / model.relative_to(straight)).read_bytes() == model.read_bytes(), model


def files_of(output):
    """All files, without the logs of the attempts and what a killed process was just writing."""
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    written = {name for name in names if "/logs/" not in name}
    return {name for name in written if not name.rpartition("/")[2].startswith(".") or name == ".lock"}


def test_nothing_is_doubled_and_nothing_is_left(outputs):
    straight, killed, _ = outputs
    assert files_of(killed) == files_of(straight)
    for name in ("victim", "clean", "theft"):
        assert (killed / name / "metrics.csv").read_text() == (straight / name / "metrics.csv").read_text(), name


def test_a_killed_training_goes_on_from_its_last_whole_epoch(outputs):
    """The first epoch that each attempt logged. The theft's first two died while they asked."""
    for name, epochs in {"victim": "023", "clean": "013", "theft": "01"}.items():
        logs = sorted((outputs[1] / name / "logs").glob("attempt_*/metrics.csv"))
        assert "".join(log.read_text().splitlines()[1].split(",")[0] for log in logs) == epochs, name


def test_queries_are_paid_once(outputs):
    found = []
    for output in outputs[:2]:
        with closing(sqlite3.connect(output / "theft" / "queries.sqlite")) as ledger:
            (answers,) = ledger.execute("SELECT COUNT(*) FROM answers").fetchone()
            found.append((answers, *ledger.execute("SELECT distinct_inputs, calls FROM totals").fetchone()))
    # the seed held out, and nine that are doubled twice; asking again costs nothing
    assert found[0] == (37, 37, 37)
    assert found[1][:2] == (37, 37)
    assert found[1][2] > 37
