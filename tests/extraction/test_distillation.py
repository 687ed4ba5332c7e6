"""Distillation through the oracle: what is asked, what is paid, what the student sees, and whether the theft works."""

import copy
import logging

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.extraction import DistillationDataModule, Student
from meadef_lightning.extraction.base import TensorBatches
from meadef_lightning.extraction.distillation import augmented_views
from meadef_lightning.oracle import BudgetExceededError, HardLabel, Oracle, QueryLedger, TopK, Totals, row_digests

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


class Noise(SplitDataModule):
    """Grey noise in four classes, 300 images for the attacker."""

    class_names = ("a", "b", "c", "d")
    image_shape = (1, 4, 4)

    def __init__(self, attacker=300):
        super().__init__(
            batch_size=50, victim_size=100, attacker_size=attacker, verification_size=20, validation_size=20
        )

    def load(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (760, 1, 4, 4), generator=generator, dtype=torch.uint8)
        labels = torch.arange(760) % 4
        return TensorImages(images[:560], labels[:560]), TensorImages(images[560:], labels[560:])


class Linear(nn.Module):
    """A victim with wide margins that counts the rows it is asked."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.layer.weight.normal_(generator=torch.Generator().manual_seed(1))
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        return self.layer(x.flatten(1))


class Jitter(nn.Module):
    """Adds noise of its own to every image."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def network(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, num_classes))


def rows(loader):
    return [torch.cat(column) for column in zip(*loader, strict=True)]


def ready(*args, stage="fit", **kwargs):
    data = DistillationDataModule(*args, **kwargs)
    data.setup(stage)
    return data


# --- the theft


@pytest.mark.parametrize(("policy", "least"), [(None, 0.95), (TopK(2), 0.93), (HardLabel(), 0.85)])
def test_student_of_a_linear_victim_agrees_with_it(policy, least):
    seed_everything(0, verbose=False)
    victim, data = Linear(), Noise()
    attack = DistillationDataModule(Oracle(victim, policy), data, batch_size=32)
    student = Student(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05))
    trainer = Trainer(max_epochs=25, **QUIET)
    trainer.fit(student, attack)
    assert attack.oracle.ledger.totals() == Totals(300, 300)
    x, _ = data.tensors("test")
    with torch.no_grad():
        fidelity = (student(x).argmax(1) == victim(x).argmax(1)).float().mean()
    assert fidelity >= least
    assert trainer.callback_metrics["val_fidelity"] >= least - 0.1
    assert trainer.callback_metrics["val_accuracy"] < 0.6  # the labels are noise: the student learnt the victim
    assert "test_accuracy" in trainer.test(student, attack, verbose=False)[0]


CONFIG = """
model:
  network: {class_path: test_distillation.Small, init_args: {bias: false}}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data:
  oracle:
    class_path: meadef_lightning.oracle.Oracle
    init_args:
      victim: {class_path: test_distillation.Linear}
      policy:
        class_path: meadef_lightning.oracle.Compose
        init_args:
          policies:
          - {class_path: meadef_lightning.oracle.Temperature, init_args: {temperature: 2}}
          - {class_path: meadef_lightning.oracle.TopK, init_args: {k: 3}}
      ledger: {class_path: meadef_lightning.oracle.QueryLedger, init_args: {budget: 100}}
  data: {class_path: test_distillation.Noise}
  queries: 100
  augmentation: {class_path: meadef_lightning.data.augmentation.RandomShiftFlip}
trainer:
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  accelerator: cpu
"""


class Small(nn.Module):
    """A network as a configuration file names it."""

    def __init__(self, num_classes: int, in_channels: int, bias: bool = True):
        super().__init__()
        self.layer = nn.Linear(16 * in_channels, num_classes, bias)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_everything_can_be_said_in_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(
        Student, DistillationDataModule, run=False, save_config_callback=None, seed_everything_default=0,
        auto_configure_optimizers=False, args=["--config", str(tmp_path / "config.yaml")],
    )  # fmt: skip
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.datamodule.oracle.ledger.totals() == Totals(100, 100)
    assert cli.datamodule.oracle.labels == "topk"
    assert cli.model.network.layer.bias is None


# --- what is asked


def test_only_attacker_images_are_asked_and_answers_belong_to_them():
    source, victim = Noise(), Linear()
    attack = ready(Oracle(victim), source, batch_size=32, validation_fraction=0.2)
    x, answers, y = rows(attack.val_dataloader())
    train_x, train_answers = rows(attack.train_dataloader())
    assert (len(train_x), len(x)) == (224, 60)  # of 240, the last incomplete batch is dropped
    expected_x, expected_y = source.tensors("attacker")
    assert torch.equal(x, expected_x[240:])
    assert torch.equal(y, expected_y[240:])
    with torch.no_grad():
        torch.testing.assert_close(answers, victim(x).softmax(1))
        torch.testing.assert_close(train_answers, victim(train_x).softmax(1))
    asked = set(row_digests(torch.cat([train_x, x])))
    assert asked <= set(row_digests(expected_x))
    for split in ("victim", "validation", "verification", "test"):
        assert asked.isdisjoint(row_digests(source.tensors(split)[0]))


def test_answers_are_asked_once_for_all_stages_and_epochs():
    victim = Linear()
    attack = DistillationDataModule(Oracle(victim), Noise(), batch_size=32)
    trainer, student = Trainer(max_epochs=3, **QUIET), Student(network)
    trainer.fit(student, attack)
    trainer.validate(student, attack, verbose=False)
    trainer.test(student, attack, verbose=False)
    assert victim.asked == 300
    assert attack.oracle.ledger.totals() == Totals(300, 300)


def test_testing_alone_asks_nothing():
    victim = Linear()
    attack = ready(Oracle(victim), Noise(), stage="test")
    assert len(rows(attack.test_dataloader())[0]) == 200
    assert victim.asked == attack.queries_spent == 0
    with pytest.raises(RuntimeError, match=r"not asked yet: call setup\('fit'\) first"):
        attack.train_dataloader()


def test_smaller_budgets_are_subsets_and_cost_nothing_again(tmp_path):
    victim, source = Linear(), Noise()
    small = ready(Oracle(victim, ledger=QueryLedger(tmp_path / "l")), source, queries=100)
    large = ready(Oracle(victim, ledger=QueryLedger(tmp_path / "l")), source, queries=250)
    assert victim.asked == 250
    assert (small.queries_spent, large.queries_spent) == (100, 250)
    assert large.oracle.ledger.totals() == Totals(250, 350)


def test_restart_pays_nothing_and_sees_the_same(tmp_path):
    victim, source = Linear(), Noise()
    first = ready(
        Oracle(victim, ledger=QueryLedger(tmp_path / "l")), source, queries=200, augmentation=Jitter(), views=2
    )
    again = ready(
        Oracle(victim, ledger=QueryLedger(tmp_path / "l", 200)), Noise(), queries=200, augmentation=Jitter(), views=2
    )
    assert victim.asked == 200
    for a, b in zip(rows(first.train_dataloader()), rows(again.train_dataloader()), strict=True):
        assert torch.equal(a, b)
    assert again.queries_spent == 200


def test_budget_that_does_not_suffice_spends_nothing():
    victim = Linear()
    attack = DistillationDataModule(Oracle(victim, ledger=QueryLedger(budget=299), batch_size=10), Noise())
    with pytest.raises(
        BudgetExceededError, match=r"budget is 299 distinct inputs: 0 are spent, 300 new ones were asked"
    ):
        Trainer(max_epochs=1, **QUIET).fit(Student(network), attack)
    assert victim.asked == 0


def test_repeated_images_are_paid_for_once():
    class Repeated(Noise):
        def load(self):
            train, test = super().load()
            return TensorImages(train.images[torch.arange(560) % 40], train.targets), test

    source = Repeated()
    attack = ready(Oracle(Linear()), source)
    distinct = len(source.tensors("attacker")[0].unique(dim=0))
    assert attack.queries_spent == attack.oracle.ledger.distinct == distinct <= 40
    assert attack.oracle.ledger.calls == 300


def test_summary():
    attack = ready(
        Oracle(Linear(), HardLabel(), QueryLedger(budget=400)), Noise(), queries=90, augmentation=Jitter(), views=3
    )
    assert attack.query_summary() == {
        "pool": "AttackerSplit", "labels": "hard", "queries": 90, "distinct": 90, "views": 3, "augmented": True, "budget": 400,
    }  # fmt: skip
    assert (attack.num_classes, attack.image_shape) == (4, (1, 4, 4))


# --- augmentation


def test_views_are_asked_and_images_stay_on_their_side():
    victim, source = Linear(), Noise()
    attack = ready(Oracle(victim), source, queries=301, augmentation=Jitter(), views=3, batch_size=1000)
    assert victim.asked == attack.queries_spent == 300
    x, answers = rows(attack.train_dataloader())
    held_out = rows(attack.val_dataloader())
    assert (len(x), len(held_out[0])) == (270, 30)
    with torch.no_grad():
        torch.testing.assert_close(answers, victim(x).softmax(1))
    images, labels = source.tensors("attacker")
    nearest = torch.cdist(x.flatten(1), images[:100].flatten(1)).argmin(dim=1)
    assert sorted(nearest.tolist()) == sorted(list(range(90)) * 3)
    nearest = torch.cdist(held_out[0].flatten(1), images[:100].flatten(1)).argmin(dim=1)
    assert nearest.tolist() == list(range(90, 100)) * 3
    assert torch.equal(held_out[2], labels[nearest])


def test_views_are_seeded_and_leave_the_global_generator_alone():
    x, state = torch.zeros(7, 1, 2, 2), torch.random.get_rng_state()
    a, b, c = (augmented_views(x, Jitter(), 3, seed, batch_size=4) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a, b)
    assert torch.equal(a[:7], x)
    assert len(a[7:].unique(dim=0)) == 14
    assert not torch.equal(a, c)
    with pytest.raises(ValueError, match=r"batch of shape \(4, 1, 2, 2\) into \(4, 4\)"):
        augmented_views(x, nn.Flatten(), 2, 0, batch_size=4)


class Spy(Student):
    """Keeps what it is trained and validated on."""

    def on_fit_start(self):
        self.trained, self.validated = [], []

    def training_step(self, batch):
        self.trained.append([part.clone() for part in batch])
        return super().training_step(batch)

    def validation_step(self, batch):
        self.validated.append(batch[0])
        return super().validation_step(batch)


@pytest.mark.parametrize("views", [1, 2])
def test_what_the_student_sees(views):
    source, victim = Noise(), Linear()
    attack = DistillationDataModule(
        Oracle(victim), source, augmentation=Jitter(), views=views, batch_size=30, queries=300
    )
    student = Spy(network)
    Trainer(max_epochs=2, **QUIET).fit(student, attack)
    assert victim.asked == 300
    x, answers = (torch.cat(column) for column in zip(*student.trained, strict=True))
    with torch.no_grad():
        asked_as_seen = torch.isclose(victim(x).softmax(1), answers, atol=1e-6).all(dim=1)
    if views == 1:  # the answer belongs to the clean query, and each epoch brings another view of it
        clean = source.tensors("attacker")[0]
        assert asked_as_seen.float().mean() < 0.5  # an answer near 0 or 1 may be the same for both
        assert len(x.unique(dim=0)) == len(x) == 540
        nearest = torch.cdist(x.flatten(1), clean.flatten(1)).argmin(dim=1)
        with torch.no_grad():
            torch.testing.assert_close(answers, victim(clean[nearest]).softmax(1))
    else:  # the student sees what was asked, the same in each epoch
        assert asked_as_seen.all()
        assert len(x.unique(dim=0)) == 270
    assert len(torch.cat(student.validated).unique(dim=0)) == 30  # never augmented on the way


# --- order and processes


def test_order_is_a_function_of_seed_and_epoch():
    def orders(seed):
        attack, student = DistillationDataModule(Oracle(Linear()), Noise(), seed=seed, batch_size=27), Spy(network)
        Trainer(max_epochs=2, **QUIET).fit(student, attack)
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
        Trainer(max_epochs=max_epochs, callbacks=[Saving()], **QUIET).fit(student, attack, ckpt_path=ckpt_path)
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
    trainer = Trainer(max_epochs=1, strategy="ddp_fork", devices=2, **QUIET)
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
    Trainer(max_epochs=1, **QUIET).fit(Student(network), attack)


def test_tensors_of_different_lengths():
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 3\]"):
        TensorBatches(torch.zeros(2), torch.zeros(3))
    assert TensorBatches(torch.arange(3), torch.arange(3) * 2)[1] == (torch.tensor(1), torch.tensor(2))
