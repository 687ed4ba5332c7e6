"""Beside Lightning's own callbacks: finders, weight averaging, optimisers that evaluate a step several times."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from user_modules import (
    SILENT,
    UserModule,
    assert_clean,
    assert_equals_twin,
    assert_same,
    callback,
    fit,
    loader,
    make,
    recorded_draws,
    with_term,
)

from meadef_lightning.watermark import MGDA

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def _in_tmp_path(tmp_path, monkeypatch):
    """The finders write a checkpoint into the working directory."""
    monkeypatch.chdir(tmp_path)


class Loading(UserModule):
    """Has its own loader, of a batch size that a finder may change."""

    def train_dataloader(self):
        self.sizes = [*getattr(self, "sizes", []), self.batch_size]
        return loader(batch_size=self.batch_size)


# ---- the learning-rate finder


def find(module: UserModule, callbacks: list) -> list[float]:
    trainer = Trainer(max_epochs=4, callbacks=callbacks, **SILENT)
    seed_everything(1, verbose=False)
    finder = Tuner(trainer).lr_find(module, loader(), num_training=20, max_lr=0.1, update_attr=False)
    return finder.results["loss"]


@pytest.mark.usefixtures("_in_tmp_path")
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_learning_rate_finder_sees_the_term_in_every_step(start):
    module, twin, plain = make(UserModule), make(with_term(UserModule)), make(UserModule)
    with recorded_draws() as draws:
        losses = find(module, [callback(start=start)])
    assert len(draws) == 20
    assert_clean(module)
    assert_same(module, plain)  # the finder gives the weights back
    twin.plan = dict(enumerate(draws))
    assert losses == find(twin, [])
    assert losses != find(plain, [])


@pytest.mark.usefixtures("_in_tmp_path")
@pytest.mark.parametrize(
    "finder",
    [lambda: LearningRateFinder(num_training_steps=10), lambda: BatchSizeFinder("power", 2, 4, 2)],
    ids=["lr", "size"],
)
def test_a_training_after_a_finder_equals_one_without(finder):
    """Nothing that the finder's steps collected, drew or solved is left."""
    options = {"balancing": MGDA(every_n_steps=4), "start": 0.25}
    found, reference = make(Loading), make(Loading)
    seed_everything(1, verbose=False)
    search = finder()
    trainer = Trainer(max_epochs=2, callbacks=[callback(**options), search], **SILENT)
    with recorded_draws() as draws:
        trainer.fit(found)
    reference.lr, reference.batch_size = found.lr, found.batch_size
    with recorded_draws() as expected:
        fit(reference, [callback(**options)], reference.train_dataloader())
    tail = draws[-len(expected) :]
    assert len(draws) > len(expected)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(tail, expected, strict=True) for name in b)
    assert_clean(found)


@pytest.mark.usefixtures("_in_tmp_path")
def test_after_an_error_inside_a_finder_the_module_trains_plainly():
    """Lightning tells no callback of it, so the wrapper stays behind: it must do nothing for anybody else."""

    class Fragile(UserModule):
        fail = True

        def training_step(self, batch, batch_idx):
            if self.fail and batch_idx == 3:
                raise ZeroDivisionError
            return self.loss(batch)

    module, reference = make(Fragile), make(Fragile)
    ours = callback()
    with pytest.raises(ZeroDivisionError):
        find(module, [ours])
    module.fail = reference.fail = False
    module.load_state_dict(reference.state_dict())
    with recorded_draws() as draws:
        fit(module)
    fit(reference)
    assert not draws
    assert_same(module, reference)
    fit(module, [ours])  # and the callback takes the module up again
    assert_clean(module)


# ---- the batch-size finder


@pytest.mark.usefixtures("_in_tmp_path")
def test_the_batch_size_finder_measures_watermarked_steps():
    """Else it would find a size at which the training runs out of memory as soon as the watermark starts."""

    class Measuring(Loading):
        def training_step(self, batch, batch_idx):
            self.rows = 0
            return super().training_step(batch, batch_idx)

        def forward(self, x):
            self.rows += len(x)
            if self.rows > 24:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().forward(x)

    def find_size(callbacks):
        module = make(Measuring)
        trainer = Trainer(max_epochs=2, callbacks=callbacks, **SILENT)
        size = Tuner(trainer).scale_batch_size(module, init_val=4, steps_per_trial=2, max_trials=5)
        assert_clean(module)
        return size

    assert find_size([]) == 16
    assert find_size([callback(start=0.9, samples=4)]) == 8  # 8 and four groups of 4


# ---- weight averaging


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging(first):
    """SWA runs one more epoch, without backward passes, to update BatchNorm."""
    module, twin = make(UserModule), make(with_term(UserModule))

    def swa():
        return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5)

    with recorded_draws() as draws:
        fit(module, [swa(), callback()] if first else [callback(), swa()], max_epochs=4)
    twin.plan = dict(enumerate(draws))
    fit(twin, [swa()], max_epochs=4)
    assert_same(module, twin)
    assert_clean(module)
    plain = make(UserModule)
    fit(plain, [callback()], max_epochs=4)
    assert not torch.equal(module.head.weight, plain.head.weight)


@pytest.mark.parametrize("first", [True, False])
def test_exponential_moving_average(first):
    module, twin = make(UserModule), make(with_term(UserModule))
    with recorded_draws() as draws:
        ema = EMAWeightAveraging(decay=0.8)
        fit(module, [ema, callback()] if first else [callback(), ema])
    twin.plan = dict(enumerate(draws))
    fit(twin, [EMAWeightAveraging(decay=0.8)])
    assert_same(module, twin)
    assert_clean(module)


def test_an_accumulation_that_changes_on_the_way():
    assert_equals_twin(UserModule, companions=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})])


# ---- optimisers


class Quasi(UserModule):
    """LBFGS evaluates the step several times a batch, on the same samples or it searches along nothing."""

    evaluations = 0

    def training_step(self, batch, batch_idx):
        self.evaluations += 1
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")


def test_lbfgs_draws_once_a_batch():
    with recorded_draws() as draws:
        module, twin = make(Quasi, dropout=0.0), make(with_term(Quasi), dropout=0.0)
        fit(module, [callback()], max_epochs=1)
    twin.plan = dict(enumerate(draws))
    fit(twin, max_epochs=1)
    assert_same(module, twin)
    assert len(draws) == 6
    assert module.evaluations > 2 * len(draws)


class Scheduled(UserModule):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_adam_with_a_scheduler():
    assert_equals_twin(Scheduled, {"start": 0.5}, range(6, 12))
