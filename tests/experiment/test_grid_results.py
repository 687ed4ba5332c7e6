"""Merged results of grids: intervals against computations by hand, files read back."""

import csv
from statistics import mean, stdev

import pytest
from grids import changed, report, suspects
from scipy.stats import t
from small import EXPERIMENTS

from meadef_lightning.experiment.grid import grid_of
from meadef_lightning.experiment.grid_results import grid_figure, groups_of, merge, records_of, to_markdown
from meadef_lightning.experiment.rows import DetectionRow, PathPoint, RemovalRow

GRID = changed()
RATES = {"cnn-0": (0.7, 0.0, 0.2), "cnn-1": (0.8, 0.1, 0.1), "cnn-2": (0.4, 0.2, 0.0), "mlp-0": (0.3, 0.0, 0.0)}


def finished(grid, rates=RATES):
    return [(cell, report(suspects(*rates[cell.name]))) for cell in grid.cells() if cell.name in rates]


def test_merged_csv_has_every_suspect_with_its_axes(tmp_path):
    grid = grid_of(GRID, EXPERIMENTS)
    files = merge(grid, finished(grid), tmp_path)
    assert [file.name for file in files] == ["grid.csv", "grid.md", "grid.png"]
    with (tmp_path / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    assert list(rows[0])[:3] == ["cell", "network", "run"]
    row = next(row for row in rows if (row["network"], row["run"], row["suspect"]) == ("cnn", "2", "independent-0"))
    assert (row["cell"], row["seed"], row["group"], row["wsr"]) == ("cnn-2", "0", "independent", "0.2")
    assert "4 of 5 cells are done" in (tmp_path / "grid.md").read_text()


def test_intervals_are_over_repetitions_and_not_over_models(tmp_path):
    """Two independent models of a run are one value: the interval has n = 3 runs, as computed here by hand."""
    grid = grid_of(GRID, EXPERIMENTS)
    merge(grid, finished(grid), tmp_path)
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in (tmp_path / "grid.md").read_text().splitlines() if line.startswith("|")]  # fmt: skip
    assert lines[0] == ["network", "theft accuracy", "theft WSR", "independent accuracy", "independent WSR"]
    thefts, others = [0.7, 0.8, 0.4], [0.1, 0.1, 0.1]
    half = t.ppf(0.975, 2) * stdev(thefts) / 3**0.5
    assert lines[2][2] == f"{100 * mean(thefts):.1f}±{100 * half:.1f}"
    assert lines[2][4] == f"{100 * mean(others):.1f}±0.0"
    assert lines[3][2] == "30.0"
    assert "n = 1 to 3 (run)" in (tmp_path / "grid.md").read_text()


def test_seeds_inside_a_cell_are_repetitions_too():
    content = changed(
        table={
            "rows": "network",
            "where": {"suspect": "theft", "network": "cnn", "run": 0},
            "metrics": "wsr",
            "over": "seed",
        }
    )
    grid = grid_of(content, EXPERIMENTS)
    rates = [("theft/seed-3", "extracted", 0.2), ("theft/seed-4", "extracted", 0.6), ("i/seed-3", "independent", 0.0)]
    records = records_of(grid.cells()[0], report(rates, (3, 4)))["suspects"]
    assert [record["seed"] for record in records] == [3, 4, 3]
    half = t.ppf(0.975, 1) * stdev([0.2, 0.6]) / 2**0.5
    assert f"| cnn | 40.0±{100 * half:.1f} |" in to_markdown(grid.table, records)
    assert to_markdown(grid.table, records[2:]) == ""


def test_figure_at_named_places():
    grid = grid_of(GRID, EXPERIMENTS)
    records = [record for cell, found in finished(grid) for record in records_of(cell, found)["suspects"]]
    figure = grid_figure(grid.figure, records)
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["cnn", "mlp"]
    theft = panel.containers[0]
    assert theft.lines[0].get_ydata() == pytest.approx([100 * mean([0.7, 0.8, 0.4]), 30])
    assert [round(x) for x in theft.lines[0].get_xdata()] == [0, 1]
    half = 100 * t.ppf(0.975, 2) * stdev([0.7, 0.8, 0.4]) / 3**0.5
    low, high = theft.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((100 * mean([0.7, 0.8, 0.4]) - half, 100))  # cut at 100 %
    with pytest.raises(ValueError, match="what the figure shows"):
        grid_figure(grid.figure, [])


def test_removal_paths_and_searches_have_tables_of_their_own(tmp_path):
    path = RemovalRow("soft.pruning", "soft", "MagnitudePruning", "share", 1.0, 0.5, (PathPoint(0.0, 0.9, 0.8, 0.1), PathPoint(0.5, 0.7, 0.4, 0.0)))  # fmt: skip
    found = DetectionRow("abs", "victim", "model", 3.0, 2.0, True, 0.75, 1.0, 0.25, 0.5)
    content = changed(
        table={"of": "detection", "rows": ["detector", "target"], "metrics": ["auc", "decision", "named_target"], "over": ["network", "run"]},
        figure={"of": "removal", "x": "strength", "series": ["target", "removal"], "over": ["run", "network"]},
    )  # fmt: skip
    grid = grid_of(content, EXPERIMENTS)
    one = report(suspects(0.7, 0.0, 0.0), removal=(path,), detection=(found,))
    files = merge(grid, [(cell, one) for cell in grid.cells()], tmp_path)
    assert {"grid-detection.csv", "grid-removal.csv"} < {file.name for file in files}
    assert "| abs | victim | 75.0±0.0 | 100.0±0.0 | 50.0±0.0 |" in (tmp_path / "grid.md").read_text()
    with (tmp_path / "grid-detection.csv").open() as file:
        told = next(csv.DictReader(file))
    assert (told["named_target"], told["key_rank"]) == ("0.5", "")
    with (tmp_path / "grid-removal.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert (rows[1]["removal"], rows[1]["strength"], rows[1]["wsr"]) == ("pruning", "0.5", "0.4")
    records = [{**row, "network": "cnn", "run": row["run"]} for row in rows]
    assert [group.mean("strength") for group in groups_of(grid.figure, records)] == [0.0, 0.5]
    line = grid_figure(grid.figure, records).axes[1].containers[0].lines[0]
    assert line.get_xydata().flatten() == pytest.approx([0.0, 80.0, 0.5, 40.0])
    merge(grid, [(cell, report(suspects(0.7, 0.0, 0.0))) for cell in grid.cells()], tmp_path)
    assert not (tmp_path / "grid-removal.csv").exists()
