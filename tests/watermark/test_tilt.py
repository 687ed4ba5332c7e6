"""Tilting natural answers: influence against retrained ridge students, masses, the loss, and their life in a training."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.linear_model import Ridge
from torch import nn
from user_modules import KEY, UserModule, callback, fit, make

from meadef_lightning.watermark.objective import REFRESH, WatermarkObjective
from meadef_lightning.watermark.pool import SourcePool
from meadef_lightning.watermark.tilt import evaluating, influence, penultimate_features, target_mass, tilt_loss


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(60, 8), (20, 50)])
def test_influence_is_what_a_retrained_ridge_student_shows(shape):
    """Teach sample i one unit more of the target, train scikit-learn's ridge anew, and look at its answer on the watermark."""
    natural, watermark, others = draws(*shape), draws(30, shape[1], seed=1) + 0.5, draws(25, shape[1], seed=2)
    x = (natural - natural.mean(0)).double().numpy()
    strength = 0.1 * (x**2).sum() / shape[1]  # ridge · mean variance · N, as scikit-learn counts it
    contrast = (watermark.mean(0) - 0.3 * others.mean(0) - 0.7 * natural.mean(0)).double().numpy()
    expected = []
    for i in range(shape[0]):
        answers = torch.zeros(shape[0]).double()
        answers[i] = 1
        expected.append(Ridge(alpha=strength, fit_intercept=False).fit(x, answers).predict(contrast[None])[0])
    scores = influence(natural, watermark, others, ridge=0.1, contrast=0.3)
    torch.testing.assert_close(scores, torch.tensor(expected).float() * shape[0], rtol=1e-3, atol=1e-3)


def test_without_other_combinations_the_naturals_stand_for_them():
    natural, watermark = draws(20, 6), draws(9, 6, seed=1)
    full = influence(natural, watermark, draws(0, 6), contrast=0.5)
    torch.testing.assert_close(full, influence(natural, watermark, draws(0, 6), contrast=0.0))


def test_equal_features_have_no_influence():
    scores = influence(torch.ones(6, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    assert scores.isfinite().all()
    assert target_mass(scores, 0.5).tolist() == [0.0] * 6


@given(
    st.lists(st.integers(-1000, 1000), min_size=3, max_size=60, unique=True),
    st.floats(0.01, 0.99),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_mass_rises_with_influence_and_spares_a_share(values, maximum, begin):
    scores = torch.tensor(values).float()
    mass = target_mass(scores, maximum, begin)[scores.argsort()]
    assert (mass.diff() >= -1e-6).all()
    assert (mass[: int(begin * len(mass))] == 0).all()
    assert 0.7 * maximum <= mass[-1] <= maximum + 1e-6


def test_half_of_each_class_is_spared_by_default():
    scores = draws(101)
    assert torch.equal(target_mass(scores, 0.4), target_mass(scores, 0.4, 0.5))
    assert int((target_mass(scores, 0.4) > 0).sum()) == 50


def test_the_loss_is_that_of_soft_labels():
    """Batch mean under soft labels = batch mean under class labels + our term, with the source classes' share of the batch."""
    logits, y = draws(40, 5), torch.arange(40) % 5
    source = (y == 1) | (y == 3)
    mass = torch.rand(40, generator=torch.Generator().manual_seed(0))
    soft = F.one_hot(y, 5).float()
    soft[source] = (1 - mass[source])[:, None] * soft[source] + mass[source][:, None] * F.one_hot(torch.tensor(4), 5)
    term = tilt_loss(logits[source], y[source], 4, mass[source], float(source.float().mean()))
    torch.testing.assert_close(F.cross_entropy(logits, y) + term, F.cross_entropy(logits, soft))


def test_features_are_the_last_linear_layers_input():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = draws(5, 1, 2, 2)
    torch.testing.assert_close(penultimate_features(net, net, x), net[:3](x).detach())
    assert not any(part._forward_pre_hooks for part in net.modules())
    with pytest.raises(ValueError, match=r"runs no nn.Linear on its samples.*Set tilt=0"):
        penultimate_features(nn.Flatten(), nn.Flatten(), x)


def test_evaluating_gives_every_flag_back():
    net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[2].eval()
    with evaluating(net):
        assert not any(part.training for part in net.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in net] == [True, True, False]
    assert torch.is_grad_enabled()


# ---- in the objective


def ready(**options):
    x = {label: draws(12, 1, 8, 8, seed=label) for label in KEY.source_classes}
    return WatermarkObjective(KEY, samples=5, pool=SourcePool.from_samples(x), **options)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, KEY.num_classes))


def test_the_objective_tilts_the_samples_that_teach():
    objective, model = ready(tilt=0.4), net()
    state = torch.random.get_rng_state()
    objective.refresh(model, model)
    assert torch.equal(torch.random.get_rng_state(), state)  # no dropout was drawn
    a, b = objective._tilted["x"].chunk(2)
    c = objective._combiner(a, b, torch.Generator())
    assert objective._tilted["labels"].tolist() == [KEY.source_classes[0]] * 12 + [KEY.source_classes[1]] * 12
    for mass in objective._tilted["mass"].chunk(2):
        assert (mass.min(), mass.max()) == (0.0, pytest.approx(0.4, rel=0.1))
    assert c.shape == a.shape
    objective.draw()
    model.eval()
    terms = objective.terms(model, model)
    rows = objective._natural_rows
    assert len(rows) == 10
    x, mass, labels = (objective._tilted[name][rows] for name in ("x", "mass", "labels"))
    torch.testing.assert_close(terms["tilt"], tilt_loss(model(x), labels, KEY.target_class, mass, 2 / KEY.num_classes))
    task = torch.tensor(3.0)
    rest = {name: term for name, term in terms.items() if name != "tilt"}
    expected = objective.balancing(task + terms["tilt"], rest, model)
    torch.testing.assert_close(objective.total(model, task, terms), expected)


def test_the_tilt_is_measured_anew_now_and_then_only():
    objective, model = ready(tilt=0.4), net()
    calls = []

    def forward(x):
        calls.append(len(x))
        return model(x)

    for _ in range(REFRESH + 1):
        objective.refresh(model, forward)
        objective.draw()
    assert len(calls) == 2 * 4
    untilted = ready()
    untilted.refresh(model, forward)
    untilted.draw()
    assert len(calls) == 8
    assert "natural" not in untilted._groups


@pytest.mark.parametrize("tilt", [-0.1, 1.0, float("nan")])
def test_a_tilt_is_a_probability(tilt):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        ready(tilt=tilt)


@pytest.mark.parametrize("tilt_from", [-0.1, 0.99, float("nan")])
def test_not_all_samples_are_left_untilted(tilt_from):
    with pytest.raises(ValueError, match=r"tilt_from=.* must lie in \[0, 0.99\)"):
        ready(tilt=0.4, tilt_from=tilt_from)


def test_more_samples_are_tilted_where_fewer_are_left_alone():
    model, tilted = net(), []
    for tilt_from in (0.2, 0.5, 0.8):
        objective = ready(tilt=0.4, tilt_from=tilt_from)
        objective.refresh(model, model)
        tilted.append(float((objective._tilted["mass"] > 0).float().mean()))
    assert tilted == pytest.approx([0.8, 0.5, 0.2], abs=0.06)


# ---- in a training


def test_batchnorm_stands_still_for_the_whole_watermarked_step():
    """Its statistics are those of the clean part, the module's forward uses them, and its mode is back after every batch."""
    modes = []

    class Watched(UserModule):
        def training_step(self, batch, batch_idx):
            modes.append(self.body[1].training)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert self.body[1].training

    module = make(Watched)
    before = []

    class Late(type(callback())):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if self._due:
                before.append(pl_module.body[1].running_mean.clone())

    fit(module, [Late(KEY, start=0.5, samples=4)])
    assert modes == sorted(modes, reverse=True)
    assert 0 < sum(modes) < len(modes)
    assert module.body[1].training
    assert all(torch.equal(mean, module.body[1].running_mean) for mean in before)


def test_untrained_statistics_are_not_kept():
    with pytest.raises(MisconfigurationException, match=r'have none yet.*start=0.65.*batchnorm="running"'):
        fit(make(UserModule), [callback(batchnorm="frozen")])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="batchnorm='off' must be one of"):
        callback(batchnorm="off")
