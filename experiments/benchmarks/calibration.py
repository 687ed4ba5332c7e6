"""The calibration study: how often are models accused that never saw the victim, and how often thieves?

    python -m meadef_lightning.experiments.benchmarks.calibration --models 120 --keys 50 --runs runs/digits --output runs/calibration

Trains that many independent models (architecture, training images, augmentation, label smoothing and training length differ) and
reference models, asks each the questions of *every* key once (:mod:`meadef_lightning.verification.answers`), and judges:

* one key drawn for each model: independent p-values, so their uniformity can be tested (Kolmogorov-Smirnov, on p-values that ties
  are broken at random for) and a count of false claims has an exact (Clopper-Pearson) bound;
* ``--keys`` keys drawn for all models: models x keys full verdicts, which are not independent of one another;
* all keys of the space: the exact probability of a false claim against each model under a uniformly drawn key, and, the other way
  round, how many of the models one fixed key would accuse (a key is only as good as the draw that nobody could steer);
* thefts in the directories of finished runs (``--runs``, searched for ``report.json``): power.

An interrupted study goes on where it stopped; more models can be added to a finished one. Written: ``calibration.json`` (all
numbers), ``calibration.csv`` (every verdict), ``calibration.md``, ``calibration.png``, and each model's answers in ``models/``.
Other data: ``--data meadef_lightning.data.FashionMNISTDataModule --data.victim_size 3000 ...``; models train on its victim split.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks.calibration_page import draw_figure, markdown
from scipy import stats
from torch import Tensor, nn

from meadef_lightning.data import RandomShiftFlip
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import (
    config_hash,
    csv_text,
    make_directory,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from meadef_lightning.verification import Verdict, decoy_statistics, judge
from meadef_lightning.verification.answers import AnswerTable, ask_everything, supported_keys
from meadef_lightning.verification.statistics import clopper_pearson_upper, wilson_interval
from meadef_lightning.verification.verdict import PAPER_THRESHOLD
from meadef_lightning.victims.classifier import one_cycle_factor
from meadef_lightning.victims.layers import ConvClassifier, conv_stack, fully_connected
from meadef_lightning.victims.networks import MLP, DigitsCNN
from meadef_lightning.watermark import KeySpace, WatermarkKey

ALPHA = 1e-3
DIGITS = {
    "class_path": "meadef_lightning.data.DigitsDataModule",
    "init_args": {"victim_size": None, "attacker_size": 0, "validation_size": 0},
}


def plain_cnn(num_classes: int, in_channels: int) -> nn.Module:
    """Two 5x5 convolutions without BatchNorm, and dropout."""
    convolutions = conv_stack(in_channels, [16, "pool", 32, "pool"], kernel=5, padding=2)
    return ConvClassifier(convolutions, fully_connected([32 * 16, 64, num_classes], 0.3), in_channels, grid=4)


ARCHITECTURES: dict[str, Callable[[int, int], nn.Module]] = {
    "CNN 24": partial(DigitsCNN, width=24, hidden=128),
    "CNN 16": DigitsCNN,
    "CNN 8": partial(DigitsCNN, width=8, hidden=32),
    "plain CNN": plain_cnn,
    "MLP": MLP,
    "MLP 8x8": partial(MLP, hidden=(128,), grid=8, dropout=0.1),
}


def recipe(index: int) -> dict[str, Any]:
    """Draws how the model of that number is trained; the architectures take turns, -1, -2, … are the references."""
    if index < 0:
        return {
            "architecture": "CNN 24", "seed": 0 if index == -1 else 1_000_000 - index, "share": 1.0, "shift": 1, "smoothing": 0.1, "epochs": 20, "rate": 3e-3,
        }  # fmt: skip
    draw = np.random.default_rng([7, index])
    return {
        "architecture": list(ARCHITECTURES)[index % len(ARCHITECTURES)],
        "seed": index + 1,
        "share": round(float(draw.uniform(0.4, 1.0)), 3),
        "shift": int(draw.integers(0, 3)),
        "smoothing": float(draw.choice([0.0, 0.1])),
        "epochs": int(draw.integers(12, 25)),
        "rate": float(draw.choice([1e-3, 3e-3])),
    }


def train(how: dict[str, Any], x: Tensor, y: Tensor, num_classes: int) -> nn.Module:
    """Trains an independent model on its own random share of the images; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how["seed"])
        mine = torch.randperm(len(x))[: max(int(how["share"] * len(x)), 1)]
        network = ARCHITECTURES[how["architecture"]](num_classes, x.shape[1]).train()
        augment = RandomShiftFlip(shift=how["shift"])
        optimizer = torch.optim.AdamW(network.parameters(), lr=how["rate"], weight_decay=1e-2)
        batches = max(len(mine) // 64, 1)
        total = how["epochs"] * batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle_factor(step, total))
        for _ in range(how["epochs"]):
            for rows in mine[torch.randperm(len(mine))].tensor_split(batches):
                loss = F.cross_entropy(network(augment(x[rows])), y[rows], label_smoothing=how["smoothing"])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return network.eval()


def answers_of(
    index: int, data: SplitDataModule, samples: int, directory: Path, network: Callable[[int], nn.Module] | None = None
) -> AnswerTable:
    """Trains a model, unless ``network`` has it, and asks it; or reads its answers."""
    file = (
        directory / f"{f'{index:04d}' if index >= 0 else 'reference' if index == -1 else f'reference-{-index - 1}'}.pt"
    )
    if not file.exists():
        model = network(index) if network else train(recipe(index), *data.tensors("victim"), data.num_classes)
        table = ask_everything(model, data, samples)
        content = {name: getattr(table, name) for name in ("answers", "natural", "natural_labels", "soft")}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_bytes_atomic(file, buffer.getvalue())
    return AnswerTable(**torch.load(file, weights_only=True), space=KeySpace(data.num_classes))


def randomised_p(statistic: float, decoys: Tensor, uniform: float) -> float:
    """Returns the rank of a key among all keys with ties broken at random: exactly uniform where keys are exchangeable."""
    greater = int((decoys > statistic + 1e-9).sum())
    equal = 1 + int((decoys >= statistic - 1e-9).sum()) - greater
    return (greater + uniform * equal) / (len(decoys) + 1)


def in_cell(table: AnswerTable) -> int:
    """Samples of each cell that count: the default of a verification, or all where fewer were asked."""
    return min(32, table.answers.shape[2])


def uniformity(tables: Sequence[AnswerTable], references: Sequence[AnswerTable], decoys: int) -> dict[str, Any]:
    """Draws one key for each model and tests its p-values against the uniform distribution."""
    draw = np.random.default_rng(0)
    p = []
    for index, table in enumerate(tables):
        key = WatermarkKey.draw(table.space.num_classes, f"calibration model {index}")
        p.append(
            randomised_p(
                *decoy_statistics(table.responses(key, decoys, in_cell(table), references), key), draw.uniform()
            )
        )
    test = stats.kstest(p, "uniform")
    return {"ks": float(test.statistic), "ks_p": float(test.pvalue), "p": p}


def claims(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts verdicts, and bounds the rate of false ones, which is exact where they are independent."""
    supported = sum(verdict.verdict == "supported" for verdict in verdicts)
    return {
        "trials": len(verdicts),
        "supported": supported,
        "inconclusive": sum(verdict.verdict == "inconclusive" for verdict in verdicts),
        "upper": clopper_pearson_upper(supported, len(verdicts)),
    }


def every_key(tables: Sequence[AnswerTable], references: Sequence[AnswerTable]) -> dict[str, float]:
    """Judges all models under all keys of the space."""
    accused = torch.stack([supported_keys(table, references, ALPHA, in_cell(table)) for table in tables])
    rates = accused.flatten(1).sum(1) / tables[0].space.size
    keys = accused.double().mean(0)
    return {
        "mean_rate": float(rates.mean()),
        "largest_rate_of_a_model": float(rates.max()),
        "keys_that_accuse_any": int((keys > 0).sum()),
        "largest_share_one_key_accuses": float(keys.max()),
    }


def null_rates(tables: Sequence[AnswerTable]) -> tuple[dict[str, float], Tensor]:
    """Describes the WSR that independent models show under every key; returns it, too, shape ``(models, keys)``."""
    valid = ~(tables[0].pairs[:, :, None] == torch.arange(tables[0].space.num_classes)).any(1)
    mask = valid[:, None, :].expand_as(tables[0].shares())
    rates = torch.stack([table.shares()[mask] for table in tables])
    quantiles = rates.flatten().numpy()
    above = (rates > PAPER_THRESHOLD).double()
    return {
        "mean": float(rates.mean()),
        "median": float(np.median(quantiles)),
        "q99": float(np.quantile(quantiles, 0.99)),
        "largest": float(rates.max()),
        "above_paper_threshold": float(above.mean()),
        "keys_above_in_a_model": float((above.amax(0) > 0).double().mean()),
        "keys_above_in_half": float((above.mean(0) >= 0.5).double().mean()),
        "largest_mean_of_a_key": float(rates.mean(0).max()),
    }, rates


def thefts(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads the thefts of finished runs: every ``report.json`` in or below the directories."""
    files = sorted({file for run in runs for file in run.rglob("report.json")})
    if runs and not files:
        raise MisconfigurationException(
            f"There is no report.json below {', '.join(map(str, runs))}. Name finished runs."
        )
    keep = ("name", "labels", "wsr", "p_value", "verdict")
    return [
        {"run": str(file.parent), **{name: row[name] for name in keep}}
        for file in files
        for row in read_json(file)["suspects"]
        if row["kind"] == "extracted"
    ]


def power(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns how many thefts were recognised, in all, by kind of answers, and where much of the watermark was stolen."""
    groups = {
        "all": rows,
        "soft": [row for row in rows if row["labels"] == "soft"],
        "hard": [row for row in rows if row["labels"] == "hard"],
        "wsr > 50 %": [row for row in rows if row["wsr"] > 0.5],
    }
    result = {}
    for name, group in groups.items():
        if group:
            found = sum(row["verdict"] == "supported" for row in group)
            result[name] = {
                "thefts": len(group), "supported": found, "ci": wilson_interval(found, len(group)),
                "mean_wsr": float(np.mean([row["wsr"] for row in group])),
            }  # fmt: skip
    return result


def study(
    data: SplitDataModule, models: int, keys: int, samples: int, runs: Sequence[Path], output: Path, references: int = 5
) -> dict[str, Any]:
    """Runs the study, or what is left of it, and writes its files."""
    if models < 2 or keys < 1 or references < 2:
        raise MisconfigurationException(
            f"Needs models >= 2, keys >= 1 and references >= 2, got models={models}, keys={keys} and references={references}."
        )
    rows = thefts(runs)  # a wrong directory is refused before anything is trained
    directory = make_directory(make_directory(output) / "models")
    data.prepare_data()
    how = [recipe(index) for index in range(-1, 12)]
    identity = {"sha256": config_hash({"splits": data.split_summary(), "samples": samples, "recipes": how})}
    if (output / "study.json").exists() and read_json(output / "study.json") != identity:
        raise MisconfigurationException(
            f"{output} holds a study of other data, recipes or number of samples. Choose another --output."
        )
    write_json_atomic(output / "study.json", identity)
    known = [answers_of(-1 - number, data, samples, directory) for number in range(references)]
    tables = [answers_of(index, data, samples, directory) for index in range(models)]
    classes = data.num_classes

    listed: list[dict[str, Any]] = []
    tests: dict[str, Any] = {}
    shared_keys = [WatermarkKey.draw(classes, f"calibration key {number}") for number in range(keys)]
    labels = [replace(table, soft=None) for table in tables]
    modes: list[tuple[str, list[AnswerTable], list[AnswerTable], int]] = [
        ("all keys", tables, [], 9999),
        ("all keys, above a reference", tables, known[:1], 9999),
        (f"all keys, above {references} references", tables, known, 9999),
        (f"the same by labels alone, above {references} references", labels, known, 9999),
        ("999 drawn keys", tables, [], 999),
    ]
    for mode, asked_models, above, decoys in modes:
        own: list[Verdict] = []
        shared: list[Verdict] = []
        for index, table in enumerate(asked_models):
            mine = WatermarkKey.draw(classes, f"calibration model {index}")
            asked = [("own", mine)]
            if decoys == 9999:
                asked += [(f"key {number}", key) for number, key in enumerate(shared_keys)]
            for name, key in asked:
                verdict = judge(table.responses(key, decoys, in_cell(table), above), key, ALPHA)
                (own if name == "own" else shared).append(verdict)
                listed.append(
                    {
                        "test": mode, "model": index, "architecture": recipe(index)["architecture"], "key": name,
                        "accuracy": round(table.accuracy, 4), "wsr": verdict.wsr, "wfpr": verdict.wfpr, "icc": verdict.icc,
                        "statistic": verdict.statistic, "decoy_p": verdict.decoy_p, "mcnemar_p": verdict.mcnemar_p,
                        "verdict": verdict.verdict,
                    }
                )  # fmt: skip
        tests[mode] = {"own": claims(own), "uniformity": uniformity(asked_models, above, decoys)}
        if shared:
            tests[mode] |= {"shared": claims(shared), "every": every_key(asked_models, above)}
    wsr, rates = null_rates(tables)
    accuracies = [table.accuracy for table in tables]
    result = {
        "data": type(data).__name__,
        "models": models,
        "keys": keys,
        "samples": samples,
        "alpha": ALPHA,
        "accuracy": {"mean": float(np.mean(accuracies)), "smallest": min(accuracies), "reference": known[0].accuracy},
        "tests": tests,
        "wsr": wsr,
        "icc": float(np.mean([row["icc"] for row in listed if row["icc"] is not None])),
        "power": power(rows),
    }
    write_text_atomic(output / "calibration.csv", csv_text(listed[0], listed))
    write_json_atomic(output / "calibration.json", json.loads(json.dumps(result)))
    write_text_atomic(output / "calibration.md", markdown(result, len(ARCHITECTURES)))
    draw_figure(result, rates, [row["wsr"] for row in rows], output / "calibration.png")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study that the command line asks for."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__)
    parser.add_subclass_arguments(
        SplitDataModule, "data", required=False, help="Data; models train on its victim split."
    )
    parser.set_defaults({"data": DIGITS})
    parser.add_argument("--models", type=int, default=120, help="Independent models.")
    parser.add_argument("--keys", type=int, default=50, help="Keys under which all models are judged.")
    parser.add_argument("--samples", type=int, default=100, help="Triggers, and controls, of every key.")
    parser.add_argument(
        "--references", type=int, default=5, help="Reference models above which models are judged, beside one and none."
    )
    parser.add_argument("--runs", type=list[Path], default=[], help="Directories of runs whose thefts show the power.")
    parser.add_argument("--output", type=Path, default=Path("runs/calibration"))
    options = parser.parse_args(arguments)
    data = parser.instantiate(options).data
    result = study(
        data, options.models, options["keys"], options.samples, options.runs, options.output, options.references
    )
    print(markdown(result, len(ARCHITECTURES)))


if __name__ == "__main__":
    main()
