import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from verification_fakes import KEY, FakeData

from meadef_lightning.verification import VerificationDataModule
from meadef_lightning.verification.datamodule import source_pairs
from meadef_lightning.watermark import Combiner, CombinerSpec, WatermarkKey


def ready(key=KEY, data=None, **options):
    module = VerificationDataModule(key, data or FakeData(), **{"samples": 100, **options})
    module.prepare_data()
    module.setup("predict")
    return module


def whole(loader):
    """All samples of a loader in the order of their positions, and the positions as they came."""
    batches = list(loader)
    x, index = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    return x[index.argsort()], index


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.data())
def test_source_pairs_are_different_and_use_every_sample_equally(na, nb, seed, draw):
    labels = torch.tensor([3] * na + [1] * nb + [0] * 4)
    count = draw.draw(st.integers(1, na * nb))
    first, second = source_pairs(labels, 3, 1, count, seed)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == count
    for side, label, available in ((first, 3, na), (second, 1, nb)):
        assert (labels[side] == label).all()
        uses = torch.bincount(side, minlength=len(labels))[labels == label]
        assert uses.max() - uses.min() <= 1
        assert int((uses > 0).sum()) == min(count, available)
    longer = source_pairs(labels, 3, 1, na * nb, seed)
    assert torch.equal(longer[0][:count], first)
    assert torch.equal(longer[1][:count], second)


def test_source_pairs_change_with_the_seed_and_end_somewhere():
    labels = torch.arange(2).repeat(10)
    assert not torch.equal(source_pairs(labels, 0, 1, 20, 0)[0], source_pairs(labels, 0, 1, 20, 1)[0])
    with pytest.raises(ValueError, match="10 and 10 samples make 100 different pairs, fewer than 101"):
        source_pairs(labels, 0, 1, 101, 0)


def test_triggers_and_controls_are_matched_pairs_of_verification_sources():
    module = ready(samples=40, batch_size=16)
    trigger, control, _, _ = module.predict_dataloader()
    (x, labels), ways = FakeData().tensors("verification"), module.table.space.combiners
    first, second = source_pairs(labels, *KEY.source_classes, 40, 0)
    triggers, order = whole(trigger)
    assert order.tolist() == list(range(40))
    assert torch.equal(triggers, KEY.combiner.build()(x[first], x[second]))
    others = KEY.control_combiners()
    assert len(others) == len(ways) - 1
    controls, _ = whole(control)
    for i in range(40):
        expected = others[i % 7].build()(x[first[i]][None], x[second[i]][None])[0]
        assert torch.equal(controls[i], expected)


def test_decoys_are_the_composites_of_every_cell_way_by_way():
    module = ready(decoy_samples=3, batch_size=100)
    loader = module.predict_dataloader()[2]
    x, labels = FakeData().tensors("verification")
    decoys, _ = whole(loader)
    pairs = [(a, b) for a in range(7) for b in range(7) if a != b]
    decoys = decoys.reshape(8, len(pairs), 3, 1, 8, 8)
    for way, spec in enumerate(KEY.space):
        for position, (a, b) in enumerate(pairs):
            first, second = source_pairs(labels, a, b, 3, 0)
            assert torch.equal(decoys[way, position], spec.build()(x[first], x[second]))
    ways_in_a_batch = [len(set((batch[1] // (len(pairs) * 3)).tolist())) for batch in loader]
    assert max(ways_in_a_batch) <= 2


def test_naturals_are_the_test_split():
    data = FakeData()
    x, index = whole(ready(data=data).predict_dataloader()[3])
    assert torch.equal(x, data.tensors("test")[0])
    assert index.tolist() == list(range(len(x)))


def test_only_verification_and_test_splits_are_read():
    data = FakeData()
    module = ready(data=data)
    module.setup("predict")
    assert data.calls == ["prepare_data", "setup predict", "verification", "test"]


def test_batch_size_changes_nothing_but_the_batches():
    small, large = (ready(samples=30, decoy_samples=2, batch_size=n).predict_dataloader() for n in (7, 1000))
    for one, other in zip(small, large, strict=True):
        assert torch.equal(whole(one)[0], whole(other)[0])


def test_shards_of_a_distributed_sampler_make_the_whole():
    for loader in ready(samples=13, decoy_samples=2).predict_dataloader():
        parts = []
        for rank in range(3):
            sampler = UnrepeatedDistributedSampler(loader.dataset, num_replicas=3, rank=rank, shuffle=False)
            shard = torch.utils.data.DataLoader(loader.dataset, 5, sampler=sampler, collate_fn=loader.collate_fn)
            parts += list(shard)
        index = torch.cat([part[1] for part in parts])
        assert sorted(index.tolist()) == list(range(len(loader.dataset)))
        assert torch.equal(torch.cat([part[0] for part in parts])[index.argsort()], whole(loader)[0])


def test_a_single_item_is_a_sample_and_its_position():
    module = ready(samples=13)
    x, index = module.predict_dataloader()[0].dataset[4]
    assert torch.equal(x, whole(module.predict_dataloader()[0])[0][4])
    assert int(index) == 4


def test_counts_are_the_answers_of_each_cell():
    module = ready(samples=10, decoy_samples=4)
    sizes = [len(loader.dataset) for loader in module.predict_dataloader()]
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randint(7, (n,), generator=generator) for n in sizes]
    responses = module.responses(answers)
    by_way = answers[2].reshape(8, 42, 4)
    for i, (a, b, way) in enumerate(responses.cells.tolist()):
        pair = a * 6 + b - (b > a)
        expected = [by_way[way, pair].tolist().count(c) for c in range(7)]
        assert responses.counts[i].tolist() == expected
    assert torch.equal(responses.trigger, answers[0])
    assert torch.equal(responses.natural_labels, FakeData().tensors("test")[1])
    with pytest.raises(ValueError, match="The loaders ask"):
        module.responses([answer[:5] for answer in answers])


class Noisy(Combiner):
    """A way that draws."""

    def combine(self, a, b, generator):
        return a + torch.rand(a.shape, generator=generator)


def test_a_way_that_draws_gives_the_same_samples_again():
    key = WatermarkKey((0, 1), 2, 7, combiner=CombinerSpec(f"{__name__}.Noisy"))
    first, second = (whole(ready(key, samples=20).predict_dataloader()[0])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, whole(ready(key, samples=20, seed=1).predict_dataloader()[0])[0])


class Few(FakeData):
    """Class 5 has fewer samples."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def tensors(self, split):
        x, y = super().tensors(split)
        keep = (y != 5) | ((y == 5).cumsum(0) <= self.left)
        return x[keep], y[keep]


def test_an_absent_class_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"Class 5 has 0 sample\(s\).*verification_size"):
        ready(data=Few(0))


def test_too_few_samples_are_named_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"Class 5 has 2 sample\(s\).*24 different.*decoy_samples=32.*lower decoy_samples to 24"
    ):
        ready(data=Few(2))


def test_triggers_are_reduced_for_every_key_alike_and_it_is_said():
    for index in (0, 1):
        key = WatermarkKey((0, 1) if index else (5, 6), 2, 7)
        with pytest.warns(UserWarning, match="36 triggers are used instead of samples=512"):
            module = ready(key, data=Few(3), samples=512)
        assert len(module.predict_dataloader()[0].dataset) == 36


@pytest.mark.parametrize("option", ["samples", "batch_size", "decoy_samples"])
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}=0 must be at least"):
        VerificationDataModule(KEY, FakeData(), **{option: 0})


def test_key_and_data_must_agree_on_the_classes():
    with pytest.raises(MisconfigurationException, match="7 classes but the data has 5"):
        ready(data=FakeData(num_classes=5))


def test_strange_data_is_refused():
    class Empty(FakeData):
        def tensors(self, split):
            x, y = super().tensors(split)
            return (x[:0], y[:0]) if split == "test" else (x, y)

    class Mislabelled(FakeData):
        def tensors(self, split):
            x, y = super().tensors(split)
            return x, y + 1

    with pytest.raises(ValueError, match="test split is empty"):
        ready(data=Empty())
    with pytest.raises(ValueError, match="labels from 1 to 7, but the task has classes 0 to 6"):
        ready(data=Mislabelled())


def test_pairs_are_balanced_when_sizes_share_a_divisor():
    labels = torch.tensor([0] * 6 + [1] * 4)
    first, second = source_pairs(labels, 0, 1, 24, 0)
    assert math.lcm(6, 4) == 12
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 24


def test_data_that_a_way_cannot_combine_is_refused_whatever_the_key():
    class Signals(FakeData):
        def tensors(self, split):
            x, y = super().tensors(split)
            return x[:, 0], y

    messages = set()
    for way in (0, 7):
        with pytest.raises(ValueError, match="on samples of size") as error:
            ready(WatermarkKey((0, 1), 2, 7, combiner=KEY.space[way]), data=Signals())
        messages.add(str(error.value))
    assert len(messages) == 1
