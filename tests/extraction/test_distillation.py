"""Distillation through the oracle: what is asked, what is paid, what the student sees, and whether the theft works."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from linear_victim import Jitter, Linear, Noise, Spy, network, rows
from silent import SILENT
from torch import nn

from meadef_lightning.data.images import TensorImages
from meadef_lightning.extraction import DistillationDataModule, Student
from meadef_lightning.extraction.distillation import augmented_views
from meadef_lightning.oracle import BudgetExceededError, HardLabel, Oracle, QueryLedger, TopK, Totals, row_digests


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
    trainer = Trainer(max_epochs=25, **SILENT)
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
    trainer, student = Trainer(max_epochs=3, **SILENT), Student(network)
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
        Trainer(max_epochs=1, **SILENT).fit(Student(network), attack)
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


@pytest.mark.parametrize("views", [1, 2])
def test_what_the_student_sees(views):
    source, victim = Noise(), Linear()
    attack = DistillationDataModule(
        Oracle(victim), source, augmentation=Jitter(), views=views, batch_size=30, queries=300
    )
    student = Spy(network)
    Trainer(max_epochs=2, **SILENT).fit(student, attack)
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
