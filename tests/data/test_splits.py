import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadef_lightning.data.splits import SHARES, split_indices, split_sizes, stratified_order

SIZES = st.dictionaries(st.sampled_from(sorted(SHARES)), st.none() | st.integers(0, 40), min_size=1)


def fits(n, sizes):
    given_sizes = [size for size in sizes.values() if size is not None]
    return n - sum(given_sizes) >= len(sizes) - len(given_sizes)


@settings(deadline=None)
@given(n=st.integers(1, 200), sizes=SIZES, seed=st.integers(0, 2**40), classes=st.none() | st.integers(1, 5))
def test_splits_are_disjoint_and_of_the_wanted_size(n, sizes, seed, classes):
    labels = None if classes is None else torch.arange(n) % classes
    if not fits(n, sizes):
        with pytest.raises(ValueError, match="samples"):
            split_indices(n, sizes, seed, labels)
        return
    splits = split_indices(n, sizes, seed, labels)
    assert splits.keys() == sizes.keys()
    everything = torch.cat(list(splits.values())).tolist()
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(range(n))
    for name, size in sizes.items():
        assert len(splits[name]) == size if size is not None else len(splits[name]) >= 1
    if None in sizes.values():
        assert len(everything) == n


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 2**40), data=st.data())
def test_every_run_of_the_stratified_order_is_balanced(counts, seed, data):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = stratified_order(labels, torch.Generator().manual_seed(seed))
    n = len(labels)
    assert sorted(order.tolist()) == list(range(n))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    found = torch.bincount(labels[order[start:stop]], minlength=len(counts))
    # One sample a class, and the run's part of [0, 1) differs from its share of positions by as much for all together.
    for count, total in zip(found.tolist(), counts, strict=True):
        assert abs(count - (stop - start) * total / max(n, 1)) <= 1 + len(counts) * total / max(n, 1)


@settings(deadline=None)
@given(classes=st.integers(1, 8), each=st.integers(1, 9), seed=st.integers(0, 2**40), data=st.data())
def test_equally_frequent_classes_are_balanced_exactly(classes, each, seed, data):
    labels = torch.arange(classes * each) % classes
    order = stratified_order(labels, torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, each))
    start = data.draw(st.integers(0, (each - k) * classes))
    assert torch.bincount(labels[order[start : start + k * classes]]).tolist() == [k] * classes


def test_members_of_a_class_are_drawn_at_random():
    labels = torch.zeros(1000, dtype=torch.int64)
    labels[:10] = 1
    order = stratified_order(labels, torch.Generator().manual_seed(0))
    assert order[labels[order] == 0][:100].float().mean().item() == pytest.approx(505, abs=5 * 286 / 10)
    assert order[labels[order] == 1].tolist() != list(range(10))


def test_same_seed_same_splits_and_other_seed_others():
    sizes = {"victim": 40, "attacker": 30, "test": 20}
    first, again, other = (split_indices(100, sizes, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in sizes)
    assert not torch.equal(first["victim"], other["victim"])


@pytest.mark.parametrize("labels", [None, torch.arange(100) % 3])
def test_number_of_queries_changes_no_other_split_and_grows_by_adding(labels):
    sizes = {"victim": 40, "verification": 5, "validation": 5}
    few = split_indices(100, {**sizes, "attacker": 10}, 7, labels)
    many = split_indices(100, {**sizes, "attacker": 50}, 7, labels)
    assert all(torch.equal(few[name], many[name]) for name in sizes)
    assert torch.equal(few["attacker"], many["attacker"][:10])


def test_open_sizes_are_shares_of_what_remains():
    everything = dict.fromkeys(("victim", "attacker", "verification", "validation"))
    assert split_sizes(60_000, everything) == {
        "validation": 3750,
        "verification": 3750,
        "victim": 30_000,
        "attacker": 22_500,
    }
    rest = split_sizes(60_000, {**everything, "victim": 12_000})
    assert rest == {"validation": 6000, "verification": 6000, "victim": 12_000, "attacker": 36_000}
    assert split_sizes(1000, {**everything, "test": None})["test"] == 200


@pytest.mark.parametrize(
    ("n", "sizes", "message"),
    [
        (10, {"victim": 8, "attacker": 5}, r"ask for 13 samples \(victim=8, attacker=5\) but there are 10"),
        (10, {"victim": 10, "attacker": None}, r"Only 0 of 10 samples remain for the open split\(s\) \['attacker'\]"),
        (10, {"victim": -1}, r"0 or more, got victim=-1"),
        (0, {"victim": None}, "no samples to split"),
        (10, {"train": 3}, r"Unknown split\(s\) \['train'\]"),
    ],
)
def test_impossible_sizes_are_named(n, sizes, message):
    with pytest.raises(ValueError, match=message):
        split_indices(n, sizes, 0)


def test_labels_must_match():
    with pytest.raises(ValueError, match=r"shape \(10,\), one for each sample, got \(9,\)"):
        split_indices(10, {"victim": 5}, 0, torch.zeros(9, dtype=torch.int64))
