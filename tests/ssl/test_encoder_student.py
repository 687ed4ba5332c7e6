"""The encoder student: losses in closed form, the vectorised views against a loop, the adapter, and whether it imitates."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from torch import nn

from meadef_lightning.data.augmentation import RandomShiftFlip
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.extraction import DistillationDataModule
from meadef_lightning.extraction.encoder_student import (
    EncoderStudent,
    feature_distance,
    imitation_loss,
    stolen_encoder_loss,
)
from meadef_lightning.oracle import HardLabel, Oracle, Totals
from meadef_lightning.oracle.policies import Features


class Noise(SplitDataModule):
    """Grey noise in four classes, 300 images for the attacker."""

    class_names = ("a", "b", "c", "d")
    image_shape = (1, 4, 4)

    def __init__(self):
        super().__init__(batch_size=50, victim_size=100, attacker_size=300, verification_size=20, validation_size=20)

    def load(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (760, 1, 4, 4), generator=generator, dtype=torch.uint8)
        labels = torch.arange(760) % 4
        return TensorImages(images[:560], labels[:560]), TensorImages(images[560:], labels[560:])


def linear(features, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, features))


def victim(features=6):
    generator = torch.Generator().manual_seed(3)
    network = linear(features, 1)
    with torch.no_grad():
        network[1].weight.normal_(generator=generator)
    return network


def test_distances_in_closed_form():
    f, answers = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 0.0]])
    root = math.sqrt(2 - math.sqrt(2))  # unit vectors 45 degrees apart
    torch.testing.assert_close(feature_distance(f, answers, "l2"), torch.tensor([0.0, root, 2.0]))
    torch.testing.assert_close(feature_distance(f, answers, "cosine"), torch.tensor([0.0, 1 - math.sqrt(0.5), 2.0]))
    torch.testing.assert_close(feature_distance(f, answers, "mse"), torch.tensor([2.0, 8.5, 4.5]))
    assert imitation_loss(f, answers).item() == pytest.approx((root + 2) / 3)


def test_a_perfect_student_has_finite_gradients():
    answers = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    features = answers.clone().requires_grad_()
    for distance in ("l2", "cosine", "mse"):
        (gradient,) = torch.autograd.grad(imitation_loss(features, answers, distance), features)
        assert gradient.isfinite().all()


def test_stolen_encoder_loss_equals_the_papers_double_sum():
    generator = torch.Generator().manual_seed(1)
    f, views, answers = (torch.randn(*shape, 5, generator=generator) for shape in ((7,), (3, 7), (7,)))

    def unit(v):
        return v / np.linalg.norm(v)

    total = 0.0
    for i in range(7):
        target = unit(answers[i].double().numpy())
        total += np.linalg.norm(unit(f[i].double().numpy()) - target)
        total += 9 / 3 * sum(np.linalg.norm(unit(views[j, i].double().numpy()) - target) for j in range(3))
    loss = stolen_encoder_loss(f, views, answers, weight=9.0)
    assert loss.item() == pytest.approx(total / 7, rel=1e-6)
    twice = stolen_encoder_loss(f.repeat(2, 1), views.repeat(1, 2, 1), answers.repeat(2, 1), weight=9.0)
    torch.testing.assert_close(twice, loss)  # a batch twice as large has the same loss


@pytest.mark.parametrize(
    ("features", "answers"),
    [((4, 3), torch.zeros(4, 5)), ((4, 3), torch.zeros(4, dtype=torch.int64)), ((4, 3), torch.zeros(5, 3))],
)
def test_answers_of_another_form(features, answers):
    with pytest.raises(ValueError, match=r"student gives features of shape \(4, 3\).*answer_dim"):
        imitation_loss(torch.zeros(features), answers)


class Recorded(nn.Module):
    """Adds noise of its own to every image, and keeps what it gave."""

    def forward(self, x):
        self.given = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        return self.given


def test_step_equals_a_loop_over_samples_and_views(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    x, answers = torch.randn(5, 1, 4, 4, generator=generator), torch.randn(5, 6, generator=generator)
    student = EncoderStudent(victim(), feature_dim=6, augmentation=Recorded(), views=3, weight=2.0)
    monkeypatch.setattr(student, "log", lambda *args, **kwargs: None)
    loss = student.training_step((x, answers))
    gradient = torch.autograd.grad(loss, student.network[1].weight)[0]
    views = student.augmentation.given.unflatten(0, (3, 5))
    assert not torch.equal(views[0], views[1])
    slow = torch.zeros(())
    for i in range(5):
        slow = slow + feature_distance(student(x[i : i + 1]), answers[i : i + 1]).sum()
        for j in range(3):
            slow = slow + 2.0 / 3 * feature_distance(student(views[j, i : i + 1]), answers[i : i + 1]).sum()
    torch.testing.assert_close(loss, slow / 5)
    torch.testing.assert_close(gradient, torch.autograd.grad(slow / 5, student.network[1].weight)[0])


@pytest.mark.parametrize("options", [{}, {"augmentation": RandomShiftFlip(0)}, {"feature_dim": 9}, {"distance": "mse"}])
def test_student_imitates_through_the_existing_distillation_data(options):
    seed_everything(0, verbose=False)
    attack = DistillationDataModule(Oracle(victim(), Features()), Noise(), batch_size=32)
    student = EncoderStudent(linear, optimizer=lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0), **options)
    trainer = Trainer(max_epochs=12, **SILENT)
    trainer.fit(student, attack)
    assert trainer.callback_metrics["val_cosine"] > (0.9 if "distance" in options else 0.98)
    assert attack.oracle.ledger.totals() == Totals(300, 300)
    assert (student.adapter is None) == ("feature_dim" not in options)
    assert student.feature_dim == options.get("feature_dim", 6)
    x = torch.randn(3, 1, 4, 4)
    assert student(x).shape == (3, student.feature_dim)
    assert student.imitate(x).shape == (3, 6)
    # a copy that no data module tells anything
    copied = EncoderStudent(linear, **{"feature_dim": 6, **options})
    copied.build_network(in_channels=1)
    copied.load_state_dict(student.state_dict())
    assert torch.equal(copied.imitate(x), student.imitate(x))


def test_data_tells_the_width_only_when_answers_are_features():
    attack = DistillationDataModule(Oracle(victim(), Features()), Noise())
    assert attack.feature_dim is None
    attack.setup("fit")
    assert attack.feature_dim == 6
    labels = DistillationDataModule(Oracle(victim(), HardLabel()), Noise())
    labels.setup("fit")
    assert labels.feature_dim is None
    with pytest.raises(MisconfigurationException, match="needs feature_dim"):
        Trainer(max_epochs=1, **SILENT).fit(EncoderStudent(linear), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l1"}, "distance='l1' is none of"),
        ({"views": 0}, "views=0 must be at least 1"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"answer_dim": 0}, "answer_dim=0 must be at least 1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderStudent(linear, **options)


def test_augmentations_that_change_the_shape():
    student = EncoderStudent(linear, augmentation=nn.AvgPool2d(2))
    with pytest.raises(
        ValueError, match=r"batch of shape \(2, 1, 4, 4\) to one tensor of this shape, got \(2, 1, 2, 2\)"
    ):
        student.augmented(torch.zeros(2, 1, 4, 4))
