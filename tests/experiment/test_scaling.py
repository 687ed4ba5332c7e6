"""The benchmark of two processes runs at a tiny size, and counts what is known beforehand; no speed is tested."""

import json

import pytest
import torch
from meadef_lightning.experiments.benchmarks import scaling

from meadef_lightning.victims.networks import MLP

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs torch with gloo"
)


def event(name, kinds, shapes, microseconds):
    return {"name": name, "dur": microseconds, "args": {"Input type": kinds, "Input Dims": shapes}}


def test_collectives_of_a_trace():
    trace = {
        "traceEvents": [
            event("gloo:all_reduce", ["float"], [[10, 3]], 7.0),
            event("gloo:broadcast", ["long int"], [[]], 5.0),  # a scalar
            event("c10d::allreduce_", ["TensorList"], [[[10, 3]]], 100.0),  # the same one, as it was asked for
            {"name": "process_name"},
        ]
    }
    assert scaling.collectives(trace) == {"collectives": 2, "bytes": 128, "seconds": pytest.approx(12e-6)}


def test_two_processes_exchange_the_gradients_and_mgda_those_of_its_losses(tmp_path):
    sections = scaling.main(
        batch_size=20, image_size=8, network="MLP", rounds=1, steps=2, output=str(tmp_path), variants=scaling.VARIANTS
    )  # fmt: skip
    found = json.loads((tmp_path / "scaling.json").read_text())["variants"]
    assert list(found) == list(scaling.VARIANTS)
    traffic = {name: row["traffic_per_step"] for name, row in found.items()}
    gradients = 4 * sum(weight.numel() for weight in MLP(10, 3).parameters())
    assert gradients <= traffic["plain"]["bytes"] < 1.01 * gradients + 1024  # and buffers
    # once all have their samples, fixed weights say nothing; MGDA sums the gradients of task, watermark and tilt at once
    assert traffic["default"]["bytes"] == traffic["plain"]["bytes"]
    assert traffic["default"]["collectives"] == traffic["plain"]["collectives"]
    assert traffic["MGDA"]["bytes"] - traffic["plain"]["bytes"] == 3 * gradients
    assert traffic["MGDA"]["collectives"] - traffic["plain"]["collectives"] == 1
    assert all(row[side]["median"] > 0 for row in found.values() for side in ("one", "two"))
    assert [len(row) for row in sections[0].rows + sections[1].rows] == [5] * 3 + [6] * 3
