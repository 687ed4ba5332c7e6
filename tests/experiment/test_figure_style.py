"""What all figures have in common: how they are saved, and that they neither heed nor leave any settings."""

import errno

import matplotlib
import numpy as np
import pytest
import torch
from failing_files import raiser
from figure_cases import NAMES, ROWS, everything_inside

from meadef_lightning.experiment import artifacts
from meadef_lightning.experiment.artifacts import OutputError
from meadef_lightning.experiment.figure_style import save
from meadef_lightning.experiment.sample_figures import feature_pca, watermark_grid
from meadef_lightning.experiment.verdict_figures import decoy_distribution, wsr_bars


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

    monkeypatch.setattr(artifacts.os, "fsync", raiser(errno.ENOSPC))
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
