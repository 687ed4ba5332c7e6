"""Combining ways against loops over pixels in exact arithmetic, written from the paper's description and the docstrings."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from combiner_ways import numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from meadef_lightning.watermark import (
    Band,
    CropPaste,
    Diagonal,
    Donut,
    PixelBlend,
    Stripes,
)

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(5, 21), st.integers(5, 21))
SIGNALS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(5, 40))


def masked(a, b, shows_b):
    """Takes each position from b where ``shows_b(*position)``, one after the other."""
    out = a.numpy().copy()
    for position in np.ndindex(*a.shape[2:]):
        if shows_b(*position):
            out[(slice(None), slice(None), *position)] = b.numpy()[(slice(None), slice(None), *position)]
    return out


def middle(i, n):
    """Centre of the i-th of n positions in (0, 1)."""
    return Fraction(2 * i + 1, 2 * n)


# ---- against loops


@settings(deadline=None, max_examples=40)
@given(SIZES, st.booleans())
def test_diagonal(shape, anti):
    a, b = numbered(*shape)
    _, _, height, width = shape

    def shows_b(i, j):
        y, x = middle(i, height), middle(j, width)
        return x >= 1 - y if anti else x >= y

    np.testing.assert_array_equal(Diagonal(anti)(a, b), masked(a, b, shows_b))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from([(0.3, 0.85), (0.0, 0.6), (0.5, 1.0), (0.41, 0.93)]))
def test_donut(shape, radii):
    a, b = numbered(*shape)
    _, _, height, width = shape
    squares = [Fraction(str(radius)) ** 2 for radius in radii]

    def squared(i, j):
        return (2 * middle(i, height) - 1) ** 2 + (2 * middle(j, width) - 1) ** 2

    on_an_edge = torch.tensor([[squared(i, j) in squares for j in range(width)] for i in range(height)])
    expected = torch.from_numpy(masked(a, b, lambda i, j: squares[0] <= squared(i, j) < squares[1]))
    combined = Donut(*radii)(a, b)
    assert torch.equal(combined.where(~on_an_edge, 0), expected.where(~on_an_edge, 0))
    # edges may fall on either side in floating point, but on the same in all four quarters
    shows_b = combined < 0
    assert torch.equal(shows_b, shows_b.flip(-1))
    assert torch.equal(shows_b, shows_b.flip(-2))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from([(0.3, 0.4), (0.0, 0.5), (0.55, 0.45), (0.123, 0.456)]), st.sampled_from([-1, -2]))
def test_band(shape, band, axis):
    a, b = numbered(*shape)
    start, end = Fraction(str(band[0])), Fraction(str(band[0])) + Fraction(str(band[1]))

    def shows_b(*position):
        return start <= middle(position[axis], shape[axis]) < end

    np.testing.assert_array_equal(Band(*band, axis)(a, b), masked(a, b, shows_b))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.lists(st.integers(0, 1), min_size=2, max_size=5).filter(lambda p: len({*p}) == 2), st.booleans())
def test_stripes(shape, pattern, rows):
    axis = -2 if rows else -1
    a, b = numbered(*shape)
    edges = [Fraction(k * shape[axis], len(pattern)) for k in range(len(pattern) + 1)]

    def shows_b(*position):
        return next(
            p for p, low, high in zip(pattern, edges[:-1], edges[1:], strict=True) if low <= position[axis] < high
        )

    np.testing.assert_array_equal(Stripes(pattern, axis)(a, b), masked(a, b, shows_b))


@settings(deadline=None, max_examples=40)
@given(SIGNALS)
def test_ways_for_signals(shape):
    a, b = numbered(*shape)
    length = shape[-1]
    half = round(length / 2)
    np.testing.assert_array_equal(CropPaste()(a, b), masked(a, b, lambda i: i >= half))
    turned = b.numpy().copy()
    turned[..., half:] = turned[..., half:][..., ::-1]
    np.testing.assert_array_equal(
        CropPaste(rotation=180)(a, b), masked(a, torch.from_numpy(turned), lambda i: i >= half)
    )
    np.testing.assert_array_equal(Stripes((1, 0, 1))(a, b), masked(a, b, lambda i: 3 * i // length != 1))
    inside = lambda i: Fraction(3, 10) <= middle(i, length) < Fraction(7, 10)  # noqa: E731
    np.testing.assert_array_equal(Band(axis=-1)(a, b), masked(a, b, inside))


@settings(deadline=None, max_examples=30)
@given(SIZES | SIGNALS | st.just((2, 1, 3, 4, 5)), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_pixel_blend(shape, alpha, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, *shape)).astype(np.float32)
    expected = np.empty_like(a)
    for position in np.ndindex(*shape):
        expected[position] = alpha * float(a[position]) + (1 - alpha) * float(b[position])
    np.testing.assert_allclose(PixelBlend(alpha)(torch.from_numpy(a), torch.from_numpy(b)), expected, atol=1e-6)


FRACTIONS = st.integers(0, 8).map(lambda n: n / 8)


@st.composite
def rectangles(draw):
    size = (draw(FRACTIONS.filter(bool)), draw(FRACTIONS.filter(bool)))
    position = tuple(draw(FRACTIONS.filter(lambda p, extent=extent: p + extent <= 1)) for extent in size)
    crop = tuple(draw(FRACTIONS.filter(lambda p, extent=extent: p + extent <= 1)) for extent in size)
    return position, size, draw(st.none() | st.just(crop))


def first_and_count(start, extent, length):
    """Pixels of an interval given in fractions: edges to the nearest pixel (ties to even), at least one pixel."""
    low = min(round(Fraction(start) * length), length - 1)
    high = min(round((Fraction(start) + Fraction(extent)) * length), length)
    return low, max(high - low, 1)


def pasted(a, b, position, size, crop, rotation):
    """CropPaste pixel by pixel; None where the rectangle cannot be turned inside the image."""
    height, width = a.shape[2:]
    top, rows = first_and_count(position[0], size[0], height)
    left, columns = first_and_count(position[1], size[1], width)
    cut_rows, cut_columns = (columns, rows) if rotation in (90, 270) else (rows, columns)
    if cut_rows > height or cut_columns > width or (rows, columns) == (height, width):
        return None
    crop = position if crop is None else crop
    cut_top = min(round(Fraction(crop[0]) * height), height - cut_rows)
    cut_left = min(round(Fraction(crop[1]) * width), width - cut_columns)
    out = a.numpy().copy()
    for i in range(rows):
        for j in range(columns):
            # where the pixel (i, j) of the pasted rectangle was before the counter-clockwise turn
            u, v = {
                0: (i, j),
                90: (j, cut_columns - 1 - i),
                180: (cut_rows - 1 - i, cut_columns - 1 - j),
                270: (cut_rows - 1 - j, i),
            }[rotation]
            out[:, :, top + i, left + j] = b.numpy()[:, :, cut_top + u, cut_left + v]
    return out


@settings(deadline=None, max_examples=60)
@given(SIZES, rectangles(), st.sampled_from([0, 90, 180, 270]))
def test_crop_paste(shape, rectangle, rotation):
    a, b = numbered(*shape)
    expected = pasted(a, b, *rectangle, rotation)
    combiner = CropPaste(*rectangle, rotation)
    if expected is None:
        with pytest.raises(ValueError, match=r"does not fit into|only one of its two sources"):
            combiner(a, b)
    else:
        np.testing.assert_array_equal(combiner(a, b), expected)


def test_crop_paste_by_eye():
    a, b = torch.zeros(1, 1, 4, 4), torch.arange(16.0).reshape(1, 1, 4, 4)
    # the left upper quarter (0 1 / 4 5), turned counter-clockwise, into the right lower corner
    combined = CropPaste((0.5, 0.5), (0.5, 0.5), (0.0, 0.0), 90)(a, b)[0, 0]
    assert combined.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 5], [0, 0, 0, 4]]
    halves = CropPaste()(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4))[0, 0]
    assert halves.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_rectangle_has_at_least_one_pixel():
    zeros, ones = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    for place in ((0.0, 0.0), (0.4, 0.7), (0.99, 0.99)):
        assert CropPaste(place, (0.01, 0.01))(zeros, ones).sum() == 1


def test_the_papers_stripes_by_eye():
    combined = Stripes()(torch.zeros(1, 1, 1, 10), torch.ones(1, 1, 1, 10))
    assert combined.flatten().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]


def test_diagonals_by_eye():
    a, b = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    assert Diagonal()(a, b)[0, 0].tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert Diagonal(anti=True)(a, b)[0, 0].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
