import pytest
import torch
from lightning.fabric.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from meadef_lightning.data.loading import EpochShuffle, ResumableLoader, epoch_order


def order(loader):
    return torch.cat([batch[0] for batch in loader]).tolist()


@pytest.fixture
def data():
    return TensorDataset(torch.arange(23))


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_separately():
    assert sorted(epoch_order(50, 3, 4).tolist()) == list(range(50))
    assert torch.equal(epoch_order(50, 3, 4), epoch_order(50, 3, 4))
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_huge_seeds_work():
    assert sorted(epoch_order(5, 2**64 - 1, 10**9).tolist()) == list(range(5))


def test_sampler_reshuffles_by_itself_and_on_request(data):
    sampler = EpochShuffle(data, seed=5)
    first, second = list(sampler), list(sampler)
    assert first == epoch_order(23, 5, 0).tolist()
    assert second == epoch_order(23, 5, 1).tolist()
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_shuffling_leaves_the_global_random_state_alone(data):
    before = torch.get_rng_state()
    loader = ResumableLoader(data, batch_size=4, sampler=EpochShuffle(data, 0), generator=torch.Generator())
    order(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_continues_once_where_it_was_told(data, num_workers):
    def loader():
        return ResumableLoader(
            data, batch_size=4, sampler=EpochShuffle(data, 1), num_workers=num_workers, position=lambda: 2
        )

    whole = loader()
    first, second = order(whole), order(whole)
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())
    assert order(resumed) == first[8:]
    assert order(resumed) == second


def test_a_position_survives_what_lightning_does_for_several_processes(data):
    """It makes the loader anew, with a sampler for each process."""
    loader = ResumableLoader(data, batch_size=4, skip=1)
    loader.load_state_dict({"batches": 2})
    again = _update_dataloader(loader, SequentialSampler(data))
    assert again is not loader
    assert order(again) == list(range(8, 23))
    assert order(again) == list(range(23))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_may_be_announced_after_the_iterator_was_made(data, num_workers):
    sampler = EpochShuffle(data, 1)
    iterator = iter(ResumableLoader(data, batch_size=23, sampler=sampler, num_workers=num_workers))
    sampler.set_epoch(6)
    assert next(iterator)[0].tolist() == epoch_order(23, 1, 6).tolist()


def test_loader_without_position_starts_at_the_beginning(data):
    loader = ResumableLoader(data, batch_size=4)
    assert loader.state_dict() == {"batches": 0}
    assert order(loader) == order(DataLoader(data, batch_size=4))
    assert len(loader) == 6
