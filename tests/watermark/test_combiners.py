"""Combining ways against loops over pixels in exact arithmetic, written from the paper's description and the docstrings."""

import copy
import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadef_lightning.watermark import (
    DEFAULT_COMBINERS,
    Band,
    Combiner,
    CropPaste,
    Diagonal,
    Donut,
    PixelBlend,
    Stripes,
)
from meadef_lightning.watermark.combiners import MaskCombiner

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(5, 21), st.integers(5, 21))
SIGNALS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(5, 40))
OWN_WAYS = [
    CropPaste(),
    CropPaste((0.1, 0.2), (0.3, 0.4), (0.6, 0.0), 90),
    PixelBlend(),
    PixelBlend(0.2),
    Stripes(),
    Band(),
    Diagonal(),
    Donut(),
]
WAYS = [*(spec.build() for spec in DEFAULT_COMBINERS), *OWN_WAYS]
SIGNAL_WAYS = [CropPaste(), CropPaste(rotation=180), PixelBlend(), Stripes(), Band(axis=-1)]


def numbered(*shape, dtype=torch.float32):
    """Two batches of which every value says where it comes from."""
    a = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64).reshape(shape)
    return a.to(dtype), (-a).to(dtype)


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


# ---- properties every way has


@pytest.mark.parametrize("combiner", WAYS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_inputs_are_left_alone(combiner, dtype):
    a, b = (x.to(dtype) for x in torch.randn(2, 3, 2, 11, 14))
    before = a.clone(), b.clone()
    combined = combiner(a, b)
    assert combined.dtype == dtype
    assert combined.shape == a.shape
    torch.testing.assert_close(combined.double(), combiner(a.double(), b.double()), atol=0.02, rtol=0.01)
    combined.fill_(0)  # the result is no view of an input either
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("combiner", SIGNAL_WAYS, ids=repr)
def test_signals_keep_their_dtype(combiner):
    a, b = torch.randn(2, 3, 2, 25).bfloat16()
    assert combiner(a, b).dtype == torch.bfloat16
    assert combiner(a, b).shape == a.shape


@pytest.mark.parametrize("index", range(len(DEFAULT_COMBINERS)))
def test_both_sources_show_in_every_default_way(index):
    combiner = DEFAULT_COMBINERS[index].build()
    for height in (8, 9, 15, 28, 33, 64):
        for width in (8, 11, 28, 32):
            zeros, ones = torch.zeros(1, 1, height, width), torch.ones(1, 1, height, width)
            share = float(combiner(zeros, ones).mean())
            assert 0.3 < share < 0.7, (height, width, share)


@pytest.mark.parametrize("size", range(8, 33))
def test_default_ways_differ_from_one_another(size):
    a, b = numbered(1, 1, size, size)
    combined = [spec.build()(a, b) for spec in DEFAULT_COMBINERS]
    for i, one in enumerate(combined):
        for other in combined[:i]:
            # in so many pixels that a model can tell them apart
            assert (one != other).float().mean() > 0.15


@pytest.mark.parametrize("combiner", WAYS, ids=repr)
def test_pairs_do_not_mix_and_nothing_is_random(combiner):
    a, b = torch.randn(2, 5, 3, 12, 10)
    state = torch.get_rng_state()
    combined = combiner(a, b, torch.Generator().manual_seed(1))
    assert torch.equal(combined, combiner(a, b, torch.Generator().manual_seed(2)))
    assert torch.equal(combined, copy.deepcopy(combiner)(a, b))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(combined, torch.cat([combiner(a[i : i + 1], b[i : i + 1]) for i in range(5)]))
    assert torch.equal(combiner(a[:0], b[:0]), a[:0])
    strided = combiner(a.to(memory_format=torch.channels_last), b.expand(5, 3, 12, 10))
    assert torch.equal(combined, strided)


@pytest.mark.parametrize("combiner", WAYS, ids=repr)
def test_gradients_reach_both_sources_and_cover_the_sample(combiner):
    a, b = torch.randn(2, 2, 1, 12, 10).double()
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(combiner, (a, b))


def test_a_mask_cached_in_inference_mode_serves_training():
    for combiner in (Stripes(), Band(), Diagonal(), Donut()):
        x = torch.ones(1, 1, 8, 8)
        with torch.inference_mode():
            combiner(x, x)
        y = x.clone().requires_grad_()
        combiner(y, y).sum().backward()
        assert torch.equal(y.grad, x)


def test_masks_do_not_depend_on_the_default_device():
    for combiner in (Stripes(), Band(), Diagonal(), Donut()):
        a, b = numbered(1, 1, 9, 8)
        expected = copy.deepcopy(combiner)(a, b)
        with torch.device("meta"):
            assert torch.equal(combiner(a, b), expected)


def test_one_combiner_takes_many_sizes_in_turn():
    combiner = Donut()
    for size in ((8, 8), (9, 16), (8, 8), (16, 9)):
        a, b = numbered(1, 1, *size)
        assert torch.equal(combiner(a, b), Donut()(a, b))


@pytest.mark.parametrize("combiner", WAYS, ids=repr)
def test_combiners_hold_no_state(combiner):
    combiner(*numbered(1, 1, 8, 8))
    assert combiner.state_dict() == {}
    buffer = io.BytesIO()
    torch.save(combiner, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(*numbered(1, 1, 8, 8)), combiner(*numbered(1, 1, 8, 8)))


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropPaste((0, 1.5)), r"position=1\.5 is not a fraction"),
        (lambda: CropPaste((0, 0.75)), r"size=\(1\.0, 0\.5\) at position=\(0, 0\.75\) leaves the image"),
        (lambda: CropPaste((0, 0), (0.5, 0)), "size=0 is not a fraction"),
        (lambda: CropPaste((0, 0), (0.5, 0.5), (0, 0.9)), r"at crop_position=\(0, 0\.9\) leaves"),
        (lambda: CropPaste((0, float("nan"))), "position=nan is not a fraction"),
        (lambda: CropPaste((0,)), r"position=\(0,\) must be two fractions"),
        (lambda: CropPaste(size=(0.5, 0.5, 0.5)), r"size=.* must be two fractions"),
        (lambda: CropPaste(rotation=45), "rotation=45 is not one of 0, 90, 180, 270"),
        (lambda: PixelBlend(0.0), r"alpha=0\.0 must lie strictly"),
        (lambda: PixelBlend(1), "alpha=1 must lie strictly"),
        (lambda: PixelBlend(float("nan")), "alpha=nan must lie strictly"),
        (lambda: Stripes((0, 0)), r"pattern=\[0, 0\] must hold 0 .* and 1"),
        (lambda: Stripes((0, 1, 2)), r"pattern=\[0, 1, 2\]"),
        (lambda: Stripes(axis=1), "axis=1 must be -1"),
        (lambda: Band(0.7, 0.4), r"width=0\.4 at start=0\.7 leaves"),
        (lambda: Band(0, 1), "covers it entirely"),
        (lambda: Band(-0.1, 0.4), r"start=-0\.1 is not a fraction"),
        (lambda: Band(axis=0), "axis=0 must be -1"),
        (lambda: Donut(0.5, 0.5), r"inner=0\.5 and outer=0\.5"),
        (lambda: Donut(0.5, 1.1), r"outer=1\.1"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("combiner", WAYS, ids=repr)
def test_unlike_batches_are_refused(combiner):
    x = torch.zeros(2, 1, 8, 8)
    for other in (x[:1], x.double(), x[:, :, :7], x.to("meta")):
        with pytest.raises(ValueError, match=f"{type(combiner).__name__} combines two batches of the same shape"):
            combiner(x, other)
    with pytest.raises(ValueError, match=r"needs samples with spatial dimensions.*\(4, 7\)"):
        combiner(torch.zeros(4, 7), torch.zeros(4, 7))


@pytest.mark.parametrize(
    ("combiner", "shape", "message"),
    [
        (CropPaste(), (4, 5, 6), "CropPaste.*cannot combine samples of shape"),
        (CropPaste(rotation=90), (9,), "rotation 0 or 180"),
        (Stripes(axis=-2), (9,), r"Stripes\(axis=-2\) cannot combine samples with 1 spatial"),
        (Stripes(), (4, 5, 6), "with 3 spatial"),
        (Stripes(), (8, 4), "4 positions cannot be cut into 5 stripes"),
        (Band(), (9,), r"Band\(axis=-2\) cannot combine"),
        (Diagonal(), (9,), "Diagonal combines images"),
        (Donut(), (4, 5, 6), "Donut combines images with two spatial dimensions, got 3"),
        (CropPaste((0.5, 0.5), (0.5, 0.25), None, 90), (4, 40), "does not fit"),
    ],
)
def test_samples_of_the_wrong_form_are_refused(combiner, shape, message):
    if combiner.__class__ is CropPaste and combiner.rotation == 90 and len(shape) == 2:
        combiner(torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 40, 40))  # fits here, and not below
    with pytest.raises(ValueError, match=message):
        combiner(torch.zeros(1, 1, *shape), torch.zeros(1, 1, *shape))


@pytest.mark.parametrize(
    ("combiner", "size"),
    [
        (CropPaste((0, 0), (1, 1)), (8, 8)),
        (CropPaste((0.5, 0), (0.5, 1)), (8,)),  # of a signal, only the second entries count
        (CropPaste(), (5, 1)),
        (Band(0.0, 0.05), (8, 8)),
        (Band(0.01, 0.98), (8, 8)),
        (Donut(0.45, 0.55), (2, 2)),
        (Donut(), (2, 2)),
        (Diagonal(), (1, 1)),
    ],
)
def test_a_way_that_hides_a_source_is_refused(combiner, size):
    x = torch.zeros(2, 1, *size)
    with pytest.raises(
        ValueError, match=r"shows only one of its two sources on samples of size \(.*Change its parameters"
    ):
        combiner(x, x)


def test_the_bases_say_what_is_to_be_implemented():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match="Combiner must implement combine"):
        Combiner()(x, x)
    with pytest.raises(TypeError, match="MaskCombiner must implement mask"):
        MaskCombiner()(x, x)
