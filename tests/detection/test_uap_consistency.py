import pytest
import torch
from torch import nn

from meadef_lightning.detection.base import roc_auc
from meadef_lightning.detection.uap_consistency import UAPConsistency, universal_perturbations


@pytest.fixture(scope="module")
def fitted(patch_case):
    detectors = {}
    for name in ("patched", "clean"):
        detectors[name] = UAPConsistency(steps=40, images=32)
        detectors[name].fit(getattr(patch_case, name), patch_case.thief)
    return detectors


def test_the_perturbation_of_a_linear_model_is_known():
    """Towards one of two classes, all gradients are multiples of the weights' difference: so is the perturbation."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 2).requires_grad_(False)
    low, high = torch.full((1, 1, 1), -50.0), torch.full((1, 1, 1), 50.0)  # far from clipping; a pixel is 100 wide
    x = torch.randn(5, 1, 3, 4)
    delta = universal_perturbations(nn.Sequential(nn.Flatten(), linear), x, torch.tensor([0, 1]), 0.02, 15, low, high)
    direction = (linear.weight[0] - linear.weight[1]) / (linear.weight[0] - linear.weight[1]).norm()
    torch.testing.assert_close(delta.flatten(1), 0.02 * torch.stack([direction, -direction]), atol=1e-5, rtol=1e-3)


def test_the_bank_stays_within_epsilon_and_moves_clean_images(patch_case, fitted):
    bank, model = fitted["clean"].bank, patch_case.clean
    assert bank.shape == (11, 1, 16, 16)
    assert float(bank.flatten(1).norm(dim=1).max()) <= 3 + 1e-5
    thief = patch_case.thief
    x = thief.validation_x  # unseen when the bank was made
    answers = [model((x + delta * (thief.high - thief.low)).clamp(thief.low, thief.high)).argmax(-1) for delta in bank]
    assert float((answers[0] != model(x).argmax(-1)).float().mean()) >= 0.7
    reached = torch.stack([(answer == k).float().mean() for k, answer in enumerate(answers[1:])])
    assert float(reached.mean()) >= 0.6


def test_the_score_is_the_share_of_the_bank_that_changes_nothing(patch_case, fitted):
    detector, model, thief = fitted["patched"], patch_case.patched, patch_case.thief
    queries = torch.cat([patch_case.natural[:5], patch_case.marked[:5]])
    for score, query in zip(detector.score(queries).tolist(), queries, strict=True):
        unchanged = 0
        for delta in detector.bank:
            pixels = (query * 0.3760 + 0.3053 + delta).clamp(0, 1)  # the digits' mean and standard deviation
            moved = (pixels - 0.3053) / 0.3760
            unchanged += int(model(moved[None]).argmax() == model(query[None]).argmax())
        assert score == pytest.approx(unchanged / 11)
    assert len(detector.score(thief.validation_x)) == len(thief.validation_x)


def test_patches_are_consistent_and_a_clean_model_has_none(patch_case, fitted):
    auc = {}
    for name, detector in fitted.items():
        natural, marked = detector.score(patch_case.natural), detector.score(patch_case.marked)
        auc[name] = roc_auc(marked, natural)
        assert float((natural > detector.threshold).float().mean()) <= 0.08
    assert auc["patched"] >= 0.95
    assert 0.35 <= auc["clean"] <= 0.7


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"epsilon=0 above 0"):
        UAPConsistency(epsilon=0)
    with pytest.raises(ValueError, match="steps=0"):
        UAPConsistency(steps=0)
