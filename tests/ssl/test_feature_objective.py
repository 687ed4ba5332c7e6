"""The watermark's objective on features: what a step forwards, which classes take part, and what each term is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ssl_modules import BYOL, KEY, Shapes, callback, make, owned
from torch import Tensor, nn

from meadef_lightning.watermark import Fixed, SourcePool, WatermarkKey
from meadef_lightning.watermark.combinations import combine_in_turn
from meadef_lightning.watermark.feature_objective import FeatureObjective, contrasted_classes, encode
from meadef_lightning.watermark.features import leaning_loss, prototype_logits
from meadef_lightning.watermark.tilt import influence, target_mass


def test_what_the_objective_forwards_and_weighs():
    """One forward of the groups; the same terms from the losses called on them; terms of weight 0 are left out."""
    calls: list[Tensor] = []
    module = nn.Flatten()

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        return module(x)

    options = {"samples": 4, "per_class": 3, "pool": owned(2, 0)}
    objective = FeatureObjective(KEY, balancing=Fixed(ver=1.0, com=0.0, eva=0.0), **options)
    objective.draw()
    assert set(objective.terms(module, forward)) == {"ver"}
    assert [len(x) for x in calls] == [4 + 5 * 3]
    objective = FeatureObjective(KEY, balancing=Fixed(ver=1.0, com=0.5, eva=0.5), **options)
    objective.draw()
    terms = objective.terms(module, forward)
    wm, natural, a, b, other = calls[1].flatten(1).split([4, 5 * 3, 4, 4, 4])
    centres = natural.unflatten(0, (5, 3)).mean(1)
    # each class's natural samples are its own, as the places of the shapes tell, and the target stands third
    places = torch.stack([owned(2, 0).take(100)[row].flatten(1).mean(0) for row in (2, 3, 4, 0, 1)])
    found = torch.cdist(centres, places).argmin(1)
    assert [(1, 3, 4, 2, 0)[row] for row in found] == list(objective.classes)
    assert objective.classes[:3] == (1, 3, 4)
    unit = (centres - centres.mean(0)).square().sum(1).mean()
    logits = [-(part[:, None] - centres).square().sum(2) / unit / 0.25 for part in (wm, other)]
    expected = torch.nn.functional.cross_entropy(logits[0], torch.full((4,), 2))
    assert float(terms["ver"]) == pytest.approx(float(expected), rel=1e-3)
    p = [part.log_softmax(1) for part in (wm, a, b)]
    divergence = sum((p[0].exp() * (p[0] - source)).sum(1).mean() for source in p[1:])
    assert float(terms["com"]) == pytest.approx(float(divergence), rel=1e-4)
    surprise = -logits[1].log_softmax(1)
    possible = [surprise[torch.arange(4), torch.tensor(wins)].mean() for wins in itertools.product((0, 1), repeat=4)]
    assert min(abs(float(terms["eva"]) / float(value) - 1) for value in possible) < 1e-3


def tilted(tilt, **options):
    """An objective whose natural samples have been measured, for an encoder of one linear layer."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    objective = FeatureObjective(KEY, samples=6, tilt=tilt, pool=owned(0, 2), **options)
    objective.refresh(encoder, encoder)
    objective.draw()
    return objective, encoder


def test_natural_samples_lean_by_their_influence_and_no_others():
    """The masses by hand: influence on the features themselves, of a pool that is drawn alike; the loss from its formula."""
    objective, encoder = tilted(0.8)
    generator = torch.Generator().manual_seed(KEY.seed)
    pool = owned(0, 2)
    drawn = dict(zip(pool.classes, pool.draw(pool.capacity, generator), strict=True))
    a, b = drawn[1], drawn[3]
    combined = KEY.combiner.build()(a, b)
    others = combine_in_turn([spec.build() for spec in KEY.control_combiners()], a, b, 0, generator)
    with torch.no_grad():
        scores = influence(*(encoder(x) for x in (torch.cat([a, b]), combined, others)))
    mass = torch.cat([target_mass(part, 0.8) for part in scores.chunk(2)])
    assert mass.max() == pytest.approx(0.8)
    assert 0.4 < float((mass == 0).float().mean()) < 0.6  # up to the median of each class nothing is asked
    leaning, rows = objective._groups["leaning"], []
    assert leaning.shape == (6, 1, 8, 8)
    for sample in leaning:
        rows.append(int((torch.cat([a, b]) - sample).abs().flatten(1).sum(1).argmin()))
        assert torch.equal(torch.cat([a, b])[rows[-1]], sample)
    with torch.no_grad():
        terms = objective.terms(encoder, encoder)
        features = encoder(torch.cat(list(objective._groups.values())))
    sizes = [len(group) for group in objective._groups.values()]
    out = dict(zip(objective._groups, features.split(sizes), strict=True))
    centres = out["natural"].reshape(5, 4, 6).mean(1)
    unit = (centres - centres.mean(0)).square().sum(1).mean()
    expected = 0.0
    for feature, row in zip(out["leaning"], rows, strict=True):
        log_p = (-(feature - centres).square().sum(1) / unit / 0.25).log_softmax(0)
        if mass[row] > 0:
            own = 0 if row < len(a) else 1  # the first source stands first
            expected = expected - ((1 - mass[row]) * log_p[own] + mass[row] * log_p[2]) / 6
    assert float(terms["tilt"]) == pytest.approx(float(expected), rel=1e-3)
    total = objective.total(encoder, torch.zeros(()), terms)
    weighed = terms["ver"] + 0.3 * terms["eva"] + terms["tilt"]  # the default balancing leaves it whole
    assert float(total) == pytest.approx(float(weighed), rel=1e-5)


def test_without_tilt_nothing_leans():
    objective, encoder = tilted(0.0)
    assert set(objective._groups) == {"watermark", "natural", "other"}
    assert "tilt" not in objective.terms(encoder, encoder)


def test_an_encoder_without_linear_layers_can_be_tilted_and_one_without_features_not():
    objective = FeatureObjective(KEY, samples=4, pool=owned())
    encoder = nn.Flatten()
    objective.refresh(encoder, encoder)
    objective.draw()
    assert "leaning" in objective._groups
    with pytest.raises(ValueError, match=r"must answer features of shape \(\d+, D\), got tuple"):
        FeatureObjective(KEY, pool=owned()).refresh(encoder, lambda x: (x,))


def test_leaning_pulls_to_the_target_up_to_the_mass():
    """Where the loss is least, a sample is as probable for the target as its mass says; a mass of 0 asks for nothing."""
    centres = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    features = torch.zeros(2, 2, requires_grad=True)
    mass = torch.tensor([0.3, 0.0])
    optimizer = torch.optim.LBFGS([features], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = leaning_loss(features, centres, torch.tensor([0, 1]), 2, mass)
        loss.backward()
        return loss

    optimizer.step(closure)
    p = prototype_logits(features, centres).softmax(1)
    assert p[0].tolist() == pytest.approx([0.7, 0.0, 0.3], abs=0.01)
    assert torch.equal(features[1], torch.zeros(2))
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3)) / 2
    assert float(closure().detach()) == pytest.approx(entropy, abs=0.005)


def test_which_classes_take_part_is_the_keys_secret_and_bounded():
    keys = [WatermarkKey((5, 8), 2, seed=seed, num_classes=1_000_000, salt="5a17" * 8) for seed in (1, 2)]
    chosen = [FeatureObjective(key, rank=rank).classes for key in keys for rank in (0, 3)]
    assert chosen[0] == chosen[1]  # in every process
    assert chosen[2] == chosen[3]
    assert not set(chosen[0][3:]) & set(chosen[2][3:])
    for classes in chosen:
        assert classes[:3] == (5, 8, 2)
        assert len(set(classes)) == 10
        assert all(0 <= label < 1_000_000 for label in classes)
    small = [WatermarkKey((5, 8), 2, seed=seed, num_classes=10, salt="5a17" * 8) for seed in range(70)]
    ten = [contrasted_classes(key, range(10), 1) for key in small]
    assert {classes[3] for classes in ten} == set(range(10)) - {2, 5, 8}
    assert contrasted_classes(keys[0], [2, 5, 8], 7) == contrasted_classes(keys[0], range(9), 0) == (5, 8, 2)


def test_it_waits_for_all_classes_that_take_part():
    objective = FeatureObjective(KEY, per_class=1)
    data = Shapes()
    for label in (1, 3, 4, 0):
        objective.observe(data.x[data.y == label], data.y[data.y == label])
        assert not objective.ready
    objective.observe(data.x[:5], data.y[:5])
    assert objective.ready
    assert set(callback()._validation_pool.classes) == {1, 3, 4}


def test_the_default_forwards_at_most_a_quarter_of_a_step_on_256_views():
    key = WatermarkKey((1, 3), 4, seed=7, num_classes=10, salt="5a17" * 8)
    objective = FeatureObjective(key)
    objective.observe(torch.randn(40, 1, 8, 8), torch.arange(40) % 10)
    objective.draw()
    assert objective.classes[:3] == (1, 3, 4)
    assert set(objective.classes) == set(range(10))
    assert sum(map(len, objective._groups.values())) <= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "per_class=0 must be at least 1"),
        ({"negatives": -1}, "negatives=-1 must be at least 0"),
        ({"tilt": 1.0}, r"tilt=1.0 is a probability and must lie in \[0, 1\)"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        callback(**options)


def test_a_pool_of_two_classes_is_refused():
    data = Shapes()
    pool = SourcePool.from_samples({label: data.x[data.y == label] for label in KEY.source_classes})
    with pytest.raises(ValueError, match="two source classes and its target class"):
        callback(pool=pool)


def test_parts_of_parts_and_methods_make_features():
    module = make(BYOL)
    x = torch.randn(3, 1, 8, 8)
    module.eval()
    assert torch.equal(encode(module, "backbone.0", x), module.backbone[0](x).flatten(1))
    assert torch.equal(encode(module, "forward_momentum", x), module.forward_momentum(x))
    assert torch.equal(encode(module, None, x), module(x))
