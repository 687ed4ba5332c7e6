"""Figures of verdicts show the rates, intervals and statistics they are given, where they are given."""

import numpy as np
import pytest
from figure_cases import ROWS, everything_inside, legend_of, suspect, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from meadef_lightning.experiment.aggregate import aggregate
from meadef_lightning.experiment.verdict_figures import KIND_COLOURS, critical_statistic, decoy_distribution, wsr_bars

# --- WSR bars


def bars_and_whiskers(figure):
    bars, whiskers = figure.axes[0].containers
    segments = whiskers.lines[2][0].get_segments()
    return list(bars), [tuple(segment[:, 0]) for segment in segments], [segment[0, 1] for segment in segments]


def test_bars_have_the_suspects_rates_intervals_and_colours():
    figure = wsr_bars(ROWS)
    ax = figure.axes[0]
    bars, whiskers, heights = bars_and_whiskers(figure)
    assert [bar.get_width() for bar in bars] == pytest.approx([100 * row.wsr for row in ROWS])
    assert np.array(whiskers) == pytest.approx(100 * np.array([row.wsr_ci for row in ROWS]))
    assert heights == pytest.approx([bar.get_y() + bar.get_height() / 2 for bar in bars])
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [KIND_COLOURS[row.kind] for row in ROWS]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [row.name for row in ROWS]
    assert list(ax.get_yticks()) == heights
    assert ax.yaxis_inverted()  # first suspect on top
    (wfpr,) = ax.collections[1:]
    assert np.asarray(wfpr.get_offsets()) == pytest.approx(np.array([[100 * r.wfpr, i] for i, r in enumerate(ROWS)]))
    assert {"supported, p = 0.0007", "not supported, p = 0.6"} <= set(texts(figure))


@pytest.mark.parametrize("threshold", [None, 0.45])
def test_paper_line_stands_at_its_threshold(threshold):
    figure = wsr_bars(ROWS) if threshold is None else wsr_bars(ROWS, threshold=threshold)
    percent = 30 if threshold is None else 45
    (line,) = [line for line in figure.axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
    assert list(line.get_xdata()) == [percent, percent]
    assert f"{percent} % criterion of the paper" in legend_of(figure)


def test_legend_names_the_kinds_that_occur():
    assert [name for name in legend_of(wsr_bars(ROWS[1:2])) if name.startswith("WSR")] == ["WSR, extracted"]
    legend = legend_of(wsr_bars(ROWS))
    assert to_hex(legend["WSR, independent (negative control)"].get_facecolor()).upper() == KIND_COLOURS["independent"]
    assert "95 % interval (Wilson)" in legend


def test_seeds_become_one_bar_with_dots():
    seeds = [
        suspect(f"soft/seed-{n}", wsr, (0, 1), p=p)
        for n, (wsr, p) in enumerate([(0.7, 0.01), (0.8, 0.02), (0.9, 0.03)])
    ]
    figure = wsr_bars([*seeds, ROWS[3]])
    bars, whiskers, _ = bars_and_whiskers(figure)
    assert [bar.get_width() for bar in bars] == pytest.approx([80, 3])
    assert whiskers[0] == pytest.approx(100 * np.array(aggregate(seeds)[0].wsr_interval))
    assert whiskers[1] == pytest.approx((1, 6))
    dots = figure.axes[0].collections[2]
    assert sorted(np.asarray(dots.get_offsets())[:, 0]) == pytest.approx([70, 80, 90])
    assert "supported, p ≤ 0.03" in texts(figure)
    assert "95 % interval (dots: seeds)" in legend_of(figure)
    everything_inside(figure)


def test_no_suspects_no_bars():
    with pytest.raises(ValueError, match="no suspect"):
        wsr_bars([])


# --- decoys


def line_named(figure, start):
    (line,) = [line for line in figure.axes[0].lines if str(line.get_label()).startswith(start)]
    return line


def test_histogram_counts_the_decoys_and_marks_the_true_key():
    decoys = np.random.default_rng(2).normal(size=199)
    figure = decoy_distribution(decoys, 3.25, 0.005, 0.05, xlabel="T")
    bars = figure.axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 199
    for bar in bars[:-1]:
        assert bar.get_height() == ((decoys >= bar.get_x()) & (decoys < bar.get_x() + bar.get_width() - 1e-12)).sum()
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(3.25)  # the axis reaches the true key
    assert list(line_named(figure, "true key").get_xdata()) == [3.25, 3.25]
    assert {"199 decoy keys", "true key: 3.250, p = 0.005", "p ≤ 0.05 to the right"} == set(legend_of(figure))
    assert list(line_named(figure, "p ≤").get_xdata()) == [critical_statistic(decoys, 0.05)] * 2
    assert figure.axes[0].get_xlabel() == "T"


def test_count_axis_is_logarithmic_only_when_needed():
    crowded = np.concatenate([np.zeros(500), np.linspace(0.1, 0.5, 5)])
    assert decoy_distribution(crowded, 0.9, 0.002, 0.05).axes[0].get_yscale() == "log"
    assert decoy_distribution(np.linspace(0, 1, 99), 0.9, 0.1, 0.05).axes[0].get_yscale() == "linear"


def test_level_out_of_reach_is_said():
    figure = decoy_distribution(np.zeros(99), 1.0, 0.01, 0.001)
    assert "p ≤ 0.001 is out of reach of 99 decoys" in legend_of(figure)


@settings(deadline=None)
@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=60),
    st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.25, 0.5]),
    st.floats(-6, 6),
)
def test_critical_value_separates_significant_statistics(decoys, alpha, true):
    # the p-value itself, from its definition, in whole numbers to stay clear of rounding
    exceed = sum(decoy >= true for decoy in decoys)
    significant = (1 + exceed) * 1000 <= round(alpha * 1000) * (len(decoys) + 1)
    critical = critical_statistic(np.array(decoys, dtype=float), alpha)
    assert significant == (critical is not None and true > critical)


@pytest.mark.parametrize(
    ("statistics", "true", "p_value", "alpha"),
    [
        ([], 1.0, 0.1, 0.05),
        ([[0.1]], 1.0, 0.1, 0.05),
        ([float("nan")], 1.0, 0.1, 0.05),
        ([0.1], float("inf"), 0.1, 0.05),
        ([0.1], 1.0, 1.1, 0.05),
        ([0.1], 1.0, 0.1, 0.0),
    ],
)
def test_decoys_refuse_bad_input(statistics, true, p_value, alpha):
    with pytest.raises(ValueError, match="must be"):
        decoy_distribution(statistics, true, p_value, alpha)
