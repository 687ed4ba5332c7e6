"""The gradient bandit of Knockoff Nets and its rewards, against examples worked by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meadef_lightning.extraction.bandit import (
    RunningStandardizer,
    bandit_update,
    certainty_reward,
    class_policy,
    diversity_reward,
    draw_actions,
    loss_reward,
    occurrences,
)


def test_update_by_hand():
    # policy 1/4, 1/2, 1/4; class 1 is drawn for the third time with r = 2 over a baseline of 0.5
    preferences = torch.tensor([0.0, math.log(2), 0.0], dtype=torch.float64)
    moved, counts = bandit_update(
        preferences, torch.tensor([4, 2, 0]), torch.tensor([1]), torch.tensor([2.0]), baseline=0.5
    )
    expected = preferences + torch.tensor([-0.125, 0.25, -0.125], dtype=torch.float64)
    torch.testing.assert_close(moved, expected)
    assert counts.tolist() == [4, 3, 0]


def test_batch_is_the_sum_of_the_single_updates_at_its_policy():
    rng = np.random.default_rng(0)
    preferences, counts, available = rng.normal(size=5), np.array([0, 3, 1, 7, 2]), np.array([1, 1, 0, 1, 1], bool)
    actions, rewards = np.array([0, 3, 0, 1, 0]), rng.normal(size=5)
    policy = np.exp(preferences) * available / (np.exp(preferences) * available).sum()
    expected, drawn = preferences.copy(), counts.copy()
    for action, reward in zip(actions, rewards, strict=True):
        drawn[action] += 1
        for a in range(5):
            expected[a] += (reward - 0.3) / drawn[action] * ((a == action) - policy[a])
    moved, after = bandit_update(
        *map(torch.from_numpy, (preferences, counts, actions, rewards)), 0.3, torch.from_numpy(available)
    )
    np.testing.assert_allclose(moved, expected)
    assert after.tolist() == drawn.tolist()
    assert moved[2] == preferences[2]


def test_policy_does_not_overflow_and_masks():
    policy = class_policy(torch.tensor([1e5, -1e5, 0.0]), torch.tensor([False, True, True]))
    assert policy.tolist() == [0, 0, 1]
    assert class_policy(torch.tensor([1e5, 1e5])).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="No class has images left"):
        class_policy(torch.zeros(2), torch.zeros(2, dtype=torch.bool))


def test_occurrences():
    assert occurrences(torch.tensor([2, 0, 2, 2, 0]), 4).tolist() == [1, 1, 2, 3, 2]


def test_draws_are_distributed_as_one_after_the_other():
    generator, p = torch.Generator().manual_seed(0), np.array([0.5, 0.3, 0.2])
    preferences, left, seen, n = torch.from_numpy(np.log(p)), torch.tensor([1, 2, 1]), {}, 2000
    for _ in range(n):
        pair = tuple(draw_actions(preferences, left, 2, generator).tolist())
        seen[pair] = seen.get(pair, 0) + 1
    single = {0: p * [0, 1, 1], 1: p, 2: p * [1, 1, 0]}
    for first in range(3):
        for second in range(3):
            expected = p[first] * single[first][second] / single[first].sum()
            assert seen.get((first, second), 0) / n == pytest.approx(expected, abs=4.5 * math.sqrt(expected / n))


def test_draws_stop_at_what_is_left():
    left = torch.tensor([0, 3, 1, 40])
    actions = draw_actions(torch.tensor([9.0, 2.0, 1.0, 0.0]), left, 44, torch.Generator().manual_seed(0))
    assert actions.bincount(minlength=4).tolist() == left.tolist()
    with pytest.raises(ValueError, match="draws=45 is more than the 44 images that are left"):
        draw_actions(torch.zeros(4), left, 45, torch.Generator())


# --- rewards


def test_rewards_of_known_answers():
    answers = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(certainty_reward(answers), torch.tensor([0.5, 0, 0, 1]))
    mean = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(diversity_reward(answers, mean), torch.tensor([0.2, 0.1, 0, 0.7]))
    student = torch.tensor([[0.25, 0.5, 0.25]])
    expected = -0.7 * math.log(0.25) - 0.2 * math.log(0.5) - 0.1 * math.log(0.25)
    assert loss_reward(student.log(), answers[:1]).tolist() == pytest.approx([expected])
    assert loss_reward(student.log(), torch.tensor([1])).tolist() == pytest.approx([math.log(2)])


def test_standardizer_equals_numpy_over_all_values():
    rng, running = np.random.default_rng(0), RunningStandardizer()
    chunks = [rng.normal(3, 2, size) for size in (1, 7, 2, 50)]
    for number, chunk in enumerate(chunks):
        running.update(torch.from_numpy(chunk))
        everything = np.concatenate(chunks[: number + 1])
        assert running.mean == pytest.approx(everything.mean())
        assert running.squares == pytest.approx(everything.var() * len(everything))
        expected = (chunk - everything.mean()) / (everything.std() or 1)
        np.testing.assert_allclose(running(torch.from_numpy(chunk)), expected, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6 + 0.1])
def test_values_without_variance_become_zero(value):
    running = RunningStandardizer()
    assert running(torch.zeros(2)).tolist() == [0, 0]
    for _ in range(3):
        running.update(torch.full((7,), value))
        assert running(torch.full((3,), value)).tolist() == [0, 0, 0]


def test_hard_answers_have_a_constant_certainty():
    one_hot = F.one_hot(torch.tensor([0, 3, 1]), 4).double()
    running = RunningStandardizer()
    running.update(certainty_reward(one_hot))
    assert running(certainty_reward(one_hot)).tolist() == [0, 0, 0]
