"""What a black box sees: one order that tells nothing, batches of one size, and the answers of the plain order."""

import dataclasses

import pytest
import scipy.stats
import torch
from torch import nn
from verification_fakes import KEY, FakeData, Thief, key_at

from meadef_lightning.verification import VerificationDataModule, verify
from meadef_lightning.verification.camouflage import CamouflagedDataModule, Interleaved, uniform_batches

QUICK = {"samples": 60, "decoy_samples": 4, "batch_size": 300}
OTHER_SALT = dataclasses.replace(KEY, salt="0123456789abcdef" * 2)


class Scattered(nn.Module):
    """Answers by the last bits of each image: one sample out of place, and the answers differ."""

    def forward(self, x):
        return (x.double().flatten(1).sum(1) * 1e5).long() % 7


class Box:
    """A black box that writes down what it sees."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def query(self, x):
        self.batches.append([row.numpy().tobytes() for row in x])
        return self.model(x)


def seen(key, model=None, **options):
    box = Box(model or Scattered())
    return box.batches, verify(box, key, FakeData(), accelerator="cpu", **{**QUICK, **options})


def ready(kind, key=KEY, **options):
    module = kind(key, FakeData(), **{**QUICK, **options})
    module.setup("predict")
    return module


def rows_by_kind(key, **options):
    loaders = ready(VerificationDataModule, key, **options).predict_dataloader()
    names = VerificationDataModule.loaders
    return {
        name: [row.numpy().tobytes() for x, _ in loader for row in x]
        for name, loader in zip(names, loaders, strict=True)
    }


@pytest.mark.parametrize(
    "options", [{}, {"samples": 3}, {"decoys": 20}, {"filler": 0.05}, {"batch_size": 7}, {"batch_size": 10_000}]
)
def test_the_answers_are_those_of_the_plain_order(options):
    plain = {name: value for name, value in options.items() if name != "filler"}
    expected_verdict, expected = verify(Scattered(), KEY, FakeData(), accelerator="cpu", **{**QUICK, **plain})
    _, (verdict, responses) = seen(KEY, **options)
    assert verdict == expected_verdict
    for name in ("trigger", "control", "cells", "counts", "natural", "natural_labels"):
        assert torch.equal(getattr(responses, name), getattr(expected, name)), name


def test_a_thief_behind_a_black_box_is_found():
    _, (verdict, _) = seen(KEY, Thief(KEY))
    assert verdict.verdict == "supported"
    assert verdict.wsr == 1


def test_every_batch_has_one_size_and_holds_every_kind():
    batches, _ = seen(KEY)
    kinds = rows_by_kind(KEY)
    sources = {row.numpy().tobytes() for row in FakeData().tensors("verification")[0]}
    only = {
        **{name: set(rows) for name, rows in kinds.items() if name != "decoy"},
        "decoy": set(kinds["decoy"]) - set(kinds["trigger"]) - set(kinds["control"]),
    }
    assert len({len(batch) for batch in batches}) == 1
    assert len(batches) == 6
    for batch in batches:
        for name, rows in only.items():
            assert rows & set(batch), name
    asked = [row for batch in batches for row in batch]
    assert set(asked) == set().union(*kinds.values()) | (sources & set(asked))
    # what is asked in plain order twice, as trigger or control and as decoy, is asked once
    padding = len(sources & set(asked))
    assert padding < len(batches)
    assert len(asked) == sum(map(len, kinds.values())) - 2 * QUICK["decoy_samples"] + padding
    assert all(asked.count(row) == 1 for row in kinds["trigger"])


def test_with_as_many_triggers_as_decoys_the_samples_asked_do_not_depend_on_the_key():
    space = ready(VerificationDataModule).table.space
    seen_by_key = [
        sorted(row for batch in seen(key_at(space, index), samples=4)[0] for row in batch) for index in (3, 1000)
    ]
    assert seen_by_key[0] == seen_by_key[1]
    more = [sorted(row for batch in seen(key_at(space, index))[0] for row in batch) for index in (3, 1000)]
    assert more[0] != more[1]


def order(key, **options):
    (loader,) = ready(CamouflagedDataModule, key, **options).predict_dataloader()
    return loader.dataset.order


def test_the_order_depends_on_salt_and_seed_only():
    first = order(KEY)
    other_classes = key_at(ready(VerificationDataModule).table.space, 77, salt=KEY.salt)
    assert torch.equal(first, order(KEY))
    assert torch.equal(first, order(other_classes))
    for other in (order(OTHER_SALT), order(KEY, seed=1)):
        assert len(first) == len(other)
        # each knows nothing of the other: over positions, no rank correlation beyond chance (|rho| < 4 / sqrt(n))
        assert abs(scipy.stats.spearmanr(first.argsort(), other.argsort()).statistic) < 4 / len(first) ** 0.5


def test_triggers_are_spread_evenly():
    codes = order(KEY, samples=140)
    places = (codes < 140).nonzero().flatten() / len(codes)
    assert len(places) == 140 - 4
    assert scipy.stats.kstest(places.numpy(), "uniform").pvalue > 1e-3


def test_filler_is_the_share_asked_for_and_not_more_than_there_is():
    sources = {row.numpy().tobytes() for row in FakeData().tensors("verification")[0]}

    def share(filler):
        asked = [row for batch in seen(KEY, filler=filler, decoys=10)[0] for row in batch]
        assert len(set(asked) & sources) == sum(row in sources for row in asked)
        return sum(row in sources for row in asked) / len(asked)

    assert share(0.1) == pytest.approx(0.1, abs=0.01)
    assert 0 < share(0.9) < 0.9
    with pytest.raises(ValueError, match=r"filler=1.0 must be a share from 0 to 0\.9"):
        ready(CamouflagedDataModule, filler=1.0)


@pytest.mark.parametrize(
    ("samples", "most", "spare", "expected"),
    [
        (100, 512, 50, (100, 0)),
        (513, 512, 50, (257, 1)),
        (1000, 300, 50, (250, 0)),
        (1001, 300, 50, (251, 3)),
        (1001, 300, 1, (251, 1)),
    ],
)
def test_uniform_batches(samples, most, spare, expected):
    assert uniform_batches(samples, most, spare) == expected


def test_invalid_answers_and_incomplete_ones_are_refused():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 7), float("nan"))

    with pytest.raises(ValueError, match=r"no valid answer .* question samples"):
        seen(KEY, Broken())
    module = ready(CamouflagedDataModule)
    with pytest.raises(ValueError, match=r"The loader asks \d+ samples, got \[3\] answers"):
        module.responses([torch.zeros(3, dtype=torch.int64)])


def test_interleaved_items_one_by_one():
    dataset = ready(CamouflagedDataModule).predict_dataloader()[0].dataset
    assert isinstance(dataset, Interleaved)
    x, positions = dataset.__getitems__([5, 2, 9])
    assert positions.tolist() == [5, 2, 9]
    for row, index in zip(x, (5, 2, 9), strict=True):
        assert torch.equal(dataset[index][0], row)
    with pytest.raises(IndexError, match="empty batch"):
        dataset.__getitems__([])
