import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadef_lightning.data.augmentation import Chain, RandomNoiseSquare, RandomShiftFlip, shift_flip


def one_by_one(x, dy, dx, mirror):
    """The same with a loop over pixels."""
    out = torch.zeros_like(x)
    _, _, height, width = x.shape
    for b in range(len(x)):
        moved = torch.zeros_like(x[b])
        for i in range(height):
            for j in range(width):
                source_i, source_j = i - int(dy[b]), j - int(dx[b])
                if 0 <= source_i < height and 0 <= source_j < width:
                    moved[:, i, j] = x[b, :, source_i, source_j]
        out[b] = moved.flip(-1) if mirror[b] else moved
    return out


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.uint8]),
)
def test_shift_flip_equals_a_loop(shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 255, shape, generator=generator).to(dtype)
    dy, dx = torch.randint(-7, 8, (2, shape[0]), generator=generator)
    mirror = torch.rand(shape[0], generator=generator) < 0.5
    result = shift_flip(x, dy, dx, mirror)
    assert result.dtype == dtype
    assert torch.equal(result, one_by_one(x, dy, dx, mirror))


def test_images_of_a_batch_move_differently_and_within_bounds():
    torch.manual_seed(0)
    x = torch.zeros(400, 1, 9, 9)
    x[:, :, 4, 4] = 1
    found = RandomShiftFlip(shift=2)(x).flatten(1).argmax(1)
    rows, cols = found // 9 - 4, found % 9 - 4
    assert set(rows.tolist()) == set(cols.tolist()) == {-2, -1, 0, 1, 2}
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) == 25


def test_about_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    x = torch.rand(1000, 3, 4, 4)
    result = RandomShiftFlip(shift=0, flip=True)(x)
    mirrored = (result == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(result[~mirrored], x[~mirrored])
    assert 420 < mirrored.sum() < 580  # five standard deviations


def test_it_follows_the_global_seed_and_rests_in_evaluation_mode():
    augmentation = RandomShiftFlip(3, flip=True)
    x = torch.rand(20, 1, 8, 8)
    torch.manual_seed(1)
    first = augmentation(x)
    torch.manual_seed(1)
    assert torch.equal(augmentation(x), first)
    assert not torch.equal(augmentation(x), first)
    assert augmentation.eval()(x) is x


def test_negative_shift_is_refused():
    with pytest.raises(ValueError, match="0 or more pixels, got -1"):
        RandomShiftFlip(-1)


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_noise_covers_one_square_of_every_image(size, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.linspace(-1, 1, 4 * 2 * 6 * 7).reshape(4, 2, 6, 7)
        changed = RandomNoiseSquare(size)(x) != x
    assert torch.equal(changed[:, 0], changed[:, 1])
    for image in changed[:, 0]:
        rows, cols = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        assert len(rows) == len(cols) == size
        assert image[rows[0] : rows[0] + size, cols[0] : cols[0] + size].all()
        assert image.sum() == size**2


def test_noise_stays_in_the_range_of_the_batch_and_out_of_evaluation():
    x = torch.rand(8, 1, 6, 6) * 3 - 1
    augmented = RandomNoiseSquare(6)(x)
    assert x.min() <= augmented.min()
    assert augmented.max() <= x.max()
    assert torch.equal(RandomNoiseSquare(3).eval()(x), x)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        RandomNoiseSquare(0)
    with pytest.raises(ValueError, match="larger than the images"):
        RandomNoiseSquare(7)(x)


def test_a_chain_runs_its_steps_in_order_and_switches_them_off_together():
    chain = Chain([RandomShiftFlip(1), RandomNoiseSquare(2)])
    x = torch.rand(4, 1, 6, 6)
    torch.manual_seed(0)
    expected = RandomNoiseSquare(2)(RandomShiftFlip(1)(x))
    torch.manual_seed(0)
    assert torch.equal(chain(x), expected)
    assert torch.equal(chain.eval()(x), x)
