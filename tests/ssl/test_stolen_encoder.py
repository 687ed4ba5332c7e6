"""StolenEncoder's transfer set: exact counts, also after a restart, and what the student gets."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

from meadef_lightning.data.augmentation import RandomShiftFlip
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.extraction import DistillationDataModule
from meadef_lightning.extraction.encoder_student import EncoderStudent
from meadef_lightning.extraction.stolen_encoder import StolenEncoderDataModule, planned_queries
from meadef_lightning.oracle import BudgetExceededError, Oracle, QueryLedger, Soft, Totals
from meadef_lightning.oracle.policies import Features


class Blobs(SplitDataModule):
    """Coarse random images, which survive a shift of a pixel, 200 of them for the attacker."""

    class_names = ("a", "b", "c", "d")
    image_shape = (1, 8, 8)

    def __init__(self):
        super().__init__(batch_size=50, victim_size=100, attacker_size=200, verification_size=20, validation_size=20)

    def load(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (560, 1, 2, 2), generator=generator, dtype=torch.uint8)
        images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        labels = torch.arange(560) % 4
        return TensorImages(images[:360], labels[:360]), TensorImages(images[360:], labels[360:])


class Victim(nn.Module):
    """Features of four quarters' means; counts the rows it is asked, and dies on demand."""

    def __init__(self, lives=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
        self.asked, self.lives = 0, lives

    def forward(self, x):
        if self.lives is not None and self.asked >= self.lives:
            raise KeyboardInterrupt
        self.asked += len(x)
        return nn.functional.avg_pool2d(x, 4).flatten(1) @ self.weight


def network(features, channels):
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * channels, features))


def test_every_image_is_asked_once_and_views_never():
    seed_everything(0, verbose=False)
    victim = Victim()
    attack = StolenEncoderDataModule(Oracle(victim, Features(), batch_size=64), Blobs(), batch_size=32)
    student = EncoderStudent(
        network, feature_dim=5, augmentation=RandomShiftFlip(1), views=2, weight=1.0,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.03),
    )  # fmt: skip
    trainer = Trainer(max_epochs=15, **SILENT)
    trainer.fit(student, attack)
    assert victim.asked == attack.queries_spent == planned_queries(200) == 200
    assert attack.oracle.ledger.totals() == Totals(200, 200)
    assert trainer.callback_metrics["val_cosine"] > 0.9
    x, _ = attack.data.tensors("test")
    with torch.no_grad():
        assert cosine_similarity(student.eval().imitate(x), victim(x)).mean() > 0.9
    summary = attack.query_summary()
    assert (summary["labels"], summary["queries"], summary["augmented"]) == ("feature", 200, False)


def test_directions_are_kept_in_memory_and_answers_in_the_ledger():
    oracle = Oracle(Victim(), Features())
    attack = StolenEncoderDataModule(oracle, Blobs(), batch_size=400, validation_fraction=0)
    attack.setup("fit")
    (x, answers), *_ = attack.train_dataloader()
    raw = oracle.query(x)
    torch.testing.assert_close(answers, normalize(raw, dim=1))
    assert not torch.allclose(raw.norm(dim=1), torch.ones(len(x)))
    assert attack.feature_dim == 6


def test_nothing_is_asked_twice_after_an_interruption(tmp_path):
    data, first, second = Blobs(), Victim(lives=128), Victim()
    broken = StolenEncoderDataModule(Oracle(first, Features(), QueryLedger(tmp_path / "l"), batch_size=64), data)
    with pytest.raises(KeyboardInterrupt):
        broken.setup("fit")
    assert first.asked == 128
    again = StolenEncoderDataModule(Oracle(second, Features(), QueryLedger(tmp_path / "l"), batch_size=64), data)
    again.setup("fit")
    assert second.asked == 200 - 128
    # a third run, and plain imitation on the same pool, cost nothing
    for kind in (StolenEncoderDataModule, DistillationDataModule):
        third = Victim()
        other = kind(Oracle(third, Features(), QueryLedger(tmp_path / "l", budget=200)), data)
        other.setup("fit")
        assert third.asked == 0
        assert other.queries_spent == 200


def test_the_budget_is_checked_before_anything_is_asked():
    victim = Victim()
    attack = StolenEncoderDataModule(Oracle(victim, Features(), QueryLedger(budget=199)), Blobs())
    with pytest.raises(BudgetExceededError):
        attack.setup("fit")
    assert victim.asked == 0
    fewer = StolenEncoderDataModule(Oracle(victim, Features(), QueryLedger(budget=199)), Blobs(), queries=50)
    fewer.setup("fit")
    assert victim.asked == 50


def test_planned_queries():
    assert planned_queries(1000, views=9, epochs=100) == 1000
    assert planned_queries(1000, views=9, epochs=100, ask_views=True) == 901_000
    with pytest.raises(ValueError, match="images=0"):
        planned_queries(0)


def test_a_classifier_is_refused_before_it_is_asked():
    victim = Victim()
    with pytest.raises(MisconfigurationException, match=r"gives soft answers. Give the oracle the policy Features"):
        StolenEncoderDataModule(Oracle(victim, Soft()), Blobs()).setup("fit")
    assert victim.asked == 0
