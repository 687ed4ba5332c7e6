"""How the Trainer runs the watermark on encoders: precision, accumulation and two processes, against the terms written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launched import run_workers, two_ranks
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
    logs = run_workers(HERE / "feature_worker.py", folder, [(env, []) for env in two_ranks()])
    files = [folder / f"{rank}.json" for rank in range(2)]
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
