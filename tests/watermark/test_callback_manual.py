"""Manual optimisation: refused with a remedy, and equal to the term written by hand where it is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from user_modules import (
    ALL_TERMS,
    CLASSES,
    UserModule,
    assert_clean,
    assert_same,
    callback,
    fit,
    make,
    recorded_draws,
    written_term,
)


class Manual(UserModule):
    plan = None

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__(dropout)
        self.automatic_optimization = False

    def written(self, loss: torch.Tensor) -> torch.Tensor:
        """In the twin, the loss with the term."""
        if self.plan is None:
            return loss
        draw = self.plan.get(self.trainer.fit_loop.total_batch_idx)
        return loss if draw is None else loss + written_term(self, self, draw, ALL_TERMS.weights)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.written(self.loss(batch)))
        optimizer.step()


class Adversarial(Manual):
    """Like a GAN: two networks, two optimisers, two losses a batch; the first is the classifier's."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__(dropout)
        self.critic = nn.Linear(CLASSES, 1)

    def training_step(self, batch, batch_idx):
        own, other = self.optimizers()
        x, y = batch
        logits = self(x)
        own.zero_grad()
        self.manual_backward(self.written(F.cross_entropy(logits, y) + self.critic(logits).mean()))
        own.step()
        other.zero_grad()
        self.manual_backward(-self.critic(logits.detach()).mean() + self.critic.weight.square().sum())
        other.step()

    def configure_optimizers(self):
        sgd = torch.optim.SGD
        return (
            sgd([*self.body.parameters(), *self.head.parameters()], lr=0.05, momentum=0.9),
            sgd(self.critic.parameters(), lr=0.05),
        )


class NoBackward(Manual):
    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            super().training_step(batch, batch_idx)


def half_with_scaler():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


@pytest.mark.parametrize(
    "flags", [dict, lambda: {"precision": "bf16-mixed"}, half_with_scaler], ids=["plain", "bf16-mixed", "fp16-scaler"]
)
@pytest.mark.parametrize("kind", [Manual, Adversarial, NoBackward])
def test_the_first_backward_of_a_batch_gets_the_term(kind, flags):
    module, twin, plain = make(kind), make(kind), make(kind)
    with recorded_draws() as draws:
        fit(module, [callback(manual_optimization=True)], **flags())
    assert len(draws) == 12
    twin.plan = dict(enumerate(draws))
    fit(twin, **flags())
    fit(plain, **flags())
    assert_same(module, twin)
    assert not torch.equal(module.head.weight, plain.head.weight)
    assert_clean(module)


def test_the_schedule_holds():
    module, twin = make(Manual), make(Manual)
    with recorded_draws() as draws:
        fit(module, [callback(manual_optimization=True, start=0.5, every_n_steps=2)])
    twin.plan = dict(zip([6, 8, 10], draws, strict=True))
    fit(twin)
    assert_same(module, twin)


def test_max_steps_counts_the_steps_of_all_optimisers():
    with recorded_draws() as draws:
        trainer = fit(make(Adversarial), [callback(manual_optimization=True, start=0.5)], max_steps=16)
    assert trainer.global_step == 16
    assert len(draws) == 4


def test_by_default_manual_optimisation_is_refused():
    module = make(Manual)
    with pytest.raises(MisconfigurationException) as error:
        fit(module, [callback()])
    assert "Manual optimises manually" in str(error.value)
    assert "manual_optimization=True" in str(error.value)
    assert "WatermarkLossMixin" in str(error.value)
    assert_clean(module)


def test_after_an_error_the_module_is_clean():
    class Breaking(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    module = make(Breaking)
    with pytest.raises(ZeroDivisionError):
        fit(module, [callback(manual_optimization=True)])
    assert_clean(module)


def test_the_option_does_nothing_to_automatic_optimisation():
    module, reference = make(UserModule), make(UserModule)
    fit(module, [callback(manual_optimization=True)])
    fit(reference, [callback()])
    assert_same(module, reference)
