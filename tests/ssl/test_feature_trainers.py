"""How the Trainer runs the watermark on encoders: precision, accumulation and two processes, against the terms written by hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ssl_modules import BYOL, MoCo, SimCLR, callback, differences, fit, make, margin, recorded_draws, steady, with_term

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (SimCLR, {}),
        (MoCo, {}),
        (SimCLR, {"precision": "bf16-mixed"}),
        (BYOL, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    ],
    ids=["SimCLR", "MoCo", "bf16", "bf16-accumulate-clip"],
)
def test_equals_the_terms_written_by_hand(kind, flags):
    kind = steady(kind)
    module, twin, plain = make(kind), make(with_term(kind, 4)), make(kind)
    with recorded_draws() as draws:
        fit(module, [callback(start=1 / 3, batchnorm="running")], max_epochs=3, **flags)
    assert len(draws) == 8
    assert set(draws[0]["groups"]) == {"watermark", "natural", "other", "leaning"}
    twin.plan = draws
    fit(twin, [], max_epochs=3, **flags)
    fit(plain, [], max_epochs=3, **flags)
    # at half precision a sum in another order is rounded to another number
    rounding = 1 / 40 if "precision" in flags else 1 / 1000
    assert differences(module, twin) < rounding * differences(module, plain)


def test_bf16_embeds():
    """Not only the same terms: they also do, at half precision, what they are for."""
    module = make(SimCLR)
    trainer = fit(module, [callback()], precision="bf16-mixed")
    assert trainer.callback_metrics["watermark/ver"].dtype == torch.float32
    assert margin(module) > 0


# ---- two processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    command, running = [sys.executable, str(HERE / "feature_worker.py"), str(folder)], []
    try:
        for rank in range(2):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"log.{rank}").open("w") as log:
                running.append(subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT))
        for process in running:
            process.wait(300)  # seconds; a few on a free core
    except subprocess.TimeoutExpired:
        pass  # what is missing is reported with the logs
    finally:
        for process in running:
            process.kill()
            process.wait()
    files = [folder / f"{rank}.json" for rank in range(2)]
    logs = {path.name: path.read_text()[-2000:] for path in folder.glob("log.*")}
    assert all(path.is_file() for path in files), logs
    return [json.loads(path.read_text()) for path in files]


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs torch with gloo"
)
@pytest.mark.parametrize("name", ["BYOL", "bf16"])
def test_two_processes_equal_the_terms_written_by_hand(processes, name):
    first, second = (found[name] for found in processes)
    for rank in (first, second):
        assert rank["from twin"] < rank["from plain"] / (40 if name == "bf16" else 200)
        assert len(rank["draws"]) == 8
    assert first["weights"] == second["weights"]
    assert first["draws"] != second["draws"]  # every process has samples of its own
