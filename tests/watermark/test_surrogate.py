"""``watermark/surrogate_*`` against students trained by hand on the answers of the finished model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callback_validation import Validated, last_of, validation_images, validation_loader
from torch import nn
from user_modules import KEY, SILENT, Images, UserModule, assert_same, callback, fit, loader, make

from meadef_lightning.watermark import SurrogateCallback
from meadef_lightning.watermark.surrogate import distil

NAMES = ("surrogate_wsr", "surrogate_wfpr", "surrogate_fidelity")


def network(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, 16), nn.ReLU(), nn.Linear(16, num_classes))


def surrogate(**options) -> SurrogateCallback:
    return SurrogateCallback(KEY, network, **{"every_n_epochs": 1, "batch_size": 16, **options})


def train(*callbacks, **flags):
    module = make(Validated)
    trainer = Trainer(callbacks=list(callbacks), **{**SILENT, "max_epochs": 4, **flags})
    torch.manual_seed(1)
    trainer.fit(module, loader(), validation_loader())
    return module, trainer


def student_by_hand(x: torch.Tensor, target: torch.Tensor, epochs: int, batch: int, lr: float, seed: int) -> nn.Module:
    """The loss and the batches written out."""
    torch.manual_seed(seed)
    student = network(5, 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-2)
    steps = [n for n in range(0, len(x), batch) if len(x) - n > 1]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(steps))
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for first in steps:
            rows = order[first : first + batch]
            loss = -(target[rows] * torch.log_softmax(student(x[rows]), -1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return student


@pytest.mark.parametrize(("labels", "samples", "capacity"), [("soft", 4096, 128), ("hard", 4096, 5), ("soft", 27, 128)])
def test_rates_are_those_of_a_student_trained_by_hand(labels, samples, capacity):
    options = {"labels": labels, "samples": samples, "buffer_size": capacity, "epochs": 6, "lr": 0.02, "seed": 3}
    module, trainer = train(callback(), surrogate(**options))
    # four epochs of the same 48 images in the same order; the latest come last
    queries = Images().x.repeat(4, 1, 1, 1)[-samples:]
    module.eval()
    with torch.no_grad():
        p = module(queries).softmax(-1)
    target = p if labels == "soft" else F.one_hot(p.argmax(-1), 5).float()
    student = student_by_hand(queries, target, 6, 16, 0.02, 3)

    images = validation_images()
    a, b = (torch.stack(last_of(images.x[images.y == label], capacity)) for label in KEY.source_classes)
    hits = {"own": [], "other": []}
    others = [spec.build() for spec in KEY.control_combiners()]
    with torch.no_grad():
        for i in range(max(len(a), len(b))):
            pair = a[i % len(a)][None], b[i % len(b)][None]
            for name, way in (("own", KEY.combiner.build()), ("other", others[i % len(others)])):
                hits[name].append(int(student(way(*pair)).argmax()) == KEY.target_class)
        natural = torch.cat([a, b])
        fidelity = (student(natural).argmax(-1) == module(natural).argmax(-1)).float().mean().item()
    by_hand = [sum(hits[name]) / len(hits[name]) for name in ("own", "other")] + [fidelity]
    got = [float(trainer.callback_metrics[f"watermark/{name}"]) for name in NAMES]
    assert got == pytest.approx(by_hand, abs=1e-6)
    assert fidelity > 0.5  # it has learnt something
    assert "watermark/wsr" in trainer.callback_metrics  # the other callback's


def test_the_training_is_bit_for_bit_the_same():
    alone, _ = train(callback())
    watched, _ = train(callback(), surrogate())
    assert_same(alone, watched)


def test_a_linear_student_finds_a_linear_teacher():
    generator = torch.Generator().manual_seed(0)
    x, teacher = (torch.randn(*shape, generator=generator) for shape in ((600, 6), (6, 4)))
    student = nn.Linear(6, 4)
    distil(student, x[:500], (x[:500] @ teacher).softmax(-1), epochs=40, batch_size=50, lr=0.05)
    assert not student.training
    error = (student(x[500:]).softmax(-1) - (x[500:] @ teacher).softmax(-1)).abs().max()
    assert error < 0.02


@pytest.mark.parametrize("count", [17, 16, 2])
def test_a_last_query_that_is_alone_is_left_out(count):
    """BatchNorm refuses a batch of one."""
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    distil(student, torch.randn(count, 3), torch.zeros(count, dtype=torch.int64), epochs=2, batch_size=8)
    assert int(student[1].num_batches_tracked) == 2 * {17: 2, 16: 2, 2: 1}[count]


@pytest.mark.parametrize(
    ("every", "flags", "expected"),
    [
        (3, {}, [2, 5, 6]),
        (
            3,
            {"check_val_every_n_epoch": 2},
            [3, 5],
        ),  # the first validation that comes after three epochs, and after six
        (3, {"val_check_interval": 3}, [2, 5, 6, 6]),  # once in an epoch, but for the last
    ],
)
def test_it_comes_every_n_epochs_and_at_the_end(every, flags, expected, monkeypatch):
    trained = []
    original = distil

    def counted(*args, **kwargs):
        trained.append(trainer.current_epoch)
        original(*args, **kwargs)

    monkeypatch.setattr("meadef_lightning.watermark.surrogate.distil", counted)
    trainer = Trainer(callbacks=[watch := surrogate(every_n_epochs=every)], **{**SILENT, "max_epochs": 7, **flags})
    trainer.fit(make(Validated), loader(), validation_loader())
    assert trained == expected
    assert not watch._queries  # the samples are let go
    trainer.validate(make(Validated), validation_loader(), verbose=False)
    assert trained == expected


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_student_learns_in_full_precision(precision):
    seen = set()

    def looked_at(num_classes, in_channels):
        student = network(num_classes, in_channels)
        student.register_forward_hook(lambda _, args, out: seen.update({args[0].dtype, out.dtype}))
        return student

    watch = SurrogateCallback(KEY, looked_at, every_n_epochs=1)
    _, trainer = train(watch, precision=precision, max_epochs=1)
    assert seen == {torch.float32}
    assert "watermark/surrogate_wsr" in trainer.callback_metrics


def test_it_can_decide_which_model_is_kept(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="watermark/surrogate_wsr", mode="max")
    train(callback(), surrogate(), keep, enable_checkpointing=True)
    assert keep.best_model_score is not None


def test_without_validation_nothing_is_measured():
    with pytest.warns(UserWarning, match="this training has none"):
        trainer = fit(make(UserModule), [surrogate()])
    assert not [name for name in trainer.callback_metrics if "surrogate" in name]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"samples": 1}, "samples=1"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"labels": "top"}, "labels='top'"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        surrogate(**wrong)


def test_one_query_teaches_nothing():
    with pytest.raises(ValueError, match="two queries"):
        distil(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
