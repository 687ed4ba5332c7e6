"""Made-up reports for the tests of their forms."""

from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.rows import DetectionRow, KeyInfo, PathPoint, RemovalRow, SuspectRow, VictimRow

# the published schema, value by value; "a|b" lists what an enumeration allows
HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror='a()'>\"'&"
PNG = b"\x89PNG\r\n\x1a\n" + b"not really a picture"


def suspect(name="soft-same", **changes):
    values = {
        "name": name, "kind": "extracted", "attack": "distillation", "labels": "soft", "queries": 1200,
        "accuracy": 0.95, "fidelity": 0.97, "wsr": 0.841, "wsr_ci": (0.802, 0.874), "wfpr": 0.021,
        "p_value": 1 / 1440, "verdict": "supported",
    }  # fmt: skip
    return SuspectRow(**{**values, **changes})


def independent(name="independent", **changes):
    return suspect(
        name,
        **{"kind": "independent", "attack": "", "queries": 0, "wsr": 0.03, "wsr_ci": (0.02, 0.05), "p_value": 0.61,
           "verdict": "not supported", **changes},
    )  # fmt: skip


def report(*suspects, **changes):
    values = {
        "experiment": "digits/supervised",
        "seeds": (0,),
        "key": KeyInfo("ab" * 32, True),
        "victim": VictimRow(0.969, 0.972, 1.0, 0.012),
        "suspects": suspects or (suspect(), independent()),
        "removal": (
            RemovalRow(
                "victim.wrk", "victim", "WRK", "epochs", 0.05, 1, (PathPoint(0, 0.97, 1, 0.01),), {"his own": 0.5}
            ),
        ),
        "detection": (DetectionRow("lof", "victim", "inputs", 1, 2.5, False, 0.5, 0.01, 0.02, 0.5, 7),),
    }
    return Report(**{**values, **changes})


def three_seeds(name, wsrs=(0.8, 0.85, 0.9), **changes):
    return [suspect(f"{name}/seed-{seed}", wsr=wsr, **changes) for seed, wsr in enumerate(wsrs)]
