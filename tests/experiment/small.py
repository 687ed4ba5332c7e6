"""Shrinks the shipped experiments to a size that a test can run: the same YAML, fewer images, one or two epochs."""

import importlib
import inspect
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
TRAINER = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 1}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
SIZES = {"victim_size": 120, "attacker_size": 80, "verification_size": 120, "validation_size": 20}
ATTACK = {
    "queries": 24, "views": 2, "seeds": 10, "rounds": 2, "blends": 16, "iterations_per_epoch": 1, "batch_size": 8, "epochs": 1,
    "interim_epochs": 1,
}  # fmt: skip
"""Smaller numbers for the arguments of attacks that have them."""
METHOD = {"epochs": 1, "steps": 2, "rounds": 1, "candidates": 1, "images": 4, "overlays": 3}
"""The same for removals and detectors."""
VERIFICATION = {"samples": 40, "decoys": 99, "decoy_samples": 4}


def merged(*files):
    """What a later file overrides an earlier one by: mappings merge, other values and other classes replace (as in jsonargparse)."""

    def merge(old, new):
        if isinstance(old, dict) and isinstance(new, dict) and new.get("class_path") in (None, old.get("class_path")):
            return {**old, **{name: merge(old.get(name), value) for name, value in new.items()}}
        return new

    config = {}
    for file in files:
        config = merge(config, yaml.safe_load((EXPERIMENTS / file).read_text()))
    return config


def shrink(config, trainer=TRAINER, **data):
    """The configuration with small data, short trainings, one reference and one seed."""
    config["data"]["init_args"] |= {**SIZES, "batch_size": 32, **data}
    patched = [config["patched"]] if "patched" in config else []
    others = config.get("other_references", [])
    trainings = [config["victim"], *patched, *config["extraction"], *config["independent"], *others]
    for acting in config.get("removal", []) + config.get("detection", []):
        module, _, name = acting["method"]["class_path"].rpartition(".")
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        arguments = acting["method"].setdefault("init_args", {})
        arguments |= {name: value for name, value in METHOD.items() if name in parameters}
        if "strengths" in arguments:
            arguments["strengths"] = arguments["strengths"][:1]
    for training in trainings:
        training["trainer"] = {**trainer, **QUIET}
    for attack in config["extraction"]:
        attack.setdefault("queries", {"class_path": "meadef_lightning.extraction.DistillationDataModule"})
        if "budgets" in attack:
            attack["budgets"] = [10, 20]
        arguments = attack["queries"].get("init_args", {})
        arguments |= {name: value for name, value in ATTACK.items() if name in arguments}
        if "pool" in arguments:
            arguments["pool"]["init_args"]["size"] = 40
    for control in (*config["independent"], *others):
        control["count"] = 1
    # of so few steps none may be left after the usual share of clean training
    config["watermark"]["callback"].setdefault("init_args", {})["start"] = 0.3
    config.pop("references", None)
    config["seeds"] = [0]
    config["verification"] = {**VERIFICATION}
    return config


def write(config, path):
    path.write_text(yaml.safe_dump(config))
    return path


def fake_fashion_mnist(root, images=500, size=28):
    """Files of Fashion-MNIST's form: each class is a bright square at a place of its own."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", images), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = generator.integers(0, 40, (count, size, size), dtype=np.uint8)
        for i, label in enumerate(labels):
            y, x = divmod(int(label), 4)
            pixels[i, 7 * y : 7 * y + 7, 7 * x : 7 * x + 7] = 220
        header = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, size, size))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    return root
