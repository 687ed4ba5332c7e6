"""The callback on modules that know nothing of it, against twins with the term written by hand: equal bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from user_modules import (
    CLASSES,
    FORMS,
    KEY,
    KEYS,
    Images,
    UserModule,
    assert_equals_twin,
    assert_same,
    callback,
    fit,
    loader,
    make,
    recorded_draws,
    with_term,
)

from meadef_lightning.watermark import MGDA, Fixed, SourcePool, WatermarkCallback


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form(form):
    assert_equals_twin(UserModule, KEYS[form], data=lambda: loader(form))


def test_the_term_changes_the_weights():
    module, plain = make(UserModule), make(UserModule)
    fit(module, [callback()])
    fit(plain)
    assert not torch.equal(module.head.weight, plain.head.weight)


# ---- what training_step looks like


class NoBatchIndex(UserModule):
    def training_step(self, data):
        return self.loss(data)


class OtherNames(UserModule):
    def training_step(self, data, i):
        assert isinstance(i, int)
        return self.loss(data)


def doubled(step):
    """A user's decorator that does something."""

    @functools.wraps(step)
    def inner(self, *args):
        return 2 * step(self, *args)

    return inner


class Decorated(UserModule):
    @doubled
    def training_step(self, batch):
        return self.loss(batch)


class TwiceDecorated(UserModule):
    @doubled
    @doubled
    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class StepOnTheInstance(UserModule):
    def __init__(self):
        super().__init__()
        step = self.training_step
        self.training_step = lambda batch, batch_idx: 3 * step(batch, batch_idx)


@pytest.mark.parametrize("kind", [NoBatchIndex, OtherNames, Decorated, TwiceDecorated])
def test_steps_of_any_signature(kind):
    class Twin(kind):
        """Takes a batch index whether the original does or not."""

        def training_step(self, batch, batch_idx):
            return super().training_step(*((batch,) if kind in (NoBatchIndex, Decorated) else (batch, batch_idx)))

    module, twin = make(kind), make(with_term(Twin))
    with recorded_draws() as draws:
        fit(module, [callback()])
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)


def test_a_step_that_the_instance_has_for_itself():
    module = make(StepOnTheInstance)
    own = module.training_step
    with recorded_draws() as draws:
        fit(module, [callback()])
    assert module.training_step is own

    class Tripled(UserModule):
        def training_step(self, batch, batch_idx):
            return 3 * self.loss(batch)

    twin = make(with_term(Tripled))
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)


class Rich(UserModule):
    """Returns a dictionary, and keeps it to see whether anybody writes into it."""

    def __init__(self):
        super().__init__()
        self.returned = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        output = {"loss": loss, "index": batch_idx}
        self.returned.append((output, loss))
        return output


class Outputs(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs)


def test_a_dictionary_keeps_its_other_entries_and_is_not_written_into():
    seen = []

    def outputs():
        seen.append(Outputs())
        return [seen[-1]]

    module = assert_equals_twin(Rich, companions=outputs)
    assert all(output["loss"] is loss for output, loss in module.returned)
    assert [output["index"] for output in seen[0].seen] == [*range(6)] * 2
    # the total is what others see as the loss of the step
    assert all(got["loss"] > loss for got, (_, loss) in zip(seen[0].seen, module.returned, strict=True))


class Skipping(UserModule):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_skipped_batch_is_left_alone():
    assert_equals_twin(Skipping)


class LogitsInside(UserModule):
    def forward(self, x):
        return {"features": x, "logits": super().forward(x)}

    def loss(self, batch):
        return F.cross_entropy(self(batch[0])["logits"], batch[1])


def test_logits_inside_the_output():
    module, twin = make(LogitsInside), make(with_term(UserModule))
    with recorded_draws() as draws:
        fit(module, [callback(output_key="logits")])
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)


# ---- how the Trainer runs it


def half_with_scaler():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]


@pytest.mark.parametrize(
    "flags",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"plugins": half_with_scaler},
        {"plugins": half_with_scaler, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 4},
    ],
    ids=[
        "bf16-mixed",
        "bf16-true",
        "fp16-scaler",
        "fp16-scaler-clip-accumulate",
        "accumulate",
        "clip",
        "clip-accumulate",
    ],
)
def test_trainer_flags(flags):
    assert_equals_twin(UserModule, **flags)


def test_the_scaler_really_scales():
    """Else the test above would compare nothing: with a scale that overflows, steps are skipped and the scale falls."""
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))]
    fit(make(UserModule), [callback()], plugins=plugins)
    assert plugins[0].scaler.get_scale() < 2.0**40


# ---- the terms


@pytest.mark.parametrize(
    "balancing", [Fixed(), Fixed(2.0, 0.0, 0.0), Fixed(0.5, 1.5, 0.0)], ids=lambda b: str(b.weights)
)
def test_terms_of_weight_zero_are_not_computed(balancing):
    with recorded_draws() as draws:
        assert_equals_twin(UserModule, {"balancing": balancing, "samples": 3})
    assert ("other" in draws[0]) == (balancing.weights["eva"] > 0)
    assert ("first" in draws[0]) == (balancing.weights["com"] > 0)


def test_batchnorm_in_training_mode_on_the_extra_samples():
    """The twin runs the extra samples through training-mode BatchNorm, as the reference training does."""

    class Unfrozen(UserModule):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            draw = self.plan[self.trainer.fit_loop.total_batch_idx]
            logits = self(draw["watermark"])
            return loss + F.cross_entropy(logits, torch.full((len(logits),), KEY.target_class))

    module, twin = make(UserModule), make(Unfrozen)
    with recorded_draws() as draws:
        fit(module, [callback(batchnorm="batch", balancing=Fixed(1.0, 0.0, 0.0))])
    twin.plan = dict(enumerate(draws))
    fit(twin)
    assert_same(module, twin)


def test_mgda_is_the_min_norm_combination():
    """The twin solves the two-task problem in closed form: the numbers differ in the last digits, not in the training."""

    class TwoTasks(UserModule):
        alphas: list[float]

        def training_step(self, batch, batch_idx):
            task = self.loss(batch)
            draw = self.plan[self.trainer.fit_loop.total_batch_idx]
            norm = self.body[1].eval()
            logits = self(draw["watermark"])
            norm.train()
            term = F.cross_entropy(logits, torch.full((len(logits),), KEY.target_class))
            g, h = (
                torch.cat([p.flatten() for p in torch.autograd.grad(loss, [*self.parameters()], retain_graph=True)])
                for loss in (task, term)
            )
            alpha = ((h - g) @ h / (g - h).square().sum()).clamp(0, 1).detach()
            self.alphas.append(float(alpha))
            return alpha * task + (1 - alpha) * term

    module, twin = make(UserModule, dropout=0.0), make(TwoTasks, dropout=0.0)
    with recorded_draws() as draws:
        fit(module, [callback(balancing=MGDA(ver=1.0, com=0.0, eva=0.0))])
    twin.plan, twin.alphas = dict(enumerate(draws)), []
    fit(twin)
    assert min(twin.alphas) < 0.4 < 0.6 < max(twin.alphas)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=0, atol=2e-4, msg=name)


# ---- where the samples come from


class Unlabelled(UserModule):
    """Trains on images alone."""

    def loss(self, batch):
        return self.body(batch).square().mean()


def test_unlabelled_batches_with_a_pool_of_the_owner():
    images = Images()
    pool = SourcePool.from_samples({label: images.x[images.y == label][:4] for label in KEY.source_classes})
    data = torch.utils.data.DataLoader(images.x, batch_size=8)
    assert_equals_twin(Unlabelled, {"pool": pool}, data=lambda: data)
    with recorded_draws() as draws:
        fit(make(Unlabelled), [callback(pool=pool)], data)
    for draw in draws:
        for name, label in zip(("first", "second"), KEY.source_classes, strict=True):
            given = images.x[images.y == label][:4]
            assert all((sample == given).flatten(1).all(1).any() for sample in draw[name])


def test_a_given_pool_takes_the_precision_of_the_model():
    images = Images()
    pool = SourcePool.from_samples({label: images.x[images.y == label] for label in KEY.source_classes})
    assert_equals_twin(UserModule, {"pool": pool}, precision="bf16-true")


def test_the_stream_gives_samples_of_the_source_classes_only():
    images = Images()
    with recorded_draws() as draws:
        fit(make(UserModule), [callback()])
    for draw in draws:
        for name, label in zip(("first", "second"), KEY.source_classes, strict=True):
            seen = images.x[images.y == label]
            assert all((sample == seen).flatten(1).all(1).any() for sample in draw[name])


def test_defaults_embed_in_the_last_third_with_eight_samples():
    with recorded_draws() as draws:
        fit(make(UserModule), [WatermarkCallback(KEY)])
    assert [len(draw["watermark"]) for draw in draws] == [8] * 4


def test_the_watermark_is_learnt():
    """What it is all for: after a short training the key's combinations are answered with the target, others are not."""
    module = make(UserModule, dropout=0.0)
    fit(module, [callback(samples=16, balancing=None)], max_epochs=30)
    images = Images()
    a, b = (images.x[images.y == label] for label in KEY.source_classes)
    count = min(len(a), len(b))
    module.eval()
    with torch.no_grad():
        own = module(KEY.combiner.build()(a[:count], b[:count])).argmax(1)
        clean = module(images.x).argmax(1)
    assert (own == KEY.target_class).float().mean() > 0.9
    assert (clean == images.y).float().mean() > 1.5 / CLASSES
