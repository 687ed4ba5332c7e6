import math

import pytest
import torch
from torch import nn

from meadef_lightning.detection.base import roc_auc
from meadef_lightning.detection.strip import STRIP, mean_entropy, superimpose


def test_overlays_add_pixels_and_clip_at_white():
    mean, std = torch.tensor([0.3, 0.6])[:, None, None], torch.tensor([0.2, 0.5])[:, None, None]
    pixels, overlays = torch.rand(3, 2, 4, 4), torch.rand(5, 2, 4, 4)
    mixed = superimpose((pixels - mean) / std, (overlays - mean) / std, 0.7, -mean / std, (1 - mean) / std)
    expected = (pixels[:, None] + 0.7 * overlays).clamp(0, 1)
    torch.testing.assert_close(mixed * std + mean, expected)


def test_entropy_is_counted_in_bits():
    certain, even = [100.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    assert mean_entropy(torch.tensor([[certain, even], [even, even]])).tolist() == pytest.approx([1.0, 2.0])


def test_the_score_of_a_linear_model_by_hand(patch_case):
    torch.manual_seed(0)
    linear = nn.Linear(256, 10)
    detector = STRIP(overlays=7, batch_size=20)  # two queries a forward pass
    detector.fit(nn.Sequential(nn.Flatten(), linear), patch_case.thief, seed=5)
    rows = torch.randperm(len(patch_case.thief.x), generator=torch.Generator().manual_seed(5))[:7]
    mean, std = 0.3053, 0.3760
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    scores = detector.score(patch_case.natural[:5])
    for score, query in zip(scores.tolist(), patch_case.natural[:5], strict=True):
        entropies = []
        for row in rows.tolist():
            pixels = (query * std + mean + patch_case.thief.x[row] * std + mean).clamp(0, 1)
            p = (weight @ ((pixels.double() - mean) / std).flatten() + bias).softmax(0).tolist()
            entropies.append(-sum(value * math.log2(value) for value in p))
        assert -score == pytest.approx(sum(entropies) / 7, abs=1e-4)


def test_patches_are_found_and_a_clean_model_has_none(patch_case):
    auc = {}
    for name in ("patched", "clean"):
        detector = STRIP(overlays=50)
        detector.fit(getattr(patch_case, name), patch_case.thief)
        marked, natural = detector.score(patch_case.marked[:100]), detector.score(patch_case.natural[:100])
        auc[name] = roc_auc(marked, natural)
        assert float((natural > detector.threshold).float().mean()) <= 0.05
        assert float((marked > detector.threshold).float().mean()) == pytest.approx(float(name == "patched"), abs=0.1)
    assert auc["patched"] >= 0.98
    assert auc["clean"] <= 0.6


def test_bad_arguments_are_refused(patch_case):
    with pytest.raises(ValueError, match=r"strength=0.* above 0"):
        STRIP(strength=0)
    with pytest.raises(ValueError, match=r"overlays=401 clean images are needed and the thief has 400"):
        STRIP(overlays=401).fit(patch_case.clean, patch_case.thief)
