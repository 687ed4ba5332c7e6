"""What an objective remembers: restored bit for bit, of all processes, without the key, and only under the same classes."""

import io

import pytest
import torch
import torch.nn.functional as F
from objective_batches import KEY, batch, network, ready

from meadef_lightning.watermark import MGDA, SourcePool, WatermarkKey, WatermarkObjective
from meadef_lightning.watermark.objective import gather_states, restore_state


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

    def all_gather_object(states, state):
        states[:] = [state, two.state_dict()]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    state = saved(gather_states(one, world_size=2))
    assert set(state["ranks"]) == {"0", "1"}
    restored = WatermarkObjective(KEY, samples=6, rank=1)
    restore_state(restored, state, rank=1, world_size=2)
    assert restored.steps == 1
    two.draw(), restored.draw()
    assert torch.equal(restored._groups["watermark"], two._groups["watermark"])


def test_another_number_of_processes_starts_anew_and_says_so():
    state = gather_states(ready(), world_size=1)
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


# ---- a state of another key or recipe


@pytest.mark.parametrize("classes", [(0, 1), (1, 4)], ids=["others", "the other way round"])
def test_a_state_of_other_source_classes_is_refused(classes):
    """Its samples would be taken for those of this key's classes."""
    other = ready(WatermarkKey(classes, 2, 5), tilt=0.5)
    restored = WatermarkObjective(KEY, samples=6, tilt=0.5)
    with pytest.raises(ValueError, match=r"another key was embedded.*load its weights alone") as error:
        restored.load_state_dict(saved(other.state_dict()))
    assert not any(digit in str(error.value) for digit in "0124")
    assert (restored.steps, restored.ready) == (0, False)


def test_tilted_samples_of_other_classes_are_refused_with_a_given_pool_too():
    net, (x, y) = network(), batch()
    pools = [WatermarkObjective(WatermarkKey(c, 2, 5), pool=_given(x, y, c), tilt=0.5) for c in ((4, 1), (0, 3))]
    for objective in pools:
        objective.refresh(net, net)
    with pytest.raises(ValueError, match="another key was embedded"):
        pools[0].load_state_dict(saved(pools[1].state_dict()))
    pools[0].load_state_dict(saved(pools[0].state_dict()))


def _given(x, y, classes):
    return SourcePool.from_samples({label: x[y == label] for label in classes})


def test_a_state_from_before_classes_were_told_is_accepted():
    state = saved(ready().state_dict())
    del state["pool"]["classes"]
    restored = WatermarkObjective(KEY, samples=6)
    restored.load_state_dict(state)
    assert restored.ready


def test_resumed_without_tilt_nothing_is_tilted():
    net, objective = network(), ready(tilt=0.5)
    objective.refresh(net, net)
    objective.draw()
    assert "tilt" in objective.terms(net, net)
    restored = WatermarkObjective(KEY, samples=6, tilt=0.0)
    restored.load_state_dict(saved(objective.state_dict()))
    restored.draw()
    assert "tilt" not in restored.terms(net, net)
