"""A small grid and reports for its cells."""

import yaml

from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.rows import KeyInfo, SuspectRow, VictimRow

NETWORK = {"class_path": "meadef_lightning.victims.networks.MLP"}
GRID = {
    "grid": "tests/small",
    "experiment": ["digits/supervised.yaml"],
    "overrides": {"verification": {"samples": 40}},
    "axes": {
        "network": [
            {"name": "cnn"},
            {"name": "mlp", "overrides": {"victim": {"model": {"init_args": {"network": NETWORK}}, "trainer": {"max_epochs": 7}}}},
        ],
        "run": [{"name": i, "overrides": {"seeds": [i]}} for i in range(3)],
    },
    "exclude": [{"network": "mlp", "run": [1]}],
    "table": {"rows": "network", "columns": "group", "over": "run"},
    "figure": {"x": "network", "y": ["wsr"], "series": "group", "over": "run"},
}  # fmt: skip


def changed(**members):
    return {**yaml.safe_load(yaml.safe_dump(GRID)), **members}


def report(rates, seeds=(0,), removal=(), detection=()):
    rows = [
        SuspectRow(name, kind, "Distillation", "soft", 100, 0.9, 0.8, wsr, (0.0, 1.0), 0.1, 0.01, "supported" if wsr > 0.5 else "inconclusive")
        for name, kind, wsr in rates
    ]  # fmt: skip
    return Report(
        "e", tuple(seeds), KeyInfo("ab", True), VictimRow(0.9, 0.9, 1.0, 0.1), tuple(rows), removal, detection
    )


def suspects(theft, first, second):
    return [("theft", "extracted", theft), ("independent-0", "independent", first), ("independent-1", "independent", second)]  # fmt: skip
