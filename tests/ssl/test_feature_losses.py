"""The watermark's terms on features against closed forms, a brute-force sum, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from meadef_lightning.watermark.features import (
    feature_evasion_loss,
    feature_verification_loss,
    middle,
    prototype_logits,
    target_margin,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + seed / 2


MIXED, CENTRES = draw(3, 5, seed=4), torch.cat([draw(1, 5, seed=seed) for seed in range(1, 5)])
WINS = torch.tensor([0, 1, 0])


def seen_from_the_middle(degrees: float, length: float = 1.0) -> Tensor:
    angle = math.radians(degrees)
    return torch.tensor([[10 + length * math.cos(angle), 10 + length * math.sin(angle)]])


# three classes at the corners of an equilateral triangle round (10, 10), all at distance 1: the unit of distances is 1
CORNERS = [seen_from_the_middle(degrees) for degrees in (0, 120, -120)]


@pytest.mark.parametrize(
    ("degrees", "length", "squared"),
    [(0, 1.0, (0, 3, 3)), (0, 0.0, (1, 1, 1)), (0, 3.0, (4, 13, 13)), (180, 1.0, (4, 1, 1)), (120, 1.0, (3, 0, 3))],
)
def test_logits_are_the_squared_distances_from_the_corners_of_a_triangle(degrees, length, squared):
    logits = prototype_logits(seen_from_the_middle(degrees, length), torch.cat(CORNERS), temperature=0.5)
    assert logits.tolist()[0] == pytest.approx([-2 * s for s in squared], rel=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_class_of_a_regular_simplex_is_won_by_one_gap(classes):
    """All pairs of corners are equally far apart: ``2K/(K − 1)`` units, so the loss is ``log(1 + (K − 1)·exp(−8K/(K − 1)))``."""
    corners = 3 * torch.eye(classes) + 5
    gap = 2 * classes / (classes - 1) / 0.25
    expected = -gap * (1 - torch.eye(classes))
    torch.testing.assert_close(prototype_logits(corners, corners), expected, rtol=1e-4, atol=1e-3)
    loss = feature_verification_loss(corners[:1], corners, 0)
    assert float(loss) == pytest.approx(math.log1p((classes - 1) * math.exp(-gap)), rel=1e-2, abs=1e-6)
    wrong = feature_evasion_loss(corners[:1], corners, torch.tensor([1]))
    assert float(wrong) == pytest.approx(gap + float(loss), rel=1e-3)
    halfway = feature_verification_loss(corners.mean(0, keepdim=True), corners, 0)
    assert float(halfway) == pytest.approx(math.log(classes), rel=1e-3)


def test_a_class_beside_the_three_that_is_nearer_counts():
    """What the distance from the target alone does not tell: the same sample is lost to a class that is nearer."""
    corners = torch.eye(4)
    sample = corners[2:3] * 0.45 + corners[3:] * 0.55
    three, four = (feature_verification_loss(sample, corners[:k], 2) for k in (3, 4))
    assert float(three) < 0.1
    assert float(four) > math.log(2)


def test_terms_are_the_papers_choice_of_classes_written_as_the_sum_it_is():
    unit = sum(float(((c - CENTRES.mean(0)) ** 2).sum()) for c in CENTRES) / len(CENTRES)

    def surprise(sample: Tensor, position: int) -> float:
        scores = [math.exp(-float(((sample - c) ** 2).sum()) / unit / 0.25) for c in CENTRES]
        return -math.log(scores[position] / sum(scores))

    expected = sum(surprise(sample, 2) for sample in MIXED) / len(MIXED)
    assert float(feature_verification_loss(MIXED, CENTRES, 2)) == pytest.approx(expected, rel=1e-3)
    expected = sum(surprise(sample, win) for sample, win in zip(MIXED, WINS.tolist(), strict=True)) / len(MIXED)
    assert float(feature_evasion_loss(MIXED, CENTRES, WINS)) == pytest.approx(expected, rel=1e-3)


def test_each_class_counts_alike_in_the_middle():
    target, first, second = draw(6, 5, seed=1), draw(7, 5, seed=2), draw(8, 5, seed=3)
    torch.testing.assert_close(middle(target.repeat(10, 1), (first, second)), middle(target, (first, second)))


def test_nothing_depends_on_the_features_scale_or_offset():
    terms = [
        (
            prototype_logits(w, c),
            feature_verification_loss(w, c, 2),
            feature_evasion_loss(w, c, WINS),
            target_margin(w, c[2:3], (c[:1], c[1:2])),
        )
        for w, c in ((MIXED, CENTRES), (7 * MIXED + 3, 7 * CENTRES + 3))
    ]
    torch.testing.assert_close(terms[0], terms[1], atol=1e-3, rtol=1e-3)


def test_neither_moving_all_features_together_nor_growing_them_gains_anything():
    """The gradients of all samples sum to zero, and so do their products with the features; those of each group do not."""
    groups = [group.clone().requires_grad_() for group in (MIXED, CENTRES)]
    for loss in (feature_verification_loss(*groups, 2), feature_evasion_loss(*groups, WINS)):
        gradients = torch.autograd.grad(loss, groups)
        moved = torch.stack([gradient.sum(0) for gradient in gradients])
        grown = torch.stack(
            [(gradient * group.detach()).sum() for gradient, group in zip(gradients, groups, strict=True)]
        )
        for parts in (moved, grown):
            assert float(parts.sum(0).abs().max()) < 1e-3
            assert float(parts.abs().max()) > 1e-1


def test_gradients_are_finite_differences():
    groups = [group.double().requires_grad_() for group in (MIXED, CENTRES)]

    def both(w: Tensor, c: Tensor) -> Tensor:
        return feature_verification_loss(w, c, 2) + feature_evasion_loss(w, c, WINS)

    # the losses compute in single precision, and so must the differences
    gradients = torch.autograd.grad(both(*groups), groups)
    for position, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(position), dtype=torch.float64)
        up, down = (
            both(*[g.detach() + (sign * 3e-3 * step if i == position else 0) for i, g in enumerate(groups)])
            for sign in (1, -1)
        )
        assert float((up - down) / 6e-3) == pytest.approx(float((gradient * step).sum()), rel=2e-3, abs=3e-3)


@pytest.mark.parametrize("value", [1.0, 0.0])
@pytest.mark.parametrize("off", [0.0, 1e-4, 1.0])
def test_a_collapsed_encoder_gives_finite_terms_and_gradients(value, off):
    groups = [torch.full((4, 3), value).requires_grad_() for _ in range(2)]
    mixed, centres = groups
    loss = feature_verification_loss(mixed + off, centres, 2)
    assert float(loss.detach()) == pytest.approx(math.log(4), rel=1e-3)  # no class is nearer than another
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, groups))


def test_half_precision_features_are_compared_in_single_precision():
    mixed, centres = ((group * 100).half() for group in (MIXED, CENTRES))  # squares beyond half precision's range
    got = feature_verification_loss(mixed, centres, 2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, feature_verification_loss(MIXED, CENTRES, 2), rtol=1e-2, atol=1e-2)


def test_the_margin_is_positive_where_the_target_is_nearest():
    target, first, second = CORNERS
    margins = target_margin(torch.cat(CORNERS), target, (first, second))
    assert margins.tolist() == pytest.approx([1.5, -1.5, -1.5], abs=1e-4)
    halfway = target_margin(seen_from_the_middle(60), target, (first, second))
    assert halfway.tolist() == pytest.approx([0.0], abs=1e-4)
