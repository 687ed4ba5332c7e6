"""Budget curves, from rows as reports hold them, and budgets as experiments declare them."""

from statistics import mean, stdev

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.stats import t
from small import EXPERIMENTS

from meadef_lightning.experiment.curves import budget_curves, budget_series
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.rows import SuspectRow

DIGITS = EXPERIMENTS / "digits" / "supervised.yaml"


def stolen(name, queries, wsr, kind="extracted"):
    return SuspectRow(name, kind, "Distillation", "soft", queries, 0.9, 0.9, wsr, (0.0, 1.0), 0.0, 0.01, "inconclusive")


ROWS = [
    stolen("soft-1000/seed-0", 1000, 0.7),
    stolen("soft-100/seed-0", 100, 0.1),
    stolen("soft-1000/seed-1", 1000, 0.8),
    stolen("soft-100/seed-1", 100, 0.3),
    stolen("hard-100/seed-0", 100, 0.0),  # one budget only
    stolen("soft/seed-0", 500, 0.5),
    stolen("independent-0/seed-0", 0, 0.0, kind="independent"),
    stolen("independent-1/seed-0", 0, 0.0, kind="independent"),
]


def test_series_join_seeds_and_rise():
    series = budget_series(ROWS)
    assert {name: [cell.queries for cell in cells] for name, cells in series.items()} == {"soft": [100, 1000]}


def test_curve_shows_means_and_student_intervals():
    figure = budget_curves(budget_series(ROWS))
    bars = figure.axes[1].containers[0]
    assert bars.lines[0].get_xdata().tolist() == [100, 1000]
    assert bars.lines[0].get_ydata() == pytest.approx([20, 75])
    half = t.ppf(0.975, 1) * stdev([10, 30]) / 2**0.5
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((mean([10, 30]) - half, mean([10, 30]) + half))
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["soft"]


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="at several budgets"):
        budget_curves(budget_series(ROWS[4:]))


def test_budgets_become_attacks_of_their_own(tmp_path):
    attacks = yaml.safe_load(DIGITS.read_text())["extraction"]
    attacks[0]["budgets"] = [80, 240]
    (tmp_path / "curve.yaml").write_text(yaml.safe_dump({"extraction": attacks[:2]}))
    experiment = load_experiment([DIGITS, tmp_path / "curve.yaml"])
    spec = experiment.build()
    assert [attack.name for attack in spec.extraction] == ["soft-80", "soft-240", "hard"]
    assert [attack.queries(None, spec.data).queries for attack in spec.extraction] == [80, 240, None]
    (tmp_path / "again.yaml").write_text(experiment.yaml())  # what is saved beside the results runs again
    assert load_experiment([tmp_path / "again.yaml"]).config("extraction") == experiment.config("extraction")
    attacks[0]["queries"] = {"class_path": "meadef_lightning.extraction.DataFreeDataModule"}
    (tmp_path / "curve.yaml").write_text(yaml.safe_dump({"extraction": attacks[:1]}))
    with pytest.raises(MisconfigurationException, match=r"has budgets, but .*DataFreeDataModule takes no `queries`"):
        load_experiment([DIGITS, tmp_path / "curve.yaml"])
