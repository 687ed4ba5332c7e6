"""The two studies of false claims: their arithmetic on made-up answers, and real ones at test size that resume."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks import calibration, false_claims
from scipy import stats

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.verification.answers import AnswerTable
from meadef_lightning.victims.networks import MLP
from meadef_lightning.watermark import KeySpace

SPACE = KeySpace(4)  # 192 keys
SMALL = {"CNN 24": partial(MLP, hidden=(24,), grid=8), "other": partial(MLP, hidden=(16, 16), grid=8)}


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    natural = torch.randint(4, (50,), generator=generator)
    return AnswerTable(torch.randint(4, (12, 8, 20), generator=generator).short(), natural, natural, SPACE)


def test_randomised_p_is_uniform_over_all_keys():
    values = torch.tensor([3.0, 1.0, 1.0, 1.0, 2.0, 0.0])
    # every key in turn, ties broken by a grid: the p-values fill (0, 1) evenly
    p = np.sort(
        [
            calibration.randomised_p(float(values[i]), torch.cat([values[:i], values[i + 1 :]]), (u + 0.5) / 100)
            for i in range(6)
            for u in range(100)
        ]
    )
    assert np.abs(p - (np.arange(600) + 0.5) / 600).max() < 0.006


def test_uniformity_is_that_of_a_uniform_sample_and_sees_a_watermark():
    tables = [noise(seed) for seed in range(40)]
    fair = calibration.uniformity(tables, [], 9999)
    assert fair["ks_p"] > 0.01
    assert fair["ks"] == pytest.approx(stats.kstest(fair["p"], "uniform").statistic)
    for index, table in enumerate(tables):
        key = calibration.WatermarkKey.draw(4, f"calibration model {index}")
        a, b = key.source_classes
        table.answers[a * 3 + b - (b > a), key.space.index(key.combiner)] = key.target_class
    assert calibration.uniformity(tables, [], 9999)["ks_p"] < 1e-6


def test_power_counts_thefts_by_kind():
    rows = [
        {"labels": labels, "wsr": wsr, "verdict": verdict}
        for labels, wsr, verdict in (("soft", 0.9, "supported"), ("soft", 0.6, "inconclusive"), ("hard", 0.1, "not supported"))
    ]  # fmt: skip
    power = calibration.power(rows)
    assert {name: (row["supported"], row["thefts"]) for name, row in power.items()} == {
        "all": (1, 3), "soft": (1, 2), "hard": (0, 1), "wsr > 50 %": (1, 2),
    }  # fmt: skip


def test_recipes_differ_and_training_repeats(monkeypatch):
    recipes = [calibration.recipe(index) for index in range(12)]
    assert [how["architecture"] for how in recipes] == list(calibration.ARCHITECTURES) * 2
    assert len({json.dumps(how) for how in recipes}) == 12
    monkeypatch.setattr(calibration, "ARCHITECTURES", SMALL)
    how = calibration.recipe(-1) | {"epochs": 2, "share": 0.5}
    x, y = torch.randn(100, 1, 8, 8), torch.arange(100) % 4
    state = torch.random.get_rng_state()
    first, second = (calibration.train(how, x, y, 4) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    third = calibration.train(how | {"seed": 5}, x, y, 4)
    assert not torch.equal(next(first.parameters()), next(third.parameters()))
    assert not first.training


@pytest.fixture
def data():
    return DigitsDataModule(image_size=8, victim_size=500, attacker_size=200, validation_size=0, test_size=100)


@pytest.fixture
def small(monkeypatch):
    for module in (calibration, false_claims):
        monkeypatch.setattr(module, "ARCHITECTURES", SMALL)


def test_a_small_study_resumes_and_grows(small, data, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    theft = {"name": "soft", "labels": "soft", "wsr": 0.7, "p_value": 0.0005, "verdict": "supported"}
    rows = [theft | {"kind": "extracted"}, theft | {"kind": "victim", "name": "victim"}]
    (tmp_path / "run" / "report.json").write_text(json.dumps({"suspects": rows}))
    out = tmp_path / "out"
    result = calibration.study(data, 3, 2, 6, [tmp_path], out)
    assert result["power"]["all"]["thefts"] == 1
    assert result["accuracy"]["mean"] > 0.3  # small networks, few steps, but far above a tenth
    test = result["tests"]["all keys"]
    assert (test["own"]["trials"], test["shared"]["trials"]) == (3, 6)
    assert test["every"]["largest_rate_of_a_model"] <= 0.001
    listed = list(csv.DictReader((out / "calibration.csv").read_text().splitlines()))
    assert len(listed) == 4 * 3 * (1 + 2) + 3
    assert sum(row["verdict"] == "supported" for row in listed if row["test"] == "all keys") == (
        test["own"]["supported"] + test["shared"]["supported"]
    )
    assert "| soft | 1/1 |" in (out / "calibration.md").read_text()
    assert (out / "calibration.png").stat().st_size > 5000
    assert json.loads((out / "calibration.json").read_text())["models"] == 3

    trained = []
    real = calibration.train
    monkeypatch.setattr(calibration, "train", lambda how, *rest: trained.append(how["seed"]) or real(how, *rest))
    assert calibration.study(data, 3, 2, 6, [tmp_path], out) == result
    assert trained == []
    calibration.study(data, 4, 2, 6, [], out)
    assert trained == [4]
    with pytest.raises(MisconfigurationException, match="other data"):
        calibration.study(data, 3, 2, 7, [], out)
    with pytest.raises(MisconfigurationException, match=r"no report\.json"):
        calibration.study(data, 3, 2, 6, [tmp_path / "nothing"], out)
    with pytest.raises(MisconfigurationException, match="models=1"):
        calibration.study(data, 1, 2, 6, [], out)


def test_a_small_study_of_false_claims(small, data, tmp_path, monkeypatch):
    monkeypatch.setattr(false_claims, "GRINDING", (1, 20))
    monkeypatch.setattr(false_claims, "REPEATS", 1)
    monkeypatch.setattr(false_claims, "CHEAP", ("other",))
    rows = false_claims.run_study(data, 2, 1, 6, tmp_path)
    assert rows["none: drawn keys, judge's images"]["above"]["trials"] == 2 * 4
    assert rows["grinding 20 secrets after seeing the suspect"]["without"]["trials"] == 2
    picked, forged = (
        rows["picked by hand after seeing the suspect"],
        rows["picked by hand, claims a draw that nobody repeats"],
    )
    for mode in ("without", "above"):
        assert (picked[mode]["exact"], forged[mode]["exact"]) == (0, 1)
        assert picked[mode]["supported"] == 0
        # the flag in the file is all that differs: what it turns into a claim is else inconclusive
        assert picked[mode]["inconclusive"] == forged[mode]["supported"] + forged[mode]["inconclusive"]
        assert picked[mode]["wsr"] == forged[mode]["wsr"]
    assert rows["planted targets"]["without"]["trials"] == 2
    assert rows["planted targets"]["source_accuracy"] < rows["drawn keys, accuser's natural images"]["source_accuracy"]
    text = (tmp_path / "false_claims.md").read_text()
    assert len(text.splitlines()) == 4 + len(rows)
    monkeypatch.setattr(false_claims, "rows_of", lambda *_: dict.fromkeys(rows, pytest.fail))
    assert false_claims.run_study(data, 2, 1, 6, tmp_path) == rows
    assert (tmp_path / "false_claims.md").read_text() == text
    with pytest.raises(MisconfigurationException, match="other data"):
        false_claims.run_study(data, 2, 2, 6, tmp_path)
    with pytest.raises(MisconfigurationException, match="suspects=0"):
        false_claims.run_study(data, 0, 2, 6, tmp_path)
