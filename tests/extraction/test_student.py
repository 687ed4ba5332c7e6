"""The student and its loss, against PyTorch's own and values by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from torch import nn
from torch.utils.data import DataLoader

from meadef_lightning.extraction import Student, distillation_loss
from meadef_lightning.oracle import Compose, HardLabel, Rounded, Soft, TopK
from meadef_lightning.victims.classifier import one_cycle_factor


def linear(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 4, num_classes))


# --- loss


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 20), st.floats(0.1, 5))
def test_soft_loss_is_the_tempered_kl_of_the_victims_logits(seed, temperature, scale):
    generator = torch.Generator().manual_seed(seed)
    victim = scale * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    z = torch.randn(6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    kl = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(z / temperature, 1), F.softmax(victim / temperature, 1))
    (gradient,) = torch.autograd.grad(temperature**2 * kl, z)

    student = z.detach().float().requires_grad_()
    loss = distillation_loss(student, Soft()(victim), temperature)
    torch.testing.assert_close(loss.item(), (temperature**2 * kl).item(), rtol=1e-4, atol=2e-5 * temperature**2)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], gradient.float(), rtol=1e-3, atol=1e-5 * temperature
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_exact_for_very_unlikely_classes(temperature):
    victim, z = torch.tensor([[0.0, -40.0, -80.0]]), torch.tensor([[1.0, 0.5, -1.0]])
    target = F.softmax(victim.double() / temperature, 1)
    expected = (target * (target.log() - F.log_softmax(z.double() / temperature, 1))).sum() * temperature**2
    torch.testing.assert_close(
        distillation_loss(z, Soft()(victim), temperature).double(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_zeros_of_top_k_drop_out_and_the_rest_is_renormalised(temperature):
    victim, z = torch.tensor([[3.0, 1.0, 2.0, -1.0]]), torch.tensor([[0.3, -0.2, 0.1, 0.9]])
    target = torch.zeros(1, 4)
    target[:, [0, 2]] = F.softmax(victim[:, [0, 2]] / temperature, 1)
    expected = temperature**2 * F.kl_div(F.log_softmax(z / temperature, 1), target, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(z, TopK(2)(victim), temperature), expected)


def test_row_rounded_to_nothing_says_nothing():
    answers = Compose([Soft(), Rounded(0)])(torch.zeros(1, 5))
    assert not answers.any()
    z = torch.zeros(1, 5, requires_grad=True)
    loss = distillation_loss(z, answers, 2.0)
    loss.backward()
    assert loss.abs() < 1e-6
    assert z.grad.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_hard_loss_is_the_cross_entropy(temperature):
    z, victim = torch.randn(8, 5), torch.randn(8, 5)
    labels = HardLabel()(victim)
    expected = -(z - z.logsumexp(1, keepdim=True))[range(8), labels].mean()
    torch.testing.assert_close(distillation_loss(z, labels, temperature), expected)


def test_loss_is_float32_under_autocast():
    z = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distillation_loss(z, Soft()(z.flip(1)), 2.0)
    assert torch.equal(mixed, distillation_loss(z, Soft()(z.flip(1)), 2.0))


@pytest.mark.parametrize(
    "answers",
    [torch.rand(4, 1), torch.rand(4, 6), torch.rand(4), torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4).int()],
)
def test_answers_that_do_not_fit(answers):
    with pytest.raises(ValueError, match=r"logits, \(4, 5\), or int64 of shape \(4,\), got .* Does num_classes match"):
        distillation_loss(torch.zeros(4, 5), answers)


# --- schedule


@settings(deadline=None)
@given(st.integers(1, 500))
def test_one_cycle_rises_to_its_peak_and_falls_to_zero(total):
    factors = torch.tensor([one_cycle_factor(step, total) for step in range(total + 3)], dtype=torch.float64)
    peak = int(factors.argmax())
    assert (factors[: peak + 1].diff() >= 0).all()
    assert (factors[peak:].diff() <= 0).all()
    assert abs(peak - 0.2 * total) <= 1
    assert factors[total:].abs().max() < 1e-12
    assert factors.min() >= 0
    assert factors.max() <= 1
    if total >= 5:
        assert factors[0] == pytest.approx(0.04)
        assert factors.max() > 0.7


# --- module


class Data(LightningDataModule):
    """Queries with answers by a fixed function; in validation the truth is always class 0."""

    num_classes = 3
    image_shape = (1, 2, 2)

    def __init__(self, hard=False, truth=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(50, 1, 2, 2, generator=generator)
        logits = self.x.flatten(1)[:, :3]
        self.answers = logits.argmax(1) if hard else logits.softmax(1)
        self.truth = [torch.zeros(50, dtype=torch.int64)] if truth else []

    def loader(self, *tensors):
        return DataLoader(list(zip(*tensors, strict=True)), batch_size=16)

    def train_dataloader(self):
        return self.loader(self.x, self.answers)

    def val_dataloader(self):
        return self.loader(self.x, self.answers, *self.truth)

    def test_dataloader(self):
        return self.loader(self.x, *self.truth)

    predict_dataloader = test_dataloader


def test_sizes_come_from_the_data_module_once():
    made = []

    def factory(*sizes):
        made.append(sizes)
        return linear(*sizes)

    student = Student(factory)
    for _ in range(2):
        Trainer(max_epochs=1, **SILENT).fit(student, Data())
    assert made == [(3, 1)]
    other = Student(factory, num_classes=4, in_channels=2)
    other.configure_model()
    assert other(torch.zeros(2, 2, 2, 2)).shape == (2, 4)


def test_given_module_is_trained():
    network = linear(3, 1)
    before = network[1].weight.detach().clone()
    student = Student(network)
    Trainer(max_epochs=1, **SILENT).fit(student, Data())
    assert student.network is network
    assert not torch.equal(network[1].weight, before)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("truth", [False, True])
def test_logged_values_equal_those_by_hand(hard, truth):
    data, trainer, student = Data(hard, truth), Trainer(max_epochs=2, **SILENT), Student(linear, temperature=3.0)
    trainer.fit(student, data)
    with torch.no_grad():
        logits = student(data.x)
    predicted = logits.argmax(1)
    expected = {
        "val_loss": distillation_loss(logits, data.answers, 3.0),
        "val_fidelity": (predicted == data.x.flatten(1)[:, :3].argmax(1)).float().mean(),
    }
    if truth:
        expected["val_accuracy"] = (predicted == 0).float().mean()
    assert {name for name in trainer.callback_metrics if name.startswith("val")} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(trainer.callback_metrics[name], value, msg=name)
    if truth:
        (result,) = trainer.test(student, data, verbose=False)
        assert result["test_accuracy"] == pytest.approx(float(expected["val_accuracy"]))
        torch.testing.assert_close(torch.cat(trainer.predict(student, data)), logits)


def test_learning_rate_makes_one_cycle_by_default():
    rates = []

    class Watching(Student):
        def on_train_batch_end(self, *args):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    student = Watching(linear, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=2.0))
    Trainer(max_epochs=5, **SILENT).fit(student, Data())
    assert rates == pytest.approx([2 * one_cycle_factor(step, 20) for step in range(1, 21)])


def test_other_schedules():
    sgd = torch.optim.SGD
    student = Student(
        linear, 3, 1, optimizer=lambda p: sgd(p, 1.0), lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1)
    )
    trainer = Trainer(max_epochs=5, **SILENT)
    trainer.fit(student, Data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)

    student = Student(
        linear, 3, 1, optimizer=lambda p: sgd(p, 1.0),
        lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val_fidelity", mode="max", patience=0, threshold=10.0),
    )  # fmt: skip
    trainer = Trainer(max_epochs=3, **SILENT)
    trainer.fit(student, Data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)

    with pytest.raises(
        MisconfigurationException, match=r"one-cycle schedule needs an end: set the trainer's max_epochs"
    ):
        Trainer(max_epochs=-1, **SILENT).fit(Student(linear), Data())


def test_checkpoint_loads_without_the_data_module(tmp_path):
    student, trainer = Student(linear), Trainer(max_epochs=1, **SILENT)
    trainer.fit(student, Data())
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    loaded = Student.load_from_checkpoint(
        tmp_path / "student.ckpt", network=linear, num_classes=3, in_channels=1, weights_only=True
    )
    x = torch.randn(4, 1, 2, 2)
    assert torch.equal(loaded(x), student(x))


def test_misuse():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        Student(linear, temperature=0)
    with pytest.raises(MisconfigurationException, match=r"no network yet. Call configure_model\(\) first"):
        Student(linear)(torch.zeros(1, 1, 2, 2))
    with pytest.raises(
        MisconfigurationException, match=r"needs in_channels, which was not given.*Give Student in_channels="
    ):
        Student(linear, num_classes=3).configure_model()
    with pytest.raises(
        MisconfigurationException, match=r"needs num_classes.* no data module with num_classes is attached"
    ):
        Trainer(max_epochs=1, **SILENT).fit(Student(linear), Data().train_dataloader())
