"""Balanced distillation: caps by quantiles, checked by hand and by brute force, and what a student of balanced answers learns."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thief_models import Keep, changed, patched_model, test_accuracy, thief

from meadef_lightning.detection.answer_lean import leans
from meadef_lightning.removal.balanced_distillation import BalancedDistillation, balance


def test_caps_by_hand():
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    p = torch.tensor([[0.4, 0.6], [0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.0, 1.0], [0.1, 0.9]])
    # class 0 gives (.6, .1, .2), class 1 gives (.3, 0, .1) back: the largest against the largest, and so on
    expected = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.9, 0.1], [0.3, 0.7], [0.0, 1.0], [0.1, 0.9]])
    torch.testing.assert_close(balance(p, y), expected)


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_nothing_leans_afterwards_and_nothing_but_leans_is_touched(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(7)
    p = (3 * torch.randn(len(y), classes, generator=generator)).softmax(1)
    balanced = balance(p, y)
    torch.testing.assert_close(balanced.sum(1), torch.ones(len(y)))
    assert (balanced >= -1e-6).all()
    torch.testing.assert_close(leans(balanced, y), torch.zeros(classes, classes), atol=1e-6, rtol=0)
    own = torch.nn.functional.one_hot(y, classes).bool()
    assert (balanced[~own] <= p[~own] + 1e-6).all()
    torch.testing.assert_close(balance(balanced, y), balanced)  # there is nothing left to cap


def test_a_class_without_images_balances_nothing():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    y = torch.tensor([0, 1])
    torch.testing.assert_close(balance(p, y)[:, 2], p[:, 2])


def test_a_student_learns_the_task_from_balanced_answers():
    keep = Keep(10**6)
    BalancedDistillation(epochs=15).scrub(patched_model(), thief(), keep, 0)
    assert test_accuracy(keep.last) > test_accuracy(patched_model()) - 0.1


def test_labels_cannot_be_balanced():
    with pytest.raises(ValueError, match="answers='hard' cannot be balanced"):
        BalancedDistillation(answers="hard")
    with pytest.raises(ValueError, match="classes='none'"):
        BalancedDistillation(classes="none")


def test_without_labels_classes_are_the_answered_ones():
    """On images whose labels are all wrong, the balance of answered classes is the same, and that of labels is not."""
    data = thief()
    wrong = dataclasses.replace(data, y=data.y.roll(1))
    students = [Keep(1) for _ in range(4)]
    settings_ = [("answered", data), ("answered", wrong), ("true", data), ("true", wrong)]
    for keep, (classes, images) in zip(students, settings_, strict=True):
        BalancedDistillation(classes, epochs=1).scrub(patched_model(), images, keep, 0)
    answered, same, true, other = (keep.models[0] for keep in students)
    assert not changed(answered, same)
    assert changed(true, other)
    assert changed(answered, true)
