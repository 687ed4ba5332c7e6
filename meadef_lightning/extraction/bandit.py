"""A gradient bandit over classes of images, and what it is rewarded with: the adaptive strategy of Knockoff Nets, as functions.

Source: Orekondy, Schiele, Fritz, "Knockoff Nets: Stealing Functionality of Black-Box Models" (CVPR 2019), §4.1.2; the bandit is that
of Sutton & Barto, "Reinforcement Learning" (2nd ed., 2018), §2.8.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reward = Literal["certainty", "diversity", "loss"]


def certainty_reward(probabilities: Tensor) -> Tensor:
    """Margin of the most likely class over the next one, ``(B,)`` (paper §4.1.2), from probabilities ``(B, K)``, K at least 2."""
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return first - second


def diversity_reward(probabilities: Tensor, means: Tensor) -> Tensor:
    """How far an answer exceeds the mean of the answers, ``Σ_k max(0, y_k − ȳ_k)`` (paper §4.1.2).

    Args:
        probabilities: Answers, ``(B, K)``.
        means: Mean answer, ``(K,)``, or one for each answer, ``(B, K)``.

    Returns:
        ``(B,)``.
    """
    return (probabilities - means).clamp_min(0).sum(-1)


def loss_reward(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy of a student's logits ``(B, K)`` against answers ``(B, K)`` or ``(B,)``, for each image (paper §4.1.2)."""
    return F.cross_entropy(logits, answers, reduction="none")


@dataclass
class RunningStandardizer:
    """Mean and variance of all values so far (Chan, Golub & LeVeque, 1979), to standardise values with.

    Attributes:
        count: Number of values.
        mean: Their mean.
        squares: Sum of their squared deviations from it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Takes further values into account, ``(B,)``, B at least 1."""
        values = values.double()
        new, total = len(values), self.count + len(values)
        shift = float(values.mean()) - self.mean
        self.squares += float((values - values.mean()).square().sum()) + shift**2 * self.count * new / total
        self.mean += shift * new / total
        self.count = total

    def __call__(self, values: Tensor) -> Tensor:
        """Standardises values ``(B,)``, to float64; where all so far are equal, but for rounding, the result is 0."""
        deviation = math.sqrt(self.squares / max(1, self.count))
        scale = deviation if deviation > 1e-6 * max(1.0, abs(self.mean)) else math.inf
        return (values.double() - self.mean) / scale


def class_policy(preferences: Tensor, available: Tensor | None = None) -> Tensor:
    """Softmax of the preferences, over the available actions.

    Args:
        preferences: ``(A,)``, finite.
        available: ``(A,)`` bool; all by default.

    Returns:
        Probabilities ``(A,)``, 0 for what is not available.

    Raises:
        ValueError: If no action is available.
    """
    if available is None:
        return preferences.softmax(0)
    if not bool(available.any()):
        raise ValueError("No class has images left; ask for fewer.")
    return preferences.masked_fill(~available, -math.inf).softmax(0)


def occurrences(actions: Tensor, num_actions: int) -> Tensor:
    """For each of the actions ``(B,)``, how often it occurred up to there: ``[a, b, a]`` gives ``[1, 1, 2]``."""
    return F.one_hot(actions, num_actions).cumsum(0).gather(1, actions[:, None]).squeeze(1)


def bandit_update(
    preferences: Tensor,
    counts: Tensor,
    actions: Tensor,
    rewards: Tensor,
    baseline: float = 0.0,
    available: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient-bandit update (paper §4.1.2) for actions that were drawn from one policy.

    The sum of the updates of the single actions at the policy that drew them; with one action, the paper's:

    ``H(z) += (r − r̄)(1 − π(z))/N(z)`` for the action z, and ``H(a) −= (r − r̄)π(a)/N(z)`` for the others.

    Args:
        preferences: H before, ``(A,)``.
        counts: How often each action was drawn before, int64 ``(A,)``.
        actions: int64 ``(B,)``.
        rewards: r of each action, ``(B,)``.
        baseline: r̄.
        available: Actions that could be drawn, bool ``(A,)``; all by default.

    Returns:
        Preferences and counts after.
    """
    nth = counts[actions] + occurrences(actions, len(counts))
    weights = (rewards.to(preferences) - baseline) / nth
    moved = preferences.index_add(0, actions, weights) - class_policy(preferences, available) * weights.sum()
    return moved, counts + actions.bincount(minlength=len(counts))


def draw_actions(preferences: Tensor, left: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draws actions from the policy, none more often than it can be; one that is used up leaves the policy.

    Args:
        preferences: H, ``(A,)``.
        left: How often each action can be drawn, int64 ``(A,)``.
        draws: Number of draws.
        generator: Where they come from.

    Returns:
        int64 ``(draws,)``, distributed as if drawn one after the other.

    Raises:
        ValueError: If there are fewer than ``draws`` left.
    """
    if draws > int(left.sum()):
        raise ValueError(f"draws={draws} is more than the {int(left.sum())} images that are left.")
    actions = torch.empty(0, dtype=torch.int64)
    while len(actions) < draws:  # each pass but the last uses up a class
        policy = class_policy(preferences, left > actions.bincount(minlength=len(left)))
        more = torch.multinomial(policy, draws - len(actions), replacement=True, generator=generator)
        actions = torch.cat([actions, more])
        actions = actions[occurrences(actions, len(left)) <= left[actions]]
    return actions


class ClassBandit:
    """A policy over classes of images that are drawn without replacement, and the moments of answers and rewards it learns with.

    Args:
        sizes: Images in each class, int64 ``(A,)``.
        num_classes: Number of the victim's classes.
        rewards: Which rewards to average.

    Attributes:
        preferences: H, float64 ``(A,)``.
        counts: Images drawn of each class, int64 ``(A,)``.
    """

    def __init__(self, sizes: Tensor, num_classes: int, rewards: tuple[Reward, ...]) -> None:
        self.sizes = sizes
        self.num_classes = num_classes
        self.preferences = torch.zeros(len(sizes), dtype=torch.float64)
        self.counts = torch.zeros_like(sizes)
        self.answers = torch.zeros(num_classes, dtype=torch.float64)  # their sum
        self.moments = {name: RunningStandardizer() for name in rewards}
        self.total = RunningStandardizer()

    def draw(self, draws: int, generator: torch.Generator) -> Tensor:
        """Draws classes, int64 ``(draws,)``, none more often than it has images left; see `draw_actions`."""
        return draw_actions(self.preferences, self.sizes - self.counts, draws, generator)

    def learn(self, actions: Tensor, answers: Tensor, logits: Tensor | None = None) -> None:
        """Updates the policy after a draw.

        Args:
            actions: The classes drawn from the present policy, int64 ``(B,)``.
            answers: The victim's answers to the images, ``(B, K)`` floating point or int64 ``(B,)``.
            logits: The student's, ``(B, K)``; without them the loss is not rewarded.
        """
        probabilities = (answers if answers.is_floating_point() else F.one_hot(answers, self.num_classes)).double()
        sums = self.answers + probabilities.cumsum(0)
        seen = int(self.counts.sum()) + torch.arange(1, len(actions) + 1)
        values = {
            "certainty": certainty_reward(probabilities),
            "diversity": diversity_reward(probabilities, sums / seen[:, None]),  # the mean holds the answer itself
        }
        if logits is not None:
            values["loss"] = loss_reward(logits, answers)
        reward = torch.zeros(len(actions), dtype=torch.float64)
        names = [name for name in self.moments if name in values]
        for name in names:
            self.moments[name].update(values[name])
            reward += self.moments[name](values[name]) / len(names)
        available = self.sizes > self.counts
        self.preferences, self.counts = bandit_update(
            self.preferences, self.counts, actions, reward, self.total.mean, available
        )
        self.answers = sums[-1].clone()
        self.total.update(reward)

    def state(self) -> dict[str, Any]:
        """What `load` takes: tensors and numbers."""
        moments = {str(name): asdict(value) for name, value in self.moments.items()}
        tensors = {"preferences": self.preferences, "counts": self.counts, "answers": self.answers}
        return {**tensors, "moments": moments, "total": asdict(self.total)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state of a bandit with the same arguments."""
        self.preferences, self.counts, self.answers = state["preferences"], state["counts"], state["answers"]
        self.moments = {name: RunningStandardizer(**state["moments"][name]) for name in self.moments}
        self.total = RunningStandardizer(**state["total"])
