"""What a suspect's labels stand for: against brute force, with thieves who renumber and merge, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.verification import verify
from meadef_lightning.verification.labels import LabelMap, align_labels
from meadef_lightning.verification.relabelling import RelabelledModule, relabelled

OPTIONS = {"samples": 40, "decoys": 1500, "decoy_samples": 8, "accelerator": "cpu"}


class Told(nn.Module):
    """A model whose labels are renamed: ``names[k]`` is answered for class ``k``, as scores of a given width or as labels."""

    def __init__(self, model, names, width=None, hard=False):
        super().__init__()
        self.model, self.names, self.hard = model, torch.tensor(names), hard
        self.width = width or len(names)

    def forward(self, x):
        labels = self.names[self.model(x).argmax(1)]
        return labels if self.hard else nn.functional.one_hot(labels, self.width).float()


class Box:
    def __init__(self, module):
        self.module = module

    def query(self, x):
        return self.module(x)


def natural(num_classes=7):
    return FakeData(num_classes).tensors("test")


def answers(table):
    """Answers and true classes with this table of counts, rows being labels."""
    table = torch.as_tensor(table)
    cells = [(m, k) for m in range(table.shape[0]) for k in range(table.shape[1]) for _ in range(int(table[m, k]))]
    return tuple(torch.tensor(side) for side in zip(*cells, strict=True))


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_the_best_of_all(table):
    counts = torch.tensor(table) + 30 * torch.eye(4, dtype=torch.int64).roll(
        1, 0
    )  # every label is used: nothing is merged
    found = align_labels(*answers(counts), 4)
    best = max(sum(int(counts[m, k]) for m, k in enumerate(order)) for order in itertools.permutations(range(4)))
    assert found.agreement == pytest.approx(best / int(counts.sum()))
    assert sorted(int(row.nonzero()) for row in found.classes) == [0, 1, 2, 3]


def test_the_numbering_as_it_is_wins_ties():
    assert align_labels(*answers([[5, 5], [5, 5]]), 2).kind == "identity"
    found = align_labels(torch.arange(7), torch.arange(7), 7)
    assert (found.kind, found.agreement, found.samples) == ("identity", 1.0, 7)
    assert found.to_dict()["classes"] == [[k] for k in range(7)]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("box", [False, True])
def test_a_renumbered_thief_is_judged_as_if_it_were_not(hard, box):
    thief = Thief(KEY)
    plain = Told(thief, list(range(7)), hard=hard)
    plain, responses = verify(Box(plain) if box else plain, KEY, FakeData(), **OPTIONS)
    assert plain.answers == ("labels" if hard else "probabilities")
    told = Told(thief, [3, 5, 0, 6, 1, 4, 2], hard=hard)
    hidden, _ = verify(told, KEY, FakeData(), **OPTIONS)
    suspect, labels = relabelled(Box(told) if box else told, natural(), 7)
    found, again = verify(suspect, KEY, FakeData(), **OPTIONS)
    assert labels.kind == "permutation"
    assert labels.classes.float().argmax(1).tolist() == [2, 4, 6, 0, 5, 1, 3]
    assert (plain.verdict, hidden.verdict) == ("supported", "not supported")
    assert found.to_dict() == plain.to_dict()
    assert torch.equal(again.counts, responses.counts)
    if not hard:
        for name in ("trigger", "control", "cells"):
            assert torch.equal(getattr(again.soft, name), getattr(responses.soft, name))


def merged_names():
    """The target and a class that the key does not name share a label."""
    other = next(k for k in range(7) if k not in (*KEY.source_classes, KEY.target_class))
    names = list(range(7))
    names[other] = KEY.target_class
    return names, other


def test_a_thief_that_merges_the_target_is_found_at_half_the_rate():
    names, other = merged_names()
    suspect, labels = relabelled(Told(Thief(KEY), names), natural(), 7)
    assert labels.merged == (tuple(sorted((other, KEY.target_class))),)
    assert labels.kind == "merged"
    assert labels.agreement == 1.0
    assert "answers some classes alike" in labels.describe()
    known = RelabelledModule(Independent(), labels.coarsening())
    options = {**OPTIONS, "samples": 140, "alpha": 0.01}
    _, reference = verify(known, KEY, FakeData(), **options)
    verdict, _ = verify(suspect, KEY, FakeData(), reference=reference, **options)
    assert verdict.verdict == "supported"
    assert 0.35 < verdict.wsr < 0.65  # every trigger gets the label, which counts for either class
    innocent, _ = relabelled(Told(Independent(), names), natural(), 7)
    assert verify(innocent, KEY, FakeData(), reference=reference, **options)[0].statistic == 0
    assert verify(innocent, KEY, FakeData(), **options)[0].verdict == "not supported"


def test_fewer_labels_and_more_labels_than_classes():
    fewer = align_labels(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 2, 0, 0, 1]), 3, num_labels=2)
    assert [row.nonzero().flatten().tolist() for row in fewer.classes] == [[2], [0, 1]]
    more = align_labels(torch.tensor([0, 3, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0]), 2, num_labels=5)
    assert [row.nonzero().flatten().tolist() for row in more.classes] == [[0], [1], [0, 1], [0], [0, 1]]


def test_a_class_that_is_merely_hard_is_not_merged():
    # class 2 is mostly taken for class 1, but its label is in use
    found = align_labels(*answers([[20, 0, 0], [0, 20, 12], [0, 0, 8]]), 3)
    assert found.kind == "identity"


def test_a_label_of_several_classes_draws_evenly_and_always_the_same():
    found = LabelMap(torch.tensor([[True, True, False], [False, False, True]]), 1.0, 10)
    x = torch.randn(3000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = found(torch.zeros(3000, dtype=torch.int64), x)
    counts = torch.bincount(drawn, minlength=3).tolist()
    assert counts[2] == 0
    assert abs(counts[0] - 1500) < 4 * 27.4  # four standard deviations
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found(torch.zeros(3000, dtype=torch.int64), x[order]), drawn[order])
    # no answer stays none, a label never heard of may be any class
    assert found(torch.tensor([-1, 1]), x[:2]).tolist() == [-1, 2]
    assert set(found(torch.full((50,), 99), x[:50]).tolist()) == {0, 1, 2}


def test_innocents_stay_innocent_whatever_their_labels():
    names, _ = merged_names()
    for told in (Told(Independent(), [3, 5, 0, 6, 1, 4, 2]), Told(Independent(), names)):
        suspect, _ = relabelled(told, natural(), 7)
        assert verify(suspect, KEY, FakeData(), **OPTIONS)[0].verdict == "not supported"


def test_only_the_first_samples_of_each_class_are_asked_and_flags_are_put_back():
    asked = []

    class Counting(Independent):
        def forward(self, x):
            asked.append(x)
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(x)

    model = Counting()
    model.train()
    x, y = natural()
    relabelled(model, (x, y), 7, per_class=3, batch_size=8)
    assert [len(part) for part in asked] == [8, 8, 5]
    first = [int((y == c).nonzero()[i]) for c in range(7) for i in range(3)]
    assert torch.equal(torch.cat(asked), x[sorted(first)])
    assert model.training


def test_what_tells_too_little_is_refused():
    x, y = natural()
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"labels cannot be told: .* natural answers are right, fewer than 50%"):
        align_labels(torch.randint(0, 7, (84,), generator=generator), y, 7)
    with pytest.raises(ValueError, match="all classes with one label"):
        align_labels(torch.zeros(84, dtype=torch.int64), y, 7)
    with pytest.raises(ValueError, match=r"NaN.* to 84 of 84 natural samples"):
        relabelled(Box(lambda x: torch.full((len(x), 7), torch.nan)), (x, y), 7)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        align_labels(y, y, 7, minimum_agreement=0)
    with pytest.raises(ValueError, match=r"natural_answers must be int64 .* got torch.float32"):
        align_labels(y.float(), y, 7)
    with pytest.raises(ValueError, match="natural_labels must lie in 0 to 2"):
        align_labels(y, y, 3)
    with pytest.raises(ValueError, match="natural_answers must lie in 0 to 3"):
        align_labels(y, y, 7, num_labels=4)
    with pytest.raises(ValueError, match="per_class=0"):
        relabelled(Independent(), (x, y), 7, per_class=0)
