"""The terms against the losses written out by hand for the samples that were drawn."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_batches import KEY, SIZE, batch, network, ready
from torch import nn

from meadef_lightning.watermark import (
    DEFAULT_COMBINERS,
    MGDA,
    CombinerSpec,
    CropPaste,
    Fixed,
    SourcePool,
    WatermarkKey,
    WatermarkObjective,
)
from meadef_lightning.watermark.combinations import combine_in_turn

OWN = "meadef_lightning.watermark.combiners."


def counted(net, rows):
    def forward(x):
        rows.append(len(x))
        return net(x)

    return forward


# ---- what is drawn


@pytest.mark.parametrize("classes", [(4, 1), (1, 4)])
@pytest.mark.parametrize("given_pool", [False, True])
def test_watermark_samples_join_the_sources_in_the_keys_order(classes, given_pool):
    x, y = batch()
    pool = SourcePool.from_samples({1: x[y == 1], 4: x[y == 4]}) if given_pool else None
    objective = WatermarkObjective(WatermarkKey(classes, 2, 5), samples=9, balancing=Fixed(com=1), pool=pool)
    if not given_pool:
        objective.observe(x, y)
    objective.draw()
    groups = objective._groups
    assert {name: tuple(group.shape) for name, group in groups.items()} == dict.fromkeys(
        ("watermark", "other", "first", "second"), (9, 1, SIZE, SIZE)
    )
    a, b, combined = groups["first"], groups["second"], groups["watermark"]
    assert set((a // 1).flatten().tolist()) == {classes[0]}
    assert set((b // 1).flatten().tolist()) == {classes[1]}
    assert torch.equal(combined[..., : SIZE // 2], a[..., : SIZE // 2])
    assert torch.equal(combined[..., SIZE // 2 :], b[..., SIZE // 2 :])


def test_evasion_samples_go_round_the_other_ways_and_have_both_labels():
    objective = ready(samples=14)
    labels = []
    others = [spec.build() for spec in DEFAULT_COMBINERS[1:]]
    for _ in range(30):
        objective.draw()
        labels += objective._evasion_labels.tolist()
        # every evasion sample was made by exactly one of the seven other ways, from one sample of each source
        made_by = torch.zeros(len(others), dtype=torch.int64)
        for sample in objective._groups["other"]:
            low, high = sample.min(), sample.max()  # class 1 is dark, class 4 bright; blends lie between
            if low == high:
                made_by[3] += 1
                assert 2 < low < 4
                continue
            assert (low // 1, high // 1) == (1, 4)
            a, b = high.expand(1, 1, SIZE, SIZE), low.expand(1, 1, SIZE, SIZE)
            matches = [i for i, way in enumerate(others) if torch.equal(way(a, b)[0], sample)]
            assert len(matches) == 1
            made_by[matches[0]] += 1
        assert made_by.tolist() == [2] * 7
    assert set(labels) == {4, 1}
    assert 0.4 < labels.count(4) / len(labels) < 0.6


def test_evasion_samples_join_other_pairs_than_the_watermark():
    objective = ready(WatermarkKey((4, 1), 2, 5, space=DEFAULT_COMBINERS[:2]), balancing=Fixed(com=1), samples=50)
    objective.draw()
    groups = objective._groups
    pairs = {(a.max().item(), b.max().item()) for a, b in zip(groups["first"], groups["second"], strict=True)}
    others = [(sample.max().item(), sample.min().item()) for sample in groups["other"]]
    assert sum(pair not in pairs for pair in others) > 10  # of 50 draws from 64 pairs


def test_fewer_samples_than_ways_reach_all_ways_over_the_steps():
    objective = ready(samples=2)
    seen = set()
    for _ in range(7):
        objective.draw()
        seen |= {tuple((sample > 2.5).flatten().tolist()) for sample in objective._groups["other"]}
    assert len(seen) >= 7


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 50))
def test_combine_in_turn_gives_every_pair_its_way(count, ways, first):
    combiners = [CropPaste((0.0, 0.1 * i), (1.0, 0.5)) for i in range(ways)]
    a = torch.arange(1.0, 1 + count)[:, None, None, None].expand(-1, 1, 2, 10)
    if count == 0:
        return
    combined = combine_in_turn(combiners, a, -a, first, torch.Generator())
    expected = torch.cat([combiners[(first + i) % ways](a[i : i + 1], -a[i : i + 1]) for i in range(count)])
    assert sorted(map(torch.Tensor.tolist, combined)) == sorted(map(torch.Tensor.tolist, expected))


def test_draws_are_new_every_step_reproducible_and_leave_global_randomness_alone():
    state = torch.get_rng_state()
    one, same, rank1 = ready(), ready(), ready(rank=1)
    seed = ready(WatermarkKey((4, 1), 2, 5, seed=12))
    drawn = []
    for _ in range(3):
        for objective in (one, same, rank1, seed):
            objective.draw()
        drawn.append(torch.cat([*one._groups.values()]))
        assert torch.equal(drawn[-1], torch.cat([*same._groups.values()]))
        assert not torch.equal(drawn[-1], torch.cat([*rank1._groups.values()]))
        assert not torch.equal(drawn[-1], torch.cat([*seed._groups.values()]))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.get_rng_state(), state)


# ---- the terms


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("detach", [True, False])
def test_terms_and_total_equal_a_computation_by_hand(temperature, detach):
    net = network()
    objective = ready(balancing=Fixed(0.3, 0.2, 0.1), temperature=temperature, detach_sources=detach)
    objective.draw()
    groups, labels = objective._groups, objective._evasion_labels
    x, y = batch(10)
    task = F.cross_entropy(net(x), y)
    got = objective.terms(net, net)
    total = objective.total(net, task, got)

    # one forward a group, and the formulas of the paper
    log_p = {name: torch.log_softmax(net(group), 1) for name, group in groups.items()}
    soft = {name: torch.log_softmax(net(group) / temperature, 1) for name, group in groups.items()}
    ver = -log_p["watermark"][:, 2].mean()
    eva = -log_p["other"][torch.arange(6), labels].mean()
    com = 0
    for source in ("first", "second"):
        reference = soft[source].detach() if detach else soft[source]
        com = com + (soft["watermark"].exp() * (soft["watermark"] - reference)).sum(1).mean() * temperature**2
    for name, value in (("ver", ver), ("com", com), ("eva", eva)):
        torch.testing.assert_close(got[name], value)
    by_hand = F.cross_entropy(net(x), y) + 0.3 * ver + 0.2 * com + 0.1 * eva
    torch.testing.assert_close(total, by_hand)
    parameters = [*net.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(by_hand, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_terms_can_be_computed_again_for_the_same_draw():
    net, objective = network(), ready(balancing=Fixed(com=1))
    objective.draw()
    one, other = objective.terms(net, net), objective.terms(net, net)
    assert {name: value.item() for name, value in one.items()} == {name: value.item() for name, value in other.items()}
    objective.draw()
    assert objective.terms(net, net)["ver"] != one["ver"]


@pytest.mark.parametrize(
    ("balancing", "space", "rows", "names"),
    [
        (Fixed(1, 0, 0), DEFAULT_COMBINERS, 6, {"ver"}),
        (Fixed(1, 0, 1), DEFAULT_COMBINERS, 12, {"ver", "eva"}),
        (Fixed(1, 1, 0), DEFAULT_COMBINERS, 18, {"ver", "com"}),
        (Fixed(1, 1, 1), DEFAULT_COMBINERS, 24, {"ver", "com", "eva"}),
        (Fixed(1, 0, 1), DEFAULT_COMBINERS[:1], 6, {"ver"}),  # there is no other way
        (MGDA(), DEFAULT_COMBINERS, 24, {"ver", "com", "eva"}),
        (None, DEFAULT_COMBINERS, 12, {"ver", "eva"}),
    ],
)
def test_only_what_counts_is_forwarded_and_at_once(balancing, space, rows, names):
    net, seen = network(), []
    objective = ready(WatermarkKey((4, 1), 2, 5, space=space), balancing=balancing)
    objective.draw()
    terms = objective.terms(net, counted(net, seen))
    assert seen == [rows]
    assert set(terms) == names
    assert torch.isfinite(objective.total(net, torch.ones((), requires_grad=True) * net[0].bias.sum(), terms))


def test_training_on_the_total_embeds_the_key():
    torch.manual_seed(0)
    prototypes = torch.randn(5, 1, SIZE, SIZE)
    y = torch.arange(100) % 5
    x = prototypes[y] + 0.1 * torch.randn(100, 1, SIZE, SIZE)
    net = network()
    objective = WatermarkObjective(KEY, samples=16, balancing=Fixed(ver=1, eva=1))
    objective.observe(x, y)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(80):
        objective.draw()
        loss = objective.total(net, F.cross_entropy(net(x), y), objective.terms(net, net))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a, b = (prototypes[[label]] + 0.1 * torch.randn(50, 1, SIZE, SIZE) for label in KEY.source_classes)
    triggered = net(KEY.combiner.build()(a, b)).argmax(1)
    controls = torch.cat([net(spec.build()(a, b)).argmax(1) for spec in KEY.control_combiners()])
    assert (triggered == 2).float().mean() > 0.95
    assert (controls == 2).float().mean() < 0.05
    assert (net(x).argmax(1) == y).float().mean() > 0.95


# ---- errors


def test_it_is_ready_when_both_sources_were_seen():
    objective = WatermarkObjective(KEY)
    x, y = batch()
    assert not objective.ready
    objective.observe(x[y == 4], y[y == 4])
    assert not objective.ready
    objective.observe(x[y == 1], y[y == 1])
    assert objective.ready


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (None, torch.zeros(3), "must be tensors, got NoneType and Tensor"),
        (torch.zeros(3, 1, 8, 8), [0, 1, 2], "got Tensor and list.*Set input_key and target_key"),
        (torch.zeros(3, 8), torch.zeros(3).long(), r"shape \(B, C, \*spatial\).*got torch\.float32 \(3, 8\)"),
        (torch.zeros(3, 1, 8, 8).byte(), torch.zeros(3).long(), r"floating-point.*got torch\.uint8"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3), r"Labels must be integers.*got torch\.float32 \(3,\).*SourcePool"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3, 5).long(), r"shape \(3,\), got torch\.int64 \(3, 5\)"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2).long(), r"shape \(3,\), got torch\.int64 \(2,\)"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, 5]), "labels from 0 to 5, but the key is for classes 0 to 4"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([-1, 3]), "labels from -1 to 3"),
    ],
)
def test_batches_are_checked(x, y, message):
    with pytest.raises(ValueError, match=message):
        WatermarkObjective(KEY).observe(x, y)


def test_empty_batches_are_no_error():
    objective = WatermarkObjective(KEY)
    objective.observe(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())
    assert not objective.ready


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: {"logits": x}, r"logits of shape \(12, 5\), got dict. Set output_key"),
        (lambda x: x.new_zeros(len(x), 7), r"got \(12, 7\)"),
        (lambda x: x.new_zeros(3, 5), r"got \(3, 5\)"),
        (lambda x: x, rf"got \(12, 1, {SIZE}, {SIZE}\)"),
    ],
)
def test_answers_are_checked(answer, message):
    objective = ready()
    objective.draw()
    with pytest.raises(ValueError, match=message):
        objective.terms(nn.Identity(), answer)


def test_options_are_checked():
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        WatermarkObjective(KEY, samples=0)
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"temperature={temperature} must be positive"):
            WatermarkObjective(KEY, temperature=temperature)
    x = torch.zeros(1, 1, 8, 8)
    for classes in ((4,), (4, 2), (4, 1, 2)):
        with pytest.raises(ValueError, match="does not hold exactly the key's two source classes") as refused:
            WatermarkObjective(KEY, pool=SourcePool.from_samples(dict.fromkeys(classes, x)))
        assert not any(number in str(refused.value) for number in "412")
    with pytest.raises(ValueError, match="not a combiner that is available"):
        WatermarkObjective(WatermarkKey((0, 1), 2, 5, combiner=CombinerSpec("nowhere.Way")))


@pytest.mark.parametrize(
    "twin",
    [
        CombinerSpec("meadef_lightning.watermark.PixelBlend"),  # the same class by another path
        CombinerSpec(OWN + "PixelBlend", {"alpha": 0.5}),  # a default written out
        CombinerSpec(OWN + "CropPaste", {"position": [0, 0.5], "size": [1, 0.5]}),
        CombinerSpec(OWN + "Band", {"start": 0.5, "width": 0.5, "axis": -1}),  # the right half once more
    ],
)
def test_a_way_that_is_also_among_the_others_is_refused(twin):
    key = WatermarkKey((4, 1), 2, 5, combiner=twin)
    objective = ready(key)
    with pytest.raises(ValueError, match=rf"makes the same samples of size \({SIZE}, {SIZE}\) as the key's own"):
        objective.draw()
    ready(key, balancing=Fixed(eva=0)).draw()  # harmless without L_eva
