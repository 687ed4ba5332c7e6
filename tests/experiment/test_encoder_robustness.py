"""Removals and searches act on self-supervised models, too: on the encoder and the probe above it as one network."""

import json

import pytest
import torch
from small import merged, shrink, write

from meadef_lightning.cli import main

ATTACKS = {
    "ftal": {"class_path": "meadef_lightning.removal.FineTuning", "init_args": {"epochs": 1}},
    "pruning": {"class_path": "meadef_lightning.removal.MagnitudePruning", "init_args": {"sparsities": [0.3]}},
}


@pytest.mark.filterwarnings("ignore:The victim named")
def test_encoders_are_scrubbed_searched_and_judged(tmp_path):
    config = shrink(merged("digits/simclr.yaml"))
    config["extraction"] = config["extraction"][:1]
    of = ["victim", "distillation"]
    config["removal"] = [{"name": name, "of": of, "points": 1.0, "method": method} for name, method in ATTACKS.items()]
    config["detection"] = [{"name": "lof", "of": of, "method": {"class_path": "meadef_lightning.detection.LocalOutlierFactor"}}]  # fmt: skip
    main(["run", str(write(config, tmp_path / "simclr.yaml")), "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(row["target"], row["attack"]) for row in report["removal"]} == {
        (target, attack) for target in of for attack in ("FineTuning", "MagnitudePruning")
    }
    assert all(len(row["curve"]) == 2 for row in report["removal"])
    scrubbed = {row["name"] for row in report["suspects"] if row["kind"] == "removed"}
    assert scrubbed == {f"{target}.{name}" for target in of for name in ATTACKS}
    assert {row["target"] for row in report["detection"]} == set(of)
    # fine-tuning reached the encoder, below the probe
    states = [
        torch.load(tmp_path / "out" / name / "checkpoints" / "model.ckpt", weights_only=True)["state_dict"]
        for name in ("victim", "victim.ftal")
    ]
    kernels = [[value for name, value in state.items() if name.endswith("features.0.weight")] for state in states]
    assert len(kernels[0]) >= 1 <= len(kernels[1])
    assert not torch.equal(kernels[0][0], kernels[1][0])
