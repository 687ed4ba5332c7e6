"""The loaders of a transfer set: their order, an interrupted training, two processes, and what makes none."""

import copy
import logging

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from linear_victim import Jitter, Linear, Noise, Spy, network, rows
from silent import SILENT

from meadef_lightning.extraction import DistillationDataModule, Student
from meadef_lightning.extraction.base import TensorBatches
from meadef_lightning.oracle import Oracle, QueryLedger, Totals


def ready(*args, stage="fit", **kwargs):
    data = DistillationDataModule(*args, **kwargs)
    data.setup(stage)
    return data


def test_order_is_a_function_of_seed_and_epoch():
    def orders(seed):
        attack, student = DistillationDataModule(Oracle(Linear()), Noise(), seed=seed, batch_size=27), Spy(network)
        Trainer(max_epochs=2, **SILENT).fit(student, attack)
        return torch.cat([x for x, _ in student.trained]).split(270)

    torch.manual_seed(0)
    first = orders(0)
    torch.manual_seed(1)
    again, other = orders(0), orders(1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_loading_leaves_the_global_generator_alone():
    attack = ready(Oracle(Linear()), Noise())
    state = torch.random.get_rng_state()
    rows(attack.train_dataloader())
    rows(attack.val_dataloader())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_resumed_training_equals_uninterrupted(tmp_path):
    torch.manual_seed(0)
    initial = network(4, 1)

    class Saving(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 13:  # in the middle of the second epoch
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def run(ckpt_path=None, max_epochs=3):
        student = Student(copy.deepcopy(initial))
        attack = DistillationDataModule(Oracle(Linear(), ledger=QueryLedger(tmp_path / "l")), Noise(), batch_size=30)
        Trainer(max_epochs=max_epochs, callbacks=[Saving()], **SILENT).fit(student, attack, ckpt_path=ckpt_path)
        return student

    whole = run()
    resumed = run(tmp_path / "half.ckpt")
    assert not torch.equal(initial[1].weight, whole.network[1].weight)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    run(tmp_path / "half.ckpt", max_epochs=4)  # a longer run than planned goes on, instead of failing in its schedule


class Reporting(Student):
    """Gathers the answers of both processes, and writes what they had in common."""

    def on_train_start(self):
        transfer = self.trainer.datamodule._transfer
        spent = torch.tensor(self.trainer.datamodule.queries_spent)
        gathered = self.all_gather((transfer.answers, spent))
        assert torch.equal(gathered[0][0], gathered[0][1])
        assert gathered[1].tolist() == [300, 300]


@pytest.mark.parametrize("budget", [None, 10])
def test_two_processes_ask_once(tmp_path, budget):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    attack = DistillationDataModule(
        Oracle(Linear(), ledger=QueryLedger(tmp_path / "l", budget)), Noise(), batch_size=32
    )
    trainer = Trainer(max_epochs=1, strategy="ddp_fork", devices=2, **SILENT)
    if budget is None:
        trainer.fit(Reporting(network), attack)
        assert attack.oracle.ledger.totals() == Totals(300, 300)
    else:
        with pytest.raises(Exception, match="The query budget is 10 distinct inputs"):
            trainer.fit(Reporting(network), attack)
        assert attack.oracle.ledger.totals() == Totals(0, 0)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"views": 2}, "views=2 asks for augmented copies of each image; give an augmentation"),
        ({"queries": 2, "views": 3, "augmentation": Jitter()}, "queries=2 is less than the 3 of one image"),
        ({"queries": 0}, "queries=0 is less than"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\), got 1.0"),
        (
            {"queries": 301},
            "needs 301 images, 30 of them for validation, and the pool has 300. Raise the pool",
        ),
        ({"queries": 1, "validation_fraction": 0.9}, "needs 1 images, 1 of them for validation"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ready(Oracle(Linear()), Noise(), **options)


def test_empty_attacker_split():
    with pytest.raises(ValueError, match="attacker split is empty"):
        ready(Oracle(Linear()), Noise(attacker=0))


def test_no_validation():
    attack = ready(Oracle(Linear()), Noise(), validation_fraction=0.0, batch_size=300)
    assert attack.val_dataloader() == []
    assert len(rows(attack.train_dataloader())[0]) == 300
    Trainer(max_epochs=1, **SILENT).fit(Student(network), attack)


def test_tensors_of_different_lengths():
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 3\]"):
        TensorBatches(torch.zeros(2), torch.zeros(3))
    assert TensorBatches(torch.arange(3), torch.arange(3) * 2)[1] == (torch.tensor(1), torch.tensor(2))
