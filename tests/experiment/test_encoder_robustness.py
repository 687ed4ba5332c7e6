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
    config["detection"] = [
        {
            "name": "lof",
            "of": [*of, "clean", "independent"],
            "method": {"class_path": "meadef_lightning.detection.LocalOutlierFactor"},
        },
        {"name": "lean", "of": of, "method": {"class_path": "meadef_lightning.detection.AnswerLean"}},
    ]
    command = ["run", str(write(config, tmp_path / "simclr.yaml")), "--output", str(tmp_path / "out")]
    main(command)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(row["target"], row["attack"]) for row in report["removal"]} == {
        (target, attack) for target in of for attack in ("FineTuning", "MagnitudePruning")
    }
    assert all(len(row["curve"]) == 2 for row in report["removal"])
    scrubbed = {row["name"] for row in report["suspects"] if row["kind"] == "removed"}
    assert scrubbed == {f"{target}.{name}" for target in of for name in ATTACKS}
    # clean models are screened where they are named, and are controls elsewhere
    assert [(row["attack"], row["target"]) for row in report["detection"]] == [
        *(("lof", name) for name in [*of, "clean", "independent"]),
        *(("lean", name) for name in of),
    ]
    for row in report["detection"]:
        result = tmp_path / "out" / f"search-{row['attack']}-{row['target']}" / "result.json"
        found = json.loads(result.read_text())
        if row["attack"] == "lof":
            assert (row["named_target"], row["key_rank"]) == (None, None)
            assert (row["auc"], row["true_rate"]) == (found["auc"], found["true_rate"])
            continue
        target = json.loads((tmp_path / "out" / "watermark.key.json").read_text())["target_class"]
        assert row["named_target"] == (target in found["flagged"])
        # of 10 classes, 36 pairs without an order for each third one
        assert 1 <= row["key_rank"] == found.pop("key_rank") <= 360
        result.write_text(
            json.dumps({**found, "flagged": [target if row["target"] == "victim" else (target + 1) % 10]})
        )
    # fine-tuning reached the encoder, below the probe
    states = [
        torch.load(tmp_path / "out" / name / "checkpoints" / "model.ckpt", weights_only=True)["state_dict"]
        for name in ("victim", "victim.ftal")
    ]
    kernels = [[value for name, value in state.items() if name.endswith("features.0.weight")] for state in states]
    assert len(kernels[0]) >= 1 <= len(kernels[1])
    assert not torch.equal(kernels[0][0], kernels[1][0])
    # a search that an earlier release finished is read, not run again
    main(command)
    again = json.loads((tmp_path / "out" / "report.json").read_text())["detection"]
    named = {("lean", "victim"): 1.0, ("lean", "distillation"): 0.0}
    assert again == [
        {**row, "key_rank": None, "named_target": named.get((row["attack"], row["target"]))}
        for row in report["detection"]
    ]
