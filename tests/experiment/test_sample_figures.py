"""Figures of samples show the pictures, answers and features they are given, where they are given."""

import numpy as np
import pytest
import torch
from figure_cases import NAMES
from matplotlib.colors import to_hex
from sklearn.decomposition import PCA

from meadef_lightning.experiment.sample_figures import feature_pca, watermark_grid

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
