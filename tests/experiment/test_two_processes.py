"""A whole experiment by two processes: one result, as far as possible that of one process, and no hang where one of them fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from small import QUIET, merged, shrink, write

from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run
from meadef_lightning.experiment.weights import MODEL, load_weights
from meadef_lightning.oracle import QueryLedger
from meadef_lightning.verification import verify
from meadef_lightning.watermark import WatermarkKey

WORKER = str(Path(__file__).with_name("two_processes_worker.py"))
TIMEOUT = 600  # seconds for all runs; about 40 on a free core
TRAINER = {"max_epochs": 3, "limit_train_batches": 3, "limit_val_batches": 1}
NETWORK = {"class_path": "meadef_lightning.victims.networks.DigitsCNN", "init_args": {"width": 4, "hidden": 16}}
THEFTS = {
    "soft": ("DistillationDataModule", {}, "Student"),
    "jacobian": ("JacobianDataModule", {"seeds": 10, "rounds": 2, "epochs": 1}, "Student"),
    "composite": ("CompositeDataModule", {"blends": 32}, "Student"),
    # by one process of the two, whose batches are no halves
    "maze": ("DataFreeDataModule", {"iterations_per_epoch": 1, "batch_size": 8}, "MAZEStudent"),
}
MODELS = ["reference", "victim", "clean", *THEFTS, "independent"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs torch with gloo"
    ),
]


def small(batch_size):
    """A chain with every kind of theft there is for several processes; batches are those of one process."""
    config = shrink(merged("digits/supervised.yaml"), TRAINER, batch_size=2 * batch_size)
    config["victim"]["model"]["init_args"]["network"] = NETWORK
    config["independent"][0]["model"]["init_args"]["network"] = NETWORK
    module = "meadef_lightning.extraction."
    config["extraction"] = [
        {
            "name": name,
            "queries": {"class_path": module + attack, "init_args": {"batch_size": batch_size, **options}},
            "student": {"class_path": module + student, "init_args": {"network": NETWORK}},
            "trainer": {**TRAINER, **QUIET},
        }
        for name, (attack, options, student) in THEFTS.items()
    ]
    noise = {"class_path": "meadef_lightning.removal.WeightNoise"}
    lof = {"class_path": "meadef_lightning.detection.LocalOutlierFactor"}
    config["removal"] = [{"name": "noise", "of": ["soft"], "points": 1.0, "method": noise}]
    config["detection"] = [{"name": "lof", "of": ["soft"], "method": lof}]
    return config


def start(*arguments, **environment):
    plain = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, WORKER, *map(str, arguments)],
        env={**os.environ, **plain, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the runs, how the two processes ended one of which was killed, and what its stage's record said then."""
    folder = tmp_path_factory.mktemp("two")
    config = small(8)
    file = write(config, folder / "experiment.yaml")
    two_thefts = {"extraction": config["extraction"][:2], "removal": [], "detection": []}
    write({**config, **two_thefts}, folder / "sharded.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }  # fmt: skip
    both = [
        start("killed", file, folder / "killed", **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        told = [process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in both]
    finally:
        for process in both:
            process.kill()
    path = folder / "killed" / "victim" / "stage.json"
    assert path.exists(), told
    record = json.loads(path.read_text())
    return folder, [process.returncode for process in both], told, record


@pytest.fixture(scope="module")
def two(killed):
    """The folder with all runs of two processes."""
    folder = killed[0]
    process = start("finished", folder / "experiment.yaml", folder)
    try:
        told = process.communicate(timeout=TIMEOUT)[0]
    finally:
        process.kill()
    assert process.returncode == 0, told[-20000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same by one process, whose batches are as large as two processes' together."""
    folder = tmp_path_factory.mktemp("one")
    run(load_experiment([write(small(16), folder / "experiment.yaml")]), folder / "out")
    return folder / "out"


def report(output):
    return json.loads((output / "report.json").read_text())


def weights(directory):
    return torch.load(directory / MODEL, weights_only=True)["state_dict"]


def test_when_a_process_is_killed_the_other_ends(killed):
    _, codes, told, record = killed
    assert codes[1] == -signal.SIGKILL
    assert codes[0] > 0, told[0][-2000:]
    assert record["status"] == "failed"
    assert "RuntimeError" in record["error"]


def test_after_it_the_run_goes_on_to_the_same_end(two):
    """Started by torchrun's environment the first time, by Lightning the second."""
    for name in MODELS:
        resumed, straight = weights(two / "killed" / name), weights(two / "straight" / name)
        assert all(torch.equal(resumed[key], straight[key]) for key in straight), name
    for name in ("report.json", "summary.csv", "config.yaml"):
        assert (two / "killed" / name).read_bytes() == (two / "straight" / name).read_bytes(), name
    attempts = {path.parts[-3]: path.name for path in sorted((two / "killed").glob("*/logs/attempt_*"))}
    assert attempts.pop("victim") == "attempt_1"
    assert set(attempts.values()) == {"attempt_0"}


def files(output):
    """All but logs, and what SQLite keeps beside a ledger until its last reader has closed it."""
    return sorted(
        path.relative_to(output).as_posix()
        for path in output.rglob("*")
        if path.is_file() and "logs" not in path.parts and not path.name.endswith(("-shm", "-wal"))
    )


def test_files_are_those_of_one_process(two, one):
    assert files(two / "straight") == files(one)


def test_rows_tell_the_same_models_and_queries(two, one):
    mine, theirs = report(two / "straight"), report(one)
    equal = ("name", "kind", "attack", "labels", "queries")
    assert [[row[key] for key in equal] for row in mine["suspects"]] == [
        [row[key] for key in equal] for row in theirs["suspects"]
    ]
    assert mine["key"] == theirs["key"]
    assert [row["queries"] for row in mine["suspects"] if row["kind"] == "extracted"][:3] == [80, 1 + 9 * 4, 8 + 3 * 32]


@pytest.mark.parametrize("name", ["soft", "composite"])
def test_queries_are_counted_once(two, one, name):
    """Calls, too: rank zero asks for all, and processes that ask themselves ask different things."""
    paid = [QueryLedger(output / name / "queries.sqlite").totals() for output in (two / "straight", one)]
    assert paid[0] == paid[1]


def test_one_process_of_them_would_have_come_to_the_same_verdicts(two):
    experiment = load_experiment([two / "straight" / "config.yaml"])
    spec, output = experiment.build(), two / "straight"
    key = WatermarkKey.load(output / "watermark.key.json")
    settings = asdict(spec.verification)
    reference = load_weights(spec.victim.model, spec.data, output / "reference" / MODEL)
    _, reference_answers = verify(reference, key, spec.data, accelerator="cpu", **settings)
    for name in ("victim", "soft"):
        fresh = experiment.build()
        model = fresh.victim.model if name == "victim" else fresh.extraction[0].student
        suspect = load_weights(model, spec.data, output / name / MODEL)
        verdict, _ = verify(suspect, key, spec.data, accelerator="cpu", reference=reference_answers, **settings)
        assert verdict.to_dict() == json.loads((output / f"verify-{name}" / "result.json").read_text())["verdict"]


def test_the_tested_accuracy_counts_every_image_once(two):
    """Of 177 images two processes would test 178."""
    for name in ("victim", "soft"):
        tested = json.loads((two / "straight" / name / "result.json").read_text())["metrics"]["test_accuracy"]
        verdict = json.loads((two / "straight" / f"verify-{name}" / "result.json").read_text())["verdict"]
        assert tested == pytest.approx(verdict["natural_accuracy"], abs=1e-6)
        assert f"{tested:.5f}"[:6] in (two / "straight" / name / "metrics.csv").read_text()


def test_every_stage_used_both(two):
    config = yaml.safe_load((two / "straight" / "config.yaml").read_text())
    trainings = [config["victim"], config["patched"], *config["extraction"], *config["independent"]]
    assert [(training["trainer"]["devices"], training["trainer"]["strategy"]) for training in trainings] == [
        (2, "ddp")
    ] * len(trainings)


@pytest.mark.parametrize("name", ["victim", "soft", "jacobian"])
def test_sharded_weights_are_those_of_ddp(two, name):
    """Up to rounding, of which Adam makes steps where gradients are next to nothing. Written whole, and judged as all others."""
    sharded, straight = weights(two / "fsdp2" / name), weights(two / "straight" / name)
    assert sharded.keys() == straight.keys()
    apart = torch.cat([(sharded[key] - value).abs().float().flatten() for key, value in straight.items()])
    moved = weights(two / "straight" / "reference")
    moved = torch.cat([(moved[key] - value).abs().float().flatten() for key, value in straight.items()])
    assert apart.mean() < 0.01 * moved.mean(), (apart.mean(), apart.max(), moved.mean())
    assert apart.max() < 0.01
    assert report(two / "fsdp2")["key"] == report(two / "straight")["key"]


def test_a_failure_of_one_is_told_by_all(two):
    own, other = (json.loads((two / f"failed.{rank}.json").read_text()) for rank in (1, 0))
    assert own == {"type": "ValueError", "message": "a reason of its own"}
    assert other == {"type": "ProcessFailedError", "message": "process 1 failed: ValueError: a reason of its own"}
    record = json.loads((two / "failed" / "reference" / "stage.json").read_text())
    assert (record["status"], record["error"]) == ("failed", other["message"])
