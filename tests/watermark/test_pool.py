"""The ring buffers against one deque per class, filled sample by sample."""

import io
from collections import Counter, deque

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from meadef_lightning.watermark import SourcePool

BATCHES = st.lists(st.lists(st.integers(0, 4), max_size=14), max_size=8)  # labels; often more of a class than slots


def numbered(batches):
    """Yields labelled batches in which sample number n of the stream is an image full of n."""
    n = 0
    for labels in batches:
        y = torch.tensor(labels, dtype=torch.int64)
        yield torch.arange(n, n + len(labels)).float()[:, None, None, None].expand(-1, 1, 2, 2), y
        n += len(labels)


def naive(batches, classes, capacity):
    rings = {label: deque(maxlen=capacity) for label in classes}
    for x, y in numbered(batches):
        for sample, label in zip(x, y.tolist(), strict=True):
            if label in rings:
                rings[label].append(int(sample[0, 0, 0]))
    return [sorted(rings[label]) for label in classes]


def filled(batches, classes, capacity):
    pool = SourcePool(classes, capacity)
    for x, y in numbered(batches):
        pool.update(x, y)
    return pool


def content(pool):
    return [sorted(samples[:, 0, 0, 0].int().tolist()) for samples in pool.take(pool.capacity)]


@settings(deadline=None, max_examples=150)
@given(BATCHES, st.permutations(range(5)), st.integers(1, 3), st.integers(1, 6))
def test_the_pool_keeps_what_a_deque_per_class_keeps(batches, order, count, capacity):
    classes = order[:count]
    pool, expected = filled(batches, classes, capacity), naive(batches, classes, capacity)
    assert content(pool) == (expected if batches else [])
    assert pool.ready == all(expected)
    for kept, some in zip(expected, pool.take(2), strict=False):
        assert len(some) == min(len(kept), 2)


class WrittenSlots(TorchDispatchMode):
    """Notes the slots of every indexed write."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_put_.default:
            self.writes.append(args[1][0].tolist())
        return func(*args, **(kwargs or {}))


@settings(deadline=None, max_examples=40)
@given(BATCHES, st.integers(1, 6))
def test_no_slot_that_is_read_is_written_twice_at_once(batches, capacity):
    # on a GPU, which of two writes to one slot comes last is undefined
    with WrittenSlots() as mode:
        filled(batches, (1, 3), capacity)
    assert len(mode.writes) == len(batches)
    for slots in mode.writes:
        read = [slot for slot in slots if slot < 2 * capacity]
        assert len(read) == len(set(read))


@settings(deadline=None, max_examples=60)
@given(BATCHES, st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_draws_are_stored_samples_of_the_right_class(batches, capacity, count, seed):
    pool, expected = filled(batches, (3, 1), capacity), naive(batches, (3, 1), capacity)
    if not all(expected):
        with pytest.raises(RuntimeError, match="still empty for one of its classes"):
            pool.draw(count, torch.Generator())
        return
    state = torch.get_rng_state()
    drawn = pool.draw(count, torch.Generator().manual_seed(seed))
    again = pool.draw(count, torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    for samples, same, kept in zip(drawn, again, expected, strict=True):
        assert samples.shape == (count, 1, 2, 2)
        assert torch.equal(samples, same)
        assert set(samples.flatten().int().tolist()) <= set(kept)


@pytest.mark.parametrize(("seen", "capacity"), [(5, 8), (8, 8), (13, 8)])
def test_draws_are_uniform_over_what_is_stored(seen, capacity):
    pool = filled([[0, 1] * seen], (0, 1), capacity)
    generator = torch.Generator().manual_seed(0)
    drawn = pool.draw(8000, generator)
    for samples, kept in zip(drawn, content(pool), strict=True):
        counts = Counter(samples[:, 0, 0, 0].int().tolist())
        assert set(counts) == set(kept)
        assert scipy.stats.chisquare([counts[n] for n in kept]).pvalue > 1e-3
    # the classes are drawn independently of one another
    pairs = Counter(zip(*(samples[:, 0, 0, 0].int().tolist() for samples in drawn), strict=True))
    assert len(pairs) == len(content(pool)[0]) * len(content(pool)[1])


@settings(deadline=None, max_examples=40)
@given(BATCHES, BATCHES, st.integers(1, 5))
def test_a_restored_pool_goes_on_bit_for_bit(before, after, capacity):
    pool = filled(before, (0, 2), capacity)
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    restored = SourcePool((0, 2), capacity)
    restored.load_state_dict(torch.load(file, weights_only=True))
    one, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    assert restored.ready == pool.ready
    for x, y in numbered([[], *after]):
        for each in (pool, restored):
            each.update(x - 1000, y)
        assert restored.ready == pool.ready
        if pool.ready:
            for mine, theirs in zip(pool.draw(9, one), restored.draw(9, other), strict=True):
                assert torch.equal(mine, theirs)


def test_a_state_is_a_copy():
    pool = filled([[0, 1]], (0, 1), 2)
    state = pool.state_dict()
    restored = SourcePool((0, 1), 2)
    restored.load_state_dict(state)
    for each in (pool, restored):
        each.update(torch.full((4, 1, 2, 2), -1.0), torch.tensor([0, 1, 0, 1]))
    assert state["samples"].min() == 0
    assert state["written"].tolist() == [1, 1]


def test_states_of_another_size_are_refused():
    state = filled([[0, 1]], (0, 1), 4).state_dict()
    with pytest.raises(ValueError, match="does not have 5 slots for each of 2 classes; resume with the buffer_size"):
        SourcePool((0, 1), 5).load_state_dict(state)
    unused = SourcePool((0, 1), 4)
    assert unused.state_dict() == {}
    unused.load_state_dict({})
    assert not unused.ready


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    pool = SourcePool((0, 1), 300)  # more slots than uint8 can count
    for x, y in numbered([[0, 1, 2]] * 3):
        pool.update(x, y.to(dtype))
    assert content(pool) == [[0, 3, 6], [1, 4, 7]]


def test_samples_keep_their_precision_and_no_graph():
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    pool = SourcePool((0, 1), 4)
    pool.update(x * 1, torch.tensor([0, 1, 0, 1, 2, 2]))
    drawn = pool.draw(3, torch.Generator())
    assert all(samples.dtype == torch.float64 and not samples.requires_grad for samples in drawn)
    first = pool.take(4)[0]
    assert torch.equal(first, x.detach()[[0, 2]])
    with torch.no_grad():
        x.fill_(0)  # the loader may use its memory again
    assert pool.take(4)[0].abs().min() > 0


def test_another_size_of_samples_starts_anew():
    pool = filled([[0, 1, 0]], (0, 1), 4)
    assert pool.ready
    pool.update(torch.ones(2, 1, 3, 3), torch.tensor([0, 2]))
    assert not pool.ready
    pool.update(torch.ones(1, 1, 3, 3), torch.tensor([1]))
    assert pool.ready
    assert [samples.shape for samples in pool.take(4)] == [(1, 1, 3, 3)] * 2


def test_the_pool_follows_a_module_to_its_device_and_type():
    pool = filled([[0, 1]], (0, 1), 4)
    assert pool.ready
    pool.to(torch.device("cpu"), torch.float16)
    assert pool.take(1)[0].dtype == torch.float16
    pool.to(torch.device("meta"), torch.float32)
    assert all(samples.device.type == "meta" for samples in pool.draw(2, torch.Generator()))
    SourcePool((0, 1)).to(torch.device("meta"), torch.float32)  # an unused one has nothing to move


# ---- the owner's own samples


def test_given_samples_are_used_and_never_replaced():
    own = {4: torch.arange(3.0)[:, None, None], 2: torch.arange(10.0, 15.0)[:, None, None]}
    pool = SourcePool.from_samples(own)
    assert pool.classes == (4, 2)
    assert pool.ready
    assert pool.fixed
    for samples, label in zip(pool.take(100), pool.classes, strict=True):
        assert torch.equal(samples, own[label])
    before = pool.draw(50, torch.Generator().manual_seed(0))
    assert set(before[0].flatten().tolist()) == {0, 1, 2}
    assert set(before[1].flatten().tolist()) == {10, 11, 12, 13, 14}
    pool.update(torch.full((9, 1, 1), -1.0), torch.full((9,), 4))
    assert pool.state_dict() == {}
    pool.load_state_dict(filled([[0, 1]], (0, 1), 2).state_dict())
    for mine, theirs in zip(pool.draw(50, torch.Generator().manual_seed(0)), before, strict=True):
        assert torch.equal(mine, theirs)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="at least one slot per class, got capacity=0"):
        SourcePool((0, 1), 0)
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="has no samples; give at least one each"):
        SourcePool.from_samples({0: x, 1: x[:0]})
    with pytest.raises(
        ValueError, match=r"share one shape and dtype, got \[\(\(2, 1, 4, 4\), torch\.float32\), .*float64"
    ):
        SourcePool.from_samples({0: x, 1: x.double()})
    with pytest.raises(ValueError, match="share one shape"):
        SourcePool.from_samples({0: x, 1: x[..., :3]})
    with pytest.raises(ValueError, match="share one shape"):
        SourcePool.from_samples({})
    with pytest.raises(RuntimeError, match="check `ready` before drawing"):
        SourcePool((0, 1)).draw(1, torch.Generator())


def test_the_classes_asked_for_get_the_same_draw():
    pool = SourcePool.from_samples({label: torch.randn(9, 1, 2, 2) + 10 * label for label in (4, 2, 7)})
    every = dict(zip(pool.classes, pool.draw(5, torch.Generator().manual_seed(1)), strict=True))
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    seven, four = pool.draw(5, one, (7, 4))
    assert torch.equal(seven, every[7])
    assert torch.equal(four, every[4])
    pool.draw(5, other)
    assert torch.equal(one.get_state(), other.get_state())
