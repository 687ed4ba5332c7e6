"""A Trainer with one process while the others of the job do not train: nothing may wait for them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from user_modules import ALL_TERMS, KEY, SILENT, UserModule, assert_same, callback, fit, make

from meadef_lightning.victims import SimCLRVictim
from meadef_lightning.watermark import MGDA, LastLayerMGDA, WatermarkLossMixin


@pytest.fixture
def second_of_two(monkeypatch):
    """Tells torch that this is rank 1 of 2, and lets every collective operation fail that would wait for rank 0."""

    def waits(*_args, **_kwargs):
        raise AssertionError("This waits for a process that never comes.")

    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(dist, name, waits)

    def start():
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
        monkeypatch.setattr(dist, "get_rank", lambda *_: 1)

    return start


class Mixed(WatermarkLossMixin, UserModule):
    def __init__(self, balancing) -> None:
        super().__init__()
        self.configure_watermark(KEY, samples=4, balancing=balancing)

    def training_step(self, batch, batch_idx):
        return self.watermark.total(self, self.loss(batch), self.watermark_loss(*batch))


def saved(trainer, path):
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", [MGDA, LastLayerMGDA])
def test_the_callback_trains_and_saves_as_if_it_were_the_only_process(kind, second_of_two, tmp_path):
    modules, checkpoints = [make(UserModule), make(UserModule)], []
    for module in modules:
        trainer = fit(module, [callback(balancing=kind())])
        checkpoints.append(saved(trainer, tmp_path / "last.ckpt"))
        second_of_two()
    assert_same(*modules)
    for checkpoint in checkpoints:
        (state,) = checkpoint["callbacks"].values()
        assert set(state["ranks"]) == {"0"}
        assert state["ranks"]["0"]["steps"] > 0


def test_the_mixin_does_so_too(second_of_two, tmp_path):
    modules = [make(Mixed, MGDA()), make(Mixed, MGDA())]
    for module in modules:
        checkpoint = saved(fit(module), tmp_path / "last.ckpt")
        assert set(checkpoint["meadef_watermark"]["ranks"]) == {"0"}
        second_of_two()
    assert_same(*modules)


def test_without_a_trainer_all_processes_take_part(second_of_two):
    """Somebody's own loop has no Trainer to ask how many train."""
    second_of_two()
    net = nn.Linear(2, 2)
    losses = net.weight.sum(), {"ver": net.weight.square().sum()}
    with pytest.raises(AssertionError, match="never comes"):
        MGDA()(*losses, net)


def test_a_checkpoint_between_processes_that_were_spawned_and_have_ended(second_of_two, tmp_path):
    """The main process of ``ddp_spawn`` has a Trainer of two processes, and no group of them."""
    trainer = fit(make(UserModule), [made := callback(balancing=ALL_TERMS)])
    made._world_size = 2
    (state,) = saved(trainer, tmp_path / "last.ckpt")["callbacks"].values()
    assert set(state["ranks"]) == {"0"}


def test_views_of_processes_that_do_not_train_are_no_negatives(second_of_two):
    images = DataLoader(TensorDataset(torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))), 12)

    def encoder():
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16))
        return SimCLRVictim(network, feature_dim=16)

    modules = [make(encoder), make(encoder)]
    for module in modules:
        torch.manual_seed(5)
        Trainer(max_epochs=1, **SILENT).fit(module, images)
        second_of_two()
    assert_same(*modules)
