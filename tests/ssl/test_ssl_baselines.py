"""The comparison of encoder watermarks: its table on made-up rows, and a real study at test size that goes on where it stopped."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks import ssl_baselines
from meadef_lightning.experiments.benchmarks.ssl_baselines import Row, Study, table

from meadef_lightning.experiment.verdict_stage import Judge
from meadef_lightning.victims.downstream import encode

sys.path.append(str(Path(__file__).parents[1] / "experiment"))
from small import merged, shrink, write


def small(tmp_path, **data):
    config = shrink(merged("digits/simclr.yaml"), **data)
    config["extraction"] = [
        theft for theft in config["extraction"] if theft["name"] in ("stolen-encoder", "stolen-encoder-other-network")
    ]
    return config, write(config, tmp_path / "small.yaml")


def test_means_and_dashes():
    rows = [
        Row("A", "victim", 0, 0, 0.9, 1.0),
        Row("A", "theft", 0, 400, 0.8, 0.2),
        Row("A", "victim", 1, 0, 1.0, 0.8),
        Row("A", "theft", 1, 1400, 0.6, None),
    ]
    assert table(rows) == [
        ["A", "victim", "-", "95.0±63.5", "90.0±127.1"],  # t(.975, 1) · .0707 / √2 = .635
        ["A", "theft", "1,400", "70.0±127.1", "-"],
    ]
    assert table(rows[:2])[0][3:] == ["90.0", "100.0"]


def test_a_small_study_is_stolen_measured_and_goes_on(tmp_path, monkeypatch, capsys):
    _, file = small(tmp_path)
    options = {"output": tmp_path / "out", "seeds": [3], "guard_epochs": 2, "guard": {"key_dim": 8, "hidden": 16}}
    section = ssl_baselines.main([file], **options)
    with (tmp_path / "out" / "ssl_baselines.csv").open() as text:
        rows = list(csv.DictReader(text))
    names = ["victim", "stolen-encoder", "stolen-encoder-other-network", "reference"]
    assert [(row["scheme"], row["model"]) for row in rows] == [
        (scheme, name) for scheme in ("MEA-Defender", "patch", "SSLGuard") for name in names
    ]
    assert all(0 <= float(row["rate"]) <= 1 for row in rows if row["rate"])
    # 32 features are not what SSLGuard's decoder of 64 reads
    assert [(row["scheme"], row["model"]) for row in rows if not row["rate"]] == [("SSLGuard", names[2])]
    stolen = [row for row in rows if row["model"] == "stolen-encoder"]
    assert {row["queries"] for row in stolen} == {"80"}  # the attacker's images, once
    assert (tmp_path / "out" / "ssl_baselines.md").read_text() == section.markdown()
    assert "| SSLGuard | victim |" in capsys.readouterr().out
    # every stage is read again: what would train or ask fails
    monkeypatch.setattr("meadef_lightning.experiment.stages.fit", None)
    assert ssl_baselines.main([file], **options).rows == section.rows

    study = Study([file], [], tmp_path / "out" / "seed-3", 3, {**ssl_baselines.GUARD, **options["guard"]}, 2)
    data, key = study.run.data, study.run.key
    x, y = data.tensors("test")
    by_hand = {}
    ours, patch, guard = study.ours(), study.patch(), study.sslguard()
    for name, marked in (("patch", patch), ("SSLGuard", guard)):
        model = marked.load()
        images = x[y != key.target_class] if name == "patch" else x
        with torch.no_grad():
            stamped = encode(model, model.trigger(images))
            if name == "patch":
                answered = study.probe(model).network.head(stamped).argmax(1)
                by_hand[name] = float((answered == key.target_class).float().mean())
            else:
                by_hand[name] = float((model.cosines(stamped) > 0.5).float().mean())
    verdict = Judge(study.run).row(study.run._victim_suspect())  # what `meadef run` says of ours
    by_hand["MEA-Defender"] = verdict.wsr
    measured = {row["scheme"]: float(row["rate"]) for row in rows if row["model"] == "victim"}
    assert measured == pytest.approx(by_hand)
    assert ours.sha256 == study.run.victim("victim")["sha256"]


def test_experiments_that_it_cannot_use(tmp_path):
    file = write(shrink(merged("digits/supervised.yaml")), tmp_path / "small.yaml")
    with pytest.raises(MisconfigurationException, match="This study compares encoders"):
        ssl_baselines.main([file], output=tmp_path / "out")
