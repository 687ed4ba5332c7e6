import itertools

import pytest
import torch
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.answer_lean import AnswerLean, joint_leans, leans

CLASSES = 5


class Known(nn.Module):
    """Answers image ``i``, whose pixels are all ``i``, with the log of row ``i``."""

    def __init__(self, probabilities):
        super().__init__()
        self.register_buffer("table", probabilities.log())

    def forward(self, x):
        return self.table[x[:, 0, 0, 0].long()]


def natural(y):
    """A thief's data whose image ``i`` has pixels ``i``."""
    x = torch.arange(len(y)).float()[:, None, None, None].expand(-1, 1, 2, 2)
    bound = torch.ones(1, 1, 1)
    return ThiefData(x, y, x, y, CLASSES, -bound, bound)


def answers(y, noise=0.02, seed=0):
    """Sure answers with some confusion that goes both ways."""
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * nn.functional.one_hot(y, CLASSES) + noise * torch.randn(len(y), CLASSES, generator=generator)
    mutual = (y == 0) | (y == 1)
    logits[mutual, :2] = 5.0
    return logits.softmax(1)


@pytest.fixture
def y():
    return torch.arange(CLASSES).repeat(20)


def test_leans_by_brute_force(y):
    p = torch.rand(len(y), CLASSES, generator=torch.Generator().manual_seed(1)).softmax(1)
    lean, joint = leans(p, y), joint_leans(leans(p, y))
    for a, b, t in itertools.product(range(CLASSES), repeat=3):
        of_a = p[y == a, t].mean() - p[y == t, a].mean()
        of_b = p[y == b, t].mean() - p[y == t, b].mean()
        torch.testing.assert_close(lean[a, t], of_a)
        if len({a, b, t}) < 3:
            assert joint[a, b, t] == -torch.inf
        else:
            torch.testing.assert_close(joint[a, b, t], min(of_a, of_b))


def test_two_tilted_classes_are_found_and_mutual_confusion_is_not(y):
    p = answers(y)
    clean = AnswerLean().inspect(Known(p), natural(y))
    assert not clean.decision
    assert clean.score < 0.01
    tilted = p.clone()
    some = ((y == 2) | (y == 4)) & (torch.arange(len(y)) % 4 == 0)
    tilted[some] = 0.6 * nn.functional.one_hot(torch.tensor(3), CLASSES) + 0.4 * tilted[some]
    found = AnswerLean().inspect(Known(tilted), natural(y))
    assert found.decision
    assert found.flagged == (3,)
    assert found.rank_of((2, 4), 3) == 1.5  # of both orders of the sources
    assert found.score == pytest.approx(0.15, abs=0.02)


def test_one_class_alone_that_leans_is_no_pair(y):
    p = answers(y)
    p[y == 2] = 0.6 * nn.functional.one_hot(torch.tensor(3), CLASSES) + 0.4 * p[y == 2]
    assert not AnswerLean().inspect(Known(p), natural(y)).decision


def test_bad_input_is_refused(y):
    with pytest.raises(ValueError, match="batch_size=0"):
        AnswerLean(batch_size=0)
    keep = y != 3
    with pytest.raises(ValueError, match=r"no image of \[3\]"):
        AnswerLean().inspect(Known(answers(y)), natural(y[keep]))
