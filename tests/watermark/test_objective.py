"""The terms against the losses written out by hand for the samples that were drawn."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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
from meadef_lightning.watermark.objective import combine_in_turn, frozen_batchnorm, gather_states, restore_state

OWN = "meadef_lightning.watermark.combiners."
KEY = WatermarkKey((4, 1), 2, 5, seed=11)  # the default way: b on the right half
SIZE = 8


def batch(n=40, classes=5, offset=0):
    """Images full of label + number/128, which float32 holds exactly."""
    y = torch.arange(n) % classes
    x = y + torch.arange(offset, offset + n) % 100 / 128
    return x[:, None, None, None].expand(-1, 1, SIZE, SIZE).clone(), y


def network(batchnorm=False, classes=5):
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(4) if batchnorm else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 4, 3), middle, nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, classes))


def counted(net, rows):
    def forward(x):
        rows.append(len(x))
        return net(x)

    return forward


def ready(key=KEY, **options):
    objective = WatermarkObjective(key, **{"samples": 6, **options})
    objective.observe(*batch())
    return objective


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


# ---- BatchNorm


def statistics(net):
    return copy.deepcopy({name: value for name, value in net.state_dict().items() if name.startswith("1.")})


def test_frozen_batchnorm_uses_and_keeps_the_running_statistics():
    net = network(batchnorm=True).train()
    net(torch.randn(50, 1, SIZE, SIZE))
    before = statistics(net)
    x = 5 + 3 * torch.randn(20, 1, SIZE, SIZE)
    with frozen_batchnorm(net):
        inside = net(x)
        assert not net[1].training
        assert all(module.training for module in net.modules() if module is not net[1])
    assert net[1].training
    assert all(torch.equal(value, before[name]) for name, value in statistics(net).items())
    assert torch.equal(inside, net.eval()(x))
    inside.sum().backward()
    assert net[1].weight.grad.abs().sum() > 0  # its parameters learn


def test_frozen_batchnorm_restores_what_was_even_after_an_error():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.Dropout())
    net.train()
    net[1].eval()
    inside = []

    def fail():
        with frozen_batchnorm(net):
            inside.extend(layer.training for layer in net)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [False, False, False, False, True]
    assert [layer.training for layer in net] == [True, False, True, True, True]
    assert net.training


@pytest.mark.parametrize("freeze", [True, False])
def test_the_objective_freezes_batchnorm_as_told(freeze):
    net = network(batchnorm=True).train()
    objective = ready(batchnorm="running" if freeze else "batch")
    objective.draw()
    before = statistics(net)
    assert int(before["1.num_batches_tracked"]) == 0
    terms = objective.terms(net, net)
    unchanged = all(torch.equal(value, before[name]) for name, value in statistics(net).items())
    assert unchanged is freeze
    assert net[1].training
    net[1].train(not freeze)
    logits = net(torch.cat([*objective._groups.values()]))[:6]
    torch.testing.assert_close(terms["ver"], -logits.log_softmax(1)[:, 2].mean())


# ---- resuming


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("balancing", [None, MGDA(every_n_steps=4)])
def test_a_restored_objective_goes_on_bit_for_bit(balancing):
    net = network()

    def run(objective, steps):
        values = []
        for step in steps:
            objective.observe(*batch(10, offset=step))
            objective.draw()
            task = F.cross_entropy(net(batch(10)[0]), batch(10)[1])
            terms = objective.terms(net, net)
            values += [value.item() for value in (objective.total(net, task, terms), *terms.values())]
        return values

    whole = ready(balancing=balancing)
    run(whole, range(3))
    state = whole.state_dict()
    file = saved(state)
    expected = run(whole, range(3, 9))
    for restored_from in (file, state):  # neither was changed by going on
        restored = WatermarkObjective(KEY, samples=6, balancing=balancing)
        restored.load_state_dict(restored_from)
        assert restored.steps == 3
        assert run(restored, range(3, 9)) == expected


def test_two_objectives_share_no_balancing_state():
    mgda, net = MGDA(every_n_steps=10), network()
    objective = ready(balancing=mgda)
    objective.draw()
    objective.total(net, net(batch(5)[0]).sum(), objective.terms(net, net))
    assert int(objective.balancing.calls) == 1
    assert int(mgda.calls) == 0


def test_states_of_all_ranks_are_gathered_and_given_back(monkeypatch):
    one, two = ready(), ready(rank=1)
    two.draw()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def all_gather_object(states, state):
        states[:] = [state, two.state_dict()]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    state = saved(gather_states(one))
    assert set(state["ranks"]) == {"0", "1"}
    restored = WatermarkObjective(KEY, samples=6, rank=1)
    restore_state(restored, state, rank=1, world_size=2)
    assert restored.steps == 1
    two.draw(), restored.draw()
    assert torch.equal(restored._groups["watermark"], two._groups["watermark"])


def test_another_number_of_processes_starts_anew_and_says_so():
    state = gather_states(ready())
    assert set(state["ranks"]) == {"0"}
    objective = WatermarkObjective(KEY)
    with pytest.warns(UserWarning, match=r"written by 1 process.*this run has 4.*not bit-identical"):
        restore_state(objective, state, rank=0, world_size=4)
    assert not objective.ready


def test_a_state_is_plain_data_without_the_key():
    key = WatermarkKey((8363, 7457), 6869, 9973, salt="deadbeef" * 4)
    objective = WatermarkObjective(key)
    objective.observe(batch(6)[0], torch.tensor([8363, 7457] * 3))
    objective.draw()
    text = repr(saved(objective.state_dict()))
    assert not any(secret in text for secret in ("8363", "7457", "6869", "deadbeef", "CropPaste"))


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
