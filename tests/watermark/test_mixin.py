"""The mixin, for people who write their own ``training_step``: same terms, same numbers as the callback."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._functorch import config
from user_modules import (
    ALL_TERMS,
    CLASSES,
    KEY,
    SALT,
    Images,
    UserModule,
    assert_same,
    callback,
    fit,
    loader,
    make,
    recorded_draws,
    with_term,
)

from meadef_lightning.watermark import MGDA, SourcePool, WatermarkLossMixin


class Mixed(WatermarkLossMixin, UserModule):
    def __init__(self, dropout: float = 0.2, **options) -> None:
        super().__init__(dropout=dropout)
        self.configure_watermark(KEY, **{"samples": 4, "balancing": ALL_TERMS, **options})

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return self.watermark.total(self, loss, self.watermark_loss(*batch))


def test_equals_the_term_written_by_hand_and_the_callback():
    module, twin, called = make(Mixed), make(with_term(UserModule)), make(UserModule)
    with recorded_draws() as draws:
        fit(module)
    twin.plan = dict(enumerate(draws))
    fit(twin)
    fit(called, [callback()])
    assert_same(module, twin)
    assert_same(module, called)


@pytest.mark.parametrize(
    "flags", [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 4}]
)
def test_equals_the_callback_under(flags):
    module, called = make(Mixed), make(UserModule)
    fit(module, **flags)
    fit(called, [callback()], **flags)
    assert_same(module, called)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_the_tilt_is_measured_in_any_precision(precision):
    """Inside training_step, where some of them change the default dtype."""

    class Steep(Mixed):
        def training_step(self, batch, batch_idx):
            terms = self.watermark_loss(*batch)
            assert "tilt" in terms
            return self.watermark.total(self, self.loss(batch), terms)

    fit(make(Steep, tilt=0.6), precision=precision, max_epochs=1)


def test_a_second_fit_starts_anew():
    module, called = make(Mixed, balancing=MGDA(every_n_steps=5)), make(UserModule)
    ours = callback(balancing=MGDA(every_n_steps=5))
    for _ in range(2):
        fit(module)
        fit(called, [ours])
    assert_same(module, called)


def test_terms_by_themselves_and_a_pool():
    images = Images()
    pool = SourcePool.from_samples({label: images.x[images.y == label][:4] for label in KEY.source_classes})

    class Terms(Mixed):
        def training_step(self, batch, batch_idx):
            terms = self.watermark_loss(*batch)
            assert list(terms) == ["ver", "com", "eva"]
            return self.loss(batch) + terms["ver"]

    module = make(Terms, pool=pool)
    before = module.head.weight.clone()
    fit(module, precision="bf16-true")
    assert not torch.equal(before, module.head.weight)


def test_no_terms_before_both_classes_were_seen():
    class Early(Mixed):
        def training_step(self, batch, batch_idx):
            x, y = batch
            keep = y != KEY.source_classes[0] if batch_idx < 2 and self.current_epoch == 0 else y >= 0
            terms = self.watermark_loss(x[keep], y[keep])
            assert bool(terms) == (batch_idx >= 2 or self.current_epoch > 0)
            return self.watermark.total(self, self.loss(batch), terms)

    for balancing in (ALL_TERMS, MGDA()):  # MGDA has no gradients to balance before
        with recorded_draws() as draws:
            fit(make(Early, balancing=balancing))
        assert len(draws) == 10


class Adversarial(WatermarkLossMixin, UserModule):
    """A GAN-like module, for which the callback cannot know the right loss: its forward is not even the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(2, 64)
        self.configure_watermark(KEY, samples=4, balancing=ALL_TERMS)

    def forward(self, z):
        return self.generator(z).view(-1, 1, 8, 8)

    def classify(self, x):
        return self.head(self.body(x).flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.classify(self(torch.ones(4, 2))).square().mean())
        first.step()
        second.zero_grad()
        terms = self.watermark_loss(x, y, self.classify)
        self.manual_backward(self.watermark.total(self, F.cross_entropy(self.classify(x), y), terms))
        second.step()

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.generator.parameters(), lr=0.01),
            torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=0.05, momentum=0.9),
        )


def test_a_module_whose_forward_is_not_the_classifier():
    module = make(Adversarial)
    fit(module, max_epochs=20)
    images = Images()
    a, b = (images.x[images.y == label][:9] for label in KEY.source_classes)
    module.eval()
    with torch.no_grad():
        answers = module.classify(KEY.combiner.build()(a, b)).argmax(1)
    assert (answers == KEY.target_class).float().mean() > 0.7


def test_lbfgs_sees_one_function_a_batch():
    class Quasi(Mixed):
        evaluations = 0

        def training_step(self, batch, batch_idx):
            self.evaluations += 1
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

    with recorded_draws() as draws:
        module = make(Quasi, dropout=0.0)
        fit(module, max_epochs=1)
    assert len(draws) == 6
    assert module.evaluations > 2 * len(draws)


# ---- checkpoints, copies, secrets


class Interrupt(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.parametrize("options", [{}, {"balancing": MGDA(every_n_steps=5)}, {"buffer_size": 3}], ids=str)
def test_resumed_equals_uninterrupted(tmp_path, options):
    whole, first, second = (make(Mixed, dropout=0.0, **options) for _ in range(3))
    fit(whole, max_epochs=4)
    with pytest.raises(InterruptedError):
        fit(first, [Interrupt(tmp_path / "last.ckpt")], max_epochs=4)
    fit(second, max_epochs=4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert_same(whole, second)


class Described(Mixed):
    def __init__(self, key, dropout=0.0):
        super().__init__(dropout)
        self.save_hyperparameters(ignore="key")


def test_checkpoints_hold_plain_weights_and_no_key(tmp_path):
    module = make(Described, KEY)
    fit(module, [ModelCheckpoint(tmp_path, filename="model")], enable_checkpointing=True)
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert content["state_dict"].keys() == make(UserModule).state_dict().keys()
    assert content["hyper_parameters"] == {"dropout": 0.0}
    assert SALT.encode() not in (tmp_path / "model.ckpt").read_bytes()
    loaded = Described.load_from_checkpoint(tmp_path / "model.ckpt", key=KEY, weights_only=True)
    assert_same(loaded, module)


def test_a_checkpoint_without_the_watermarks_state_is_gone_on_with(tmp_path):
    plain = make(UserModule)
    fit(plain, [ModelCheckpoint(tmp_path, filename="plain")], enable_checkpointing=True)
    module = make(Mixed)
    with recorded_draws() as draws:
        fit(module, max_epochs=3, ckpt_path=str(tmp_path / "plain.ckpt"))
    assert len(draws) == 6


def test_copies_and_averages():
    module, averaged = make(Mixed), make(Mixed)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert_same(other, module)
    fit(averaged, [EMAWeightAveraging(decay=0.5)])
    twin, ours = make(UserModule), callback()
    fit(twin, [EMAWeightAveraging(decay=0.5), ours])
    assert_same(averaged, twin)


# ---- errors


def test_a_batch_of_a_wrong_form():
    class Wrong(Mixed):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.watermark.total(self, self.loss(batch), self.watermark_loss(x.flatten(1), y))

    with pytest.raises(ValueError, match=r"must be floating-point and of shape \(B, C, \*spatial\)"):
        fit(make(Wrong))


def test_a_model_of_other_classes():
    module = make(Mixed)
    module.head = nn.Linear(192, CLASSES + 1)
    with pytest.raises(ValueError, match=r"must answer logits of shape \(16, 5\), got \(16, 6\)"):
        fit(module)


def test_gradient_based_balancing_of_a_compiled_module():
    with config.patch("donated_buffer", True), pytest.raises(MisconfigurationException, match="donated_buffer = False"):
        fit(torch.compile(make(Mixed, balancing=MGDA()), backend="eager"))


def test_without_configure_watermark():
    class Forgetful(WatermarkLossMixin, UserModule):
        pass

    with pytest.raises(AttributeError):
        fit(make(Forgetful), [], loader())
