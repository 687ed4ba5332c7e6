import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from meadef_lightning.detection.activation_clustering import ActivationClustering
from meadef_lightning.detection.inputs import alarm_threshold, features_and_classes
from meadef_lightning.detection.lof import LocalOutlierFactor
from meadef_lightning.detection.spectral import SpectralSignatures
from meadef_lightning.detection.strip import STRIP
from meadef_lightning.detection.uap_consistency import UAPConsistency
from meadef_lightning.victims.networks import DigitsCNN, penultimate

ALL = [STRIP, SpectralSignatures, ActivationClustering, LocalOutlierFactor, UAPConsistency]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.1, 0.5])
def test_no_more_than_the_share_of_clean_scores_exceeds_the_threshold(share):
    distinct = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float()
    assert int((distinct > alarm_threshold(distinct, share)).sum()) in (round(100 * share), round(100 * share) - 1)
    ties = torch.tensor([0.0] * 60 + [1.0] * 40)
    assert float((ties > alarm_threshold(ties, share)).float().mean()) <= share


def test_features_and_classes_are_the_models():
    model = DigitsCNN(5, 1, width=4, hidden=8).eval()
    x = torch.randn(7, 1, 16, 16)
    features, classes = features_and_classes(model, x, batch_size=3)
    with torch.no_grad():
        torch.testing.assert_close(features, penultimate(model, x))
        assert torch.equal(classes, model(x).argmax(dim=-1))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(MisconfigurationException, match=r"Flatten runs no nn.Linear.*STRIP, UAPConsistency"):
        features_and_classes(nn.Flatten(), torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("detector", ALL)
def test_false_alarms_are_a_share(detector):
    with pytest.raises(ValueError, match=r"false_alarms=1.0 is a share .* \[0, 1\)"):
        detector(false_alarms=1.0)
    with pytest.raises(ValueError, match="batch_size=0"):
        detector(batch_size=0)


@pytest.mark.parametrize("detector", ALL)
def test_nothing_can_be_asked_before_fit(detector):
    with pytest.raises(MisconfigurationException, match="call fit"):
        detector().score(torch.zeros(1, 1, 16, 16))
    with pytest.raises(MisconfigurationException, match="call fit"):
        _ = detector().threshold


@pytest.mark.parametrize(
    "detector",
    [STRIP(overlays=5), SpectralSignatures(), ActivationClustering(), LocalOutlierFactor(), UAPConsistency(steps=3, images=5)],
    ids=lambda detector: type(detector).__name__,
)  # fmt: skip
def test_equal_seeds_give_equal_scores_and_nothing_outside_changes(detector, patch_case):
    model, queries = patch_case.patched, patch_case.natural[:20]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    state = torch.random.get_rng_state()
    first, second = [], []
    for scores in (first, second):
        detector.fit(model, patch_case.thief, seed=3)
        scores += [detector.score(queries), torch.tensor(detector.threshold)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, first, second))
    assert first[0].shape == (20,)
    assert first[0].dtype == torch.float32
