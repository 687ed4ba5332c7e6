"""The recipe study: its arithmetic on made-up cells, and a real study of two recipes at test size."""

import csv
import json
import shutil
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks import answer_lean, pareto
from silent import SILENT
from small import EXPERIMENTS, merged, shrink, write

from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.watermark import WatermarkKey, default_combiners


def cells(recipe, cost, soft, hard):
    return [
        {
            "recipe": recipe, "key": key, "seed": 0, "cost": cost + shift, "suspect": name, "labels": labels,
            "accuracy": 0.9, "wsr": wsr, "wfpr": 0.01, "p_value": 0.001, "verdict": verdict,
        }
        for key, shift in (("a", -0.1), ("b", 0.1))
        for name, labels, wsr, verdict in (
            ("victim", "hard", 1.0, "supported"),
            ("soft", "soft", soft, "supported"),
            ("hard", "hard", hard, "inconclusive"),
            ("independent-0", "hard", 0.0, "not supported"),
        )
    ]  # fmt: skip


ROWS = cells("cheap", 0.2, 0.5, 0.1) + cells("dear", 2.0, 0.9, 0.8) + cells("worse", 2.1, 0.8, 0.8)


def test_summary_means_and_points():
    table, points = pareto.summary(ROWS)
    assert points["dear"] == pytest.approx((2.0, 0.9, 0.8))
    line = next(line for line in table.splitlines() if line.startswith("| cheap"))
    assert "| 2 | 0.2±1.3 |" in line  # t(.975, 1) · .141 / √2 = 1.27
    assert "50.0±0.0 / 1.0±0.0 / 2/2" in line
    assert "independent" not in table


def test_differences_leave_the_keys_out():
    """Keys that differ by forty points, a recipe that takes ten in one and twelve in the other."""
    rows = cells("base", 1.0, 0.9, 0.8) + cells("other", 1.5, 0.8, 0.8)
    for row in rows:
        if row["key"] == "b" and row["suspect"] == "soft":
            row["wsr"] -= 0.4 + (0.02 if row["recipe"] == "other" else 0)
    rows += cells("new", 1.0, 0.9, 0.9)[:4]  # so far with one key
    first, other, new = (
        line.split(" | ") for line in pareto.differences(rows).splitlines() if not line.startswith("|--")
    )
    assert first == ["| against base", "accuracy cost", "victim WSR / WFPR", "soft WSR / WFPR", "hard WSR / WFPR |"]
    # 11 and t(.975, 1) · 1.41 / √2 = 12.7
    assert other[:2] == ["| other", "+0.5±0.0"]
    assert other[3:] == ["-11.0±12.7 / +0.0±0.0", "+0.0±0.0 / +0.0±0.0 |"]
    assert new == ["| new", "+0.0", "+0.0 / +0.0", "+0.0 / +0.0", "+10.0 / +0.0 |"]
    assert pareto.differences(rows[:8]) == ""


def test_front_drops_what_is_beaten():
    _, points = pareto.summary(ROWS)
    assert pareto.front(points) == ["cheap", "dear"]


def test_a_copy_that_breaks_off_is_no_stage(tmp_path, monkeypatch):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    files = {"stage.json": "{}", "checkpoints/model.ckpt": "weights"}
    for name, text in files.items():
        (tmp_path / "a" / name).write_text(text)

    target, copy, copied = tmp_path / "b", shutil.copyfile, []

    def breaking(source, *rest, **options):
        if copied:
            raise KeyboardInterrupt
        copied.append(source)
        return copy(source, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", breaking)
        with pytest.raises(KeyboardInterrupt):
            pareto.copy_stage(tmp_path / "a", target)
    assert len(copied) == 1
    assert not target.exists()
    pareto.copy_stage(tmp_path / "a", target)
    found = {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == files
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_small_study_shares_and_resumes(tmp_path, monkeypatch, capsys):
    config = shrink(merged("digits/supervised.yaml"))
    config["extraction"] = config["extraction"][:2]
    config["references"] = 2
    config["watermark"]["key"] = {"secret_env": "NOT_ASKED", "without": ["Donut"]}
    file = write(config, tmp_path / "small.yaml")
    arguments = [
        "pareto",
        str(file),
        "--output",
        str(tmp_path / "out"),
        "--recipes",
        "default",
        "no tilt",
        "no smoothing",
        "--keys",
        "k",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    pareto.main()
    assert "On the front" in capsys.readouterr().out
    text = (tmp_path / "out" / "pareto.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["recipe"] for row in rows] == [
        *("default",) * 5, *("no tilt",) * 5, *("no smoothing",) * 5,
    ]  # fmt: skip
    clean = [row for row in rows if row["suspect"] == "clean"]
    assert clean[0]["accuracy"] == clean[1]["accuracy"]
    digests = [
        (tmp_path / "out" / name / "k-seed-0" / "clean" / "result.json").read_text()
        for name in ("default", "no-tilt", "no-smoothing")
    ]
    assert digests[0] == digests[1] != digests[2]  # the last has a clean twin of its own
    key = WatermarkKey.load(tmp_path / "out" / "default" / "k-seed-0" / "watermark.key.json")
    assert key == WatermarkKey.draw(10, "k", combiners=default_combiners(["Donut"]))
    stages = {"clean", "reference", "reference-1", "independent"}
    shared = tmp_path / "out" / "shared" / "seed-0"
    for folder in ("as-it-is", "no-smoothing"):
        assert {path.name for path in (shared / folder).iterdir()} == stages
    for name in stages:  # copied with the time at which they were trained
        trained = {path.stat().st_mtime_ns for path in (tmp_path / "out").glob(f"*/k-seed-0/{name}/result.json")}
        assert len(trained) == 2
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 5000
    with monkeypatch.context() as patch:
        patch.setattr(pareto, "run", lambda *_: pytest.fail("ran again"))
        pareto.main()
    assert (tmp_path / "out" / "pareto.csv").read_text() == text

    config["victim"]["model"]["init_args"]["label_smoothing"] = 0.3
    write(config, file)
    with pytest.raises(MisconfigurationException, match="made from other inputs"):
        pareto.main()
    assert (tmp_path / "out" / "pareto.csv").read_text() == text

    answer_lean.main([str(tmp_path / "out" / "default"), str(tmp_path / "out" / "no-tilt"), "--epochs", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| victim | 2 |") for line in printed)
    assert any(line.startswith("Clean: 4 models") for line in printed)
    assert sum(line.startswith("| k-seed-0 |") for line in printed) == 2
    with pytest.raises(MisconfigurationException, match=r"no report\.json below"):
        answer_lean.main([str(tmp_path / "nothing")])


def test_every_recipe_is_another_one_and_trains():
    key, built = WatermarkKey.draw(10, "k"), {}
    start = ["--watermark.callback.init_args.start", "0.65"]  # the digits' own is a recipe's, too
    for name, overrides in pareto.RECIPES.items():
        experiment = load_experiment([EXPERIMENTS / "digits/supervised.yaml"], [*start, *overrides])
        spec = experiment.build()
        trainer = Trainer(
            callbacks=[spec.watermark.callback(key)], max_epochs=4, limit_train_batches=2, limit_val_batches=0, **SILENT
        )
        trainer.fit(spec.victim.model, spec.data)
        assert trainer.global_step == 8
        built[name] = json.dumps([experiment.config("watermark.callback"), experiment.config("victim")], sort_keys=True)
    assert len(set(built.values())) == len(built)
