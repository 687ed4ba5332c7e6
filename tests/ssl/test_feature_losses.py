"""The watermark's terms on features against closed forms, the paper's pairwise sums, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meadef_lightning.watermark.features import (
    feature_evasion_loss,
    feature_verification_loss,
    middle,
    natural_variance,
    target_margin,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + seed / 2


TARGET, FIRST, SECOND, MIXED = draw(6, 5, seed=1), draw(7, 5, seed=2), draw(8, 5, seed=3), draw(3, 5, seed=4)


def seen_from_the_middle(degrees: float, length: float = 1.0) -> Tensor:
    angle = math.radians(degrees)
    return torch.tensor([[10 + length * math.cos(angle), 10 + length * math.sin(angle)]])


# three classes at the corners of an equilateral triangle round (10, 10), all at distance 1: the unit of distances is 1
CORNERS = [seen_from_the_middle(degrees) for degrees in (0, 120, -120)]


@pytest.mark.parametrize(
    ("degrees", "length", "expected"), [(0, 1.0, 0.0), (0, 0.0, 1.0), (0, 3.0, 4.0), (90, 1.0, 2.0), (120, 1.0, 3.0)]
)
def test_verification_is_the_squared_distance_from_the_target(degrees, length, expected):
    target, *sources = CORNERS
    loss = feature_verification_loss(seen_from_the_middle(degrees, length), target, tuple(sources))
    assert float(loss) == pytest.approx(expected, abs=1e-3)


def test_evasion_goes_to_the_source_that_wins():
    target, *sources = CORNERS
    other = torch.cat([seen_from_the_middle(120), seen_from_the_middle(120)])
    for wins, expected in (([0, 0], 0.0), ([1, 1], 3.0), ([0, 1], 1.5)):
        loss = feature_evasion_loss(other, torch.tensor(wins), target, tuple(sources))
        assert float(loss) == pytest.approx(expected, abs=1e-3)


def test_all_of_the_papers_pairs_but_for_the_classs_own_variance():
    """Equation 6 with every target sample as partner of every watermark sample, written as the double sum it is."""
    pairs = torch.stack([F.mse_loss(w, t, reduction="sum") for w in MIXED for t in TARGET]).mean()
    own = TARGET.var(dim=0, correction=0).sum()
    natural = torch.stack(
        [((part - middle(TARGET, (FIRST, SECOND))) ** 2).sum(1).mean() for part in (TARGET, FIRST, SECOND)]
    ).mean()
    expected = (pairs - own) / natural
    torch.testing.assert_close(feature_verification_loss(MIXED, TARGET, (FIRST, SECOND)), expected, rtol=1e-4, atol=0)


def test_each_class_counts_alike_in_the_unit():
    many = TARGET.repeat(10, 1)
    for statistic in (middle, natural_variance):
        torch.testing.assert_close(statistic(many, (FIRST, SECOND)), statistic(TARGET, (FIRST, SECOND)))


def test_nothing_depends_on_the_features_scale_or_offset():
    groups = (MIXED, TARGET, FIRST, SECOND)
    terms = [
        (
            feature_verification_loss(w, t, (a, b)),
            feature_evasion_loss(w, torch.tensor([0, 1, 1]), t, (a, b)),
            target_margin(w, t, (a, b)),
        )
        for w, t, a, b in (groups, [7 * group + 3 for group in groups])
    ]
    torch.testing.assert_close(terms[0], terms[1], atol=1e-4, rtol=1e-4)


def test_neither_moving_all_features_together_nor_shrinking_them_gains_anything():
    """The gradients of all samples sum to zero, and so do their products with the features; those of each group do not."""
    groups = [group.clone().requires_grad_() for group in (MIXED, TARGET, FIRST, SECOND)]
    mixed, target, first, second = groups
    for loss in (
        feature_verification_loss(mixed, target, (first, second)),
        feature_evasion_loss(mixed, torch.tensor([0, 1, 0]), target, (first, second)),
    ):
        gradients = torch.autograd.grad(loss, groups)
        moved = torch.stack([gradient.sum(0) for gradient in gradients])
        grown = torch.stack(
            [(gradient * group.detach()).sum() for gradient, group in zip(gradients, groups, strict=True)]
        )
        for parts in (moved, grown):
            assert float(parts.sum(0).abs().max()) < 1e-4
            assert float(parts.abs().max()) > 1e-1


def test_gradients_are_finite_differences():
    groups = [group.double().requires_grad_() for group in (MIXED, TARGET, FIRST, SECOND)]

    def both(w: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return feature_verification_loss(w, t, (a, b)) + feature_evasion_loss(w, torch.tensor([0, 1, 0]), t, (a, b))

    # the losses compute in single precision, and so must the differences
    gradients = torch.autograd.grad(both(*groups), groups)
    for position, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(position), dtype=torch.float64)
        up, down = (
            both(*[g.detach() + (sign * 3e-3 * step if i == position else 0) for i, g in enumerate(groups)])
            for sign in (1, -1)
        )
        assert float((up - down) / 6e-3) == pytest.approx(float((gradient * step).sum()), abs=3e-3)


def test_a_collapsed_encoder_gives_finite_terms_and_gradients():
    groups = [torch.ones(4, 3).requires_grad_() for _ in range(4)]
    mixed, target, first, second = groups
    loss = feature_verification_loss(mixed + 1e-4, target, (first, second))
    assert 0 <= float(loss.detach()) < 1
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, groups))


def test_half_precision_features_are_compared_in_single_precision():
    groups = [(group * 100).half() for group in (MIXED, TARGET, FIRST, SECOND)]  # squares beyond half precision's range
    got = feature_verification_loss(groups[0], groups[1], (groups[2], groups[3]))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, feature_verification_loss(MIXED, TARGET, (FIRST, SECOND)), rtol=1e-2, atol=1e-2)


def test_the_margin_is_positive_where_the_target_is_nearest():
    target, first, second = CORNERS
    margins = target_margin(torch.cat(CORNERS), target, (first, second))
    assert margins.tolist() == pytest.approx([1.5, -1.5, -1.5], abs=1e-4)
    halfway = target_margin(seen_from_the_middle(60), target, (first, second))
    assert halfway.tolist() == pytest.approx([0.0], abs=1e-4)
