"""Figures show the numbers they are given, where they are given."""

import errno
import os

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from sklearn.decomposition import PCA

from meadef_lightning.experiment import artifacts
from meadef_lightning.experiment.aggregate import aggregate
from meadef_lightning.experiment.artifacts import OutputError
from meadef_lightning.experiment.figures import (
    KIND_COLOURS,
    critical_statistic,
    decoy_distribution,
    feature_pca,
    save,
    watermark_grid,
    wsr_bars,
)
from meadef_lightning.experiment.rows import SuspectRow

NAMES = ["shirt", "trouser", "pullover", "$x^{$", "a very long class name of many words"]


def suspect(name, wsr, ci, kind="extracted", wfpr=0.02, p=0.0007, verdict="supported"):
    return SuspectRow(name, kind, "distillation", "soft", 600, 0.95, 0.97, wsr, ci, wfpr, p, verdict)


ROWS = [
    suspect("victim", 1.0, (0.99, 1.0), "victim", wfpr=0.01),
    suspect("soft", 0.84, (0.80, 0.88)),
    suspect("scrubbed", 0.61, (0.55, 0.66), "removed", wfpr=0.08),
    suspect("$independent^{$", 0.03, (0.01, 0.06), "independent", p=0.6, verdict="not supported"),
]


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def legend_of(figure):
    return {text.get_text(): handle for text, handle in zip(
        figure.legends[0].get_texts(), figure.legends[0].legend_handles, strict=True
    )}  # fmt: skip


def everything_inside(figure):
    """Titles, labels, names, notes and legend lie within the page."""
    figure.draw_without_rendering()
    shown = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        shown += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts, *ax.get_yticklabels()]
    # numbers on an axis are left out: those beyond its limits exist without being drawn
    for text in (text for text in shown if text.get_text().strip(".\N{MINUS SIGN}0123456789")):
        box = text.get_window_extent()
        assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, text
        assert figure.bbox.y0 - 1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, text


def all_figures():
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randn(2, 3, 8, 8, generator=generator) for name in ("source A", "source B", "watermark")}
    answers = {name: torch.eye(5)[[3, 4]] for name in images}
    rng = np.random.default_rng(0)
    groups = {name: rng.normal(size=(9, 4)) for name in ("A: $x^{$", "B", "target", "watermark")}
    return [
        watermark_grid(images, answers, NAMES, [0.5] * 3, [0.25] * 3),
        wsr_bars(ROWS),
        feature_pca(groups),
        decoy_distribution(rng.normal(size=99), 2.5, 0.01, 0.05),
        decoy_distribution(rng.exponential(size=999), 9, 0.001, 0.0001),
    ]


# --- saving, and what all figures have in common


def test_every_figure_saves_as_png_with_all_text_inside(tmp_path):
    for index, figure in enumerate(all_figures()):
        everything_inside(figure)
        data = save(figure, tmp_path / f"{index}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        assert (width, height) == pytest.approx(tuple(150 * figure.get_size_inches()), abs=1)


def test_same_input_gives_the_same_bytes(tmp_path):
    for first, second in zip(all_figures(), all_figures(), strict=True):
        assert save(first, tmp_path / "a.png").read_bytes() == save(second, tmp_path / "b.png").read_bytes()


def test_full_disk_keeps_the_old_figure(tmp_path, monkeypatch):
    figure = wsr_bars(ROWS)
    before = save(figure, tmp_path / "a.png").read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        save(figure, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_reader_settings_neither_matter_nor_change(tmp_path):
    plain = save(wsr_bars(ROWS), tmp_path / "plain.png").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.bbox": "tight", "font.weight": 900}):
        before = dict(matplotlib.rcParams)
        assert save(wsr_bars(ROWS), tmp_path / "own.png").read_bytes() == plain
        assert dict(matplotlib.rcParams) == before


def test_pyplot_knows_nothing_of_them():
    from matplotlib import pyplot

    all_figures()
    assert pyplot.get_fignums() == []


# --- watermark grid


def grid_input(channels=1, rows=3):
    images = {name: torch.randn(rows, channels, 6, 5) for name in ("source A", "source B", "watermark")}
    probabilities = torch.tensor([[0.7, 0.1, 0.1, 0.1, 0], [0, 0.4, 0.6, 0, 0], [0, 0, 0, 0, 1]])[:rows]
    return images, {name: probabilities.roll(shift, 1) for shift, name in enumerate(images)}


@pytest.mark.parametrize(("channels", "mean", "std"), [(1, [0.3], [0.4]), (3, [0.1, 0.5, 0.9], [0.2, 0.3, 0.4])])
def test_grid_shows_denormalised_pictures_in_place(channels, mean, std):
    images, answers = grid_input(channels)
    figure = watermark_grid(images, answers, NAMES, mean, std, title="Victim")
    axes = np.array(figure.axes).reshape(3, 3)
    for column, (name, batch) in enumerate(images.items()):
        assert axes[0, column].get_title() == name
        for row in range(3):
            drawn = np.asarray(axes[row, column].images[0].get_array())
            expected = torch.stack([batch[row, c] * std[c] + mean[c] for c in range(channels)], -1).clamp(0, 1)
            np.testing.assert_allclose(drawn, expected.numpy().reshape(drawn.shape), atol=1e-6)
            assert axes[row, column].images[0].get_clim() == (0, 1)
    assert figure.get_suptitle() == "Victim"


def test_grid_writes_answer_and_confidence_under_each_picture():
    images, answers = grid_input()
    axes = np.array(watermark_grid(images, answers, NAMES, [0], [1]).axes).reshape(3, 3)
    assert [ax.get_xlabel() for ax in axes[0]] == ["shirt (70 %)", "trouser (70 %)", "pullover (70 %)"]
    assert [ax.get_xlabel() for ax in axes[1]] == [
        "pullover (60 %)",
        "$x^{$ (60 %)",
        "a very long class\nname of many words\n(60 %)",
    ]


def test_grid_of_hard_labels_claims_no_confidence():
    images, answers = grid_input()
    labels = {name: answer.argmax(1) for name, answer in answers.items()}
    axes = np.array(watermark_grid(images, labels, NAMES, [0], [1]).axes).reshape(3, 3)
    assert [ax.get_xlabel() for ax in axes[0]] == ["shirt", "trouser", "pullover"]


def test_grid_stops_at_max_rows_and_accepts_fewer():
    images, answers = grid_input()
    assert len(watermark_grid(images, answers, NAMES, [0], [1], max_rows=2).axes) == 6
    assert len(watermark_grid(images, answers, NAMES, [0], [1], max_rows=8).axes) == 9


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i, a: i.clear(), "same columns"),
        (lambda i, a: a.pop("watermark"), "same columns"),
        (lambda i, a: i.update(watermark=i["watermark"][:2]), r"equally many samples.*\[2, 3\]"),
        (
            lambda i, a: i.update({n: torch.zeros(3, 2, 4, 4) for n in i}),
            r"shape \(B, 1 or 3, H, W\), not \(3, 2, 4, 4\)",
        ),
        (lambda i, a: i.update({n: torch.zeros(3, 3, 4, 4) for n in i}), r"mean and std must hold 3 value"),
        (lambda i, a: i.update({n: torch.full((3, 1, 4, 4), torch.nan) for n in i}), "finite"),
        (
            lambda i, a: a.update({n: torch.zeros(3, 4) for n in a}),
            "answers have 4 classes, but there are 5 class names",
        ),
        (lambda i, a: a.update({n: torch.tensor([0, 1, 5]) for n in a}), "labels below 5"),
        (lambda i, a: a.update({n: torch.tensor([0, -1, 2]) for n in a}), "labels below 5"),
    ],
)
def test_grid_refuses_what_does_not_match(damage, message):
    images, answers = grid_input()
    damage(images, answers)
    with pytest.raises(ValueError, match=message):
        watermark_grid(images, answers, NAMES, [0], [1])


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


# --- PCA


def clouds():
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(size=(20, 6)) + 4 * np.eye(6)[i] for i, name in enumerate(["A", "B", "target", "watermark"])
    }


def test_projection_is_that_of_the_natural_classes():
    groups = clouds()
    figure = feature_pca(groups, title="Features")
    natural = np.concatenate([groups[name] for name in ("A", "B", "target")])
    centred = natural - natural.mean(0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    shares = 100 * scale**2 / (scale**2).sum()
    drawn = {item.get_label(): np.asarray(item.get_offsets()) for item in figure.axes[0].collections}
    assert list(drawn) == ["A (20)", "B (20)", "target (20)", "watermark (20)"]
    for name, values in groups.items():
        expected = (values - natural.mean(0)) @ axes[:2].T
        # a principal axis has no sign
        np.testing.assert_allclose(np.abs(drawn[f"{name} (20)"]), np.abs(expected), atol=1e-9)
    assert figure.axes[0].get_xlabel() == f"component 1 ({shares[0]:.1f} % of the natural variance)"
    assert figure.axes[0].get_ylabel() == f"component 2 ({shares[1]:.1f} %)"
    assert figure.get_suptitle() == "Features"


def test_watermark_does_not_move_the_view():
    groups = clouds()
    moved = {**groups, "watermark": groups["watermark"] + 100}
    first, second = (feature_pca(g).axes[0].collections for g in (groups, moved))
    for before, after in list(zip(first, second, strict=True))[:3]:
        np.testing.assert_array_equal(before.get_offsets(), after.get_offsets())
    np.testing.assert_raises(
        AssertionError, np.testing.assert_allclose, first[3].get_offsets(), second[3].get_offsets()
    )
    everything = feature_pca(groups, overlay=())
    pca = PCA(2, svd_solver="full").fit(np.concatenate(list(groups.values())))
    np.testing.assert_allclose(everything.axes[0].collections[3].get_offsets(), pca.transform(groups["watermark"]))


def test_groups_differ_in_colour_and_shape_and_take_tensors():
    groups = {name: torch.from_numpy(values).requires_grad_() for name, values in clouds().items()}
    items = feature_pca(groups).axes[0].collections
    assert len({to_hex(item.get_facecolor()[0]) for item in items}) == 4
    assert len({item.get_paths()[0].vertices.tobytes() for item in items}) == 4


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"watermark": np.zeros((5, 4))}, "at least three natural samples"),
        ({"A": np.zeros((5, 4)), "B": np.zeros((5, 3))}, "one width"),
        ({"A": np.zeros((5, 1))}, "two or more"),
        ({"A": np.zeros((2, 4))}, "at least three natural samples"),
        ({"A": np.zeros(4)}, r"features of 'A' must be .* 2 dimension"),
        ({"A": np.full((5, 4), np.inf)}, "finite"),
        ({}, "at least three natural samples"),
    ],
)
def test_projection_refuses_what_it_cannot_project(groups, message):
    with pytest.raises(ValueError, match=message):
        feature_pca(groups)


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
