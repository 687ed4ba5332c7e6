"""BatchNorm that keeps its running statistics, within a block, in the objective, and over a Trainer's step."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from objective_batches import SIZE, network, ready
from torch import nn
from user_modules import KEY, UserModule, fit, make

from meadef_lightning.watermark import WatermarkCallback
from meadef_lightning.watermark.batchnorm import BatchNormFreezer, frozen_batchnorm


def statistics(net):
    return copy.deepcopy({name: value for name, value in net.state_dict().items() if name.startswith("1.")})


def test_frozen_batchnorm_uses_and_keeps_the_running_statistics():
    net = network(batchnorm=True).train()
    net(torch.randn(50, 1, SIZE, SIZE))
    before = statistics(net)
    x = 5 + 3 * torch.randn(20, 1, SIZE, SIZE)
    with frozen_batchnorm(net):
        inside = net(x)
        assert not net[1].training
        assert all(module.training for module in net.modules() if module is not net[1])
    assert net[1].training
    assert all(torch.equal(value, before[name]) for name, value in statistics(net).items())
    assert torch.equal(inside, net.eval()(x))
    inside.sum().backward()
    assert net[1].weight.grad.abs().sum() > 0  # its parameters learn


def test_frozen_batchnorm_restores_what_was_even_after_an_error():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.Dropout())
    net.train()
    net[1].eval()
    inside = []

    def fail():
        with frozen_batchnorm(net):
            inside.extend(layer.training for layer in net)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [False, False, False, False, True]
    assert [layer.training for layer in net] == [True, False, True, True, True]
    assert net.training


@pytest.mark.parametrize("freeze", [True, False])
def test_the_objective_freezes_batchnorm_as_told(freeze):
    net = network(batchnorm=True).train()
    objective = ready(batchnorm="running" if freeze else "batch")
    objective.draw()
    before = statistics(net)
    assert int(before["1.num_batches_tracked"]) == 0
    terms = objective.terms(net, net)
    unchanged = all(torch.equal(value, before[name]) for name, value in statistics(net).items())
    assert unchanged is freeze
    assert net[1].training
    net[1].train(not freeze)
    logits = net(torch.cat([*objective._groups.values()]))[:6]
    torch.testing.assert_close(terms["ver"], -logits.log_softmax(1)[:, 2].mean())


# ---- over a step


def test_a_second_freeze_gives_back_what_the_first_took():
    net, freezer = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), BatchNormFreezer()
    net(torch.randn(4, 2))
    net[1].eval()
    freezer.freeze(net)
    freezer.freeze(net)
    assert not net[0].training
    freezer.unfreeze()
    assert [layer.training for layer in net] == [True, False]
    assert [layer.training for layer in copy.deepcopy(net)] == [True, False]


class Modes(Callback):
    """Remembers, after each batch and epoch, whether BatchNorm is in training."""

    def __init__(self):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(pl_module.body[1].training)

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(pl_module.body[1].training)


def test_a_module_that_skips_the_rest_of_an_epoch_gets_its_batchnorm_back():
    """Lightning announces the end of no batch then."""

    class Skipping(UserModule):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    module, modes = make(Skipping), Modes()
    fit(module, [WatermarkCallback(KEY, start=0.5, samples=4), modes], max_epochs=4)
    assert modes.epochs == [True] * 4
    assert modes.batches == [True] * 12
    assert module.body[1].training
