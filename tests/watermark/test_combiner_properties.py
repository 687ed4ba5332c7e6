"""What every combining way has: its samples' dtype, no mixing of pairs, no state, no randomness, and clear errors."""

import copy
import io

import pytest
import torch
from combiner_ways import SIGNAL_WAYS, WAYS, numbered

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
        (Stripes(axis=-2), (9,), r"Stripes\(axis=-2\) cannot combine samples with 1 spatial.*WatermarkKey.draw"),
        (Stripes(), (4, 5, 6), "with 3 spatial"),
        (Stripes(), (8, 4), "4 positions cannot be cut into 5 stripes"),
        (Band(), (9,), r"Band\(axis=-2\) cannot combine"),
        (Diagonal(), (9,), "Diagonal combines images with two.*WatermarkKey.draw.*fit signals"),
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
        ValueError,
        match=r"shows only one of its two sources on samples of size \(.*Change its parameters.*WatermarkKey\.draw",
    ):
        combiner(x, x)


def test_the_bases_say_what_is_to_be_implemented():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match="Combiner must implement combine"):
        Combiner()(x, x)
    with pytest.raises(TypeError, match="MaskCombiner must implement mask"):
        MaskCombiner()(x, x)
