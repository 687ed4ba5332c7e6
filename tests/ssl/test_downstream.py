"""Classifiers on encoders: the head against scikit-learn, frozen encoders bit for bit, and verification as of any classifier."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from sklearn.linear_model import LogisticRegression
from torch import nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.verification import verify
from meadef_lightning.victims.downstream import DownstreamClassifier, encode, fit_head
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.networks import DigitsCNN
from meadef_lightning.watermark import WatermarkKey


@pytest.fixture(scope="module")
def digits():
    data = DigitsDataModule()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def encoder(digits):
    """Random convolutions whose BatchNorm has seen the data: enough for digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Encoder(lambda features, channels: DigitsCNN(features, channels, width=8), feature_dim=48)
        module.build_network(in_channels=1)
        x = digits.tensors("victim")[0]
        with torch.no_grad():
            for part in x.split(128):
                module(part)
    return module.eval()


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_head_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (120,), generator=generator)
    x = torch.randn(120, 6, generator=generator) * torch.arange(1, 7) + 5 + nn.functional.one_hot(y, 6) * 3
    x = torch.cat([x, torch.full((120, 1), 7.0)], dim=1)  # one feature never changes
    head = fit_head(x, y, 3, weight_decay=0.01, iterations=500)
    z = ((x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-6))[:, :6].double().numpy()
    other = LogisticRegression(C=1 / (120 * 0.01), max_iter=5000, tol=1e-8).fit(z, y.numpy())
    with torch.no_grad():
        probabilities = head(x).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, other.predict_proba(z), atol=2e-3)
    assert head.weight[:, 6].tolist() == [0, 0, 0]


def test_probe_is_good_and_changes_nothing(digits, encoder):
    before, random = state_of(encoder), torch.get_rng_state()
    probe = DownstreamClassifier.probe(encoder, *digits.tensors("victim"), 10)
    assert torch.equal(random, torch.get_rng_state())
    assert same(before, encoder.state_dict())
    assert same(encoder.network.state_dict(), probe.network.encoder.state_dict())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    x, y = digits.tensors("test")
    with torch.no_grad():
        assert (probe(x).argmax(1) == y).float().mean() > 0.85
        assert torch.equal(probe(x[:9]), probe.network.head(encoder(x[:9])))
    # a saved one is loaded onto any encoder of this architecture
    other = DownstreamClassifier(DigitsCNN(48, 1, width=8), feature_dim=48)
    other.build_network(10, 1)
    other.load_state_dict(probe.state_dict())
    assert torch.equal(other.eval()(x[:9]), probe(x[:9]))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_encoder_stays_bit_identical(digits, encoder, freeze):
    seed_everything(0, verbose=False)
    classifier = DownstreamClassifier(encoder, freeze=freeze, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
    trainer = Trainer(max_epochs=6, **SILENT)
    trainer.fit(classifier, digits)
    network = classifier.network
    assert same(encoder.network.state_dict(), network.encoder.state_dict()) == freeze
    assert all(parameter.requires_grad != freeze for parameter in network.encoder.parameters())
    network.train()
    assert network.encoder.training != freeze
    assert network.head.training
    assert trainer.test(classifier, digits, verbose=False)[0]["test_accuracy"] > 0.4
    assert "encoder" not in classifier.hparams
    assert classifier.hparams["feature_dim"] == 48
    copy.deepcopy(network)  # removal attacks do
    x = digits.tensors("test")[0][:2].requires_grad_()
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0  # trigger inversion needs gradients of the input


def test_verify_judges_it_as_any_classifier(digits, encoder):
    probe = DownstreamClassifier.probe(encoder, *digits.tensors("victim"), 10)
    key = WatermarkKey.draw(10, "somebody's secret")
    verdict, responses = verify(probe, key, digits, samples=32, decoys=30, decoy_samples=2, accelerator="cpu")
    assert verdict.verdict != "supported"
    assert verdict.natural_accuracy > 0.85
    assert len(responses.trigger) == 32


def test_encode_keeps_flags_and_does_not_depend_on_the_batch(encoder):
    module = copy.deepcopy(encoder.network).train()
    module.features[1].eval()
    flags = [part.training for part in module.modules()]
    x = torch.randn(11, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    features = encode(module, x, batch_size=4)
    assert [part.training for part in module.modules()] == flags
    torch.testing.assert_close(features, module.eval()(x).detach())


def test_errors(encoder):
    with pytest.raises(MisconfigurationException, match=r"call its build_network\(in_channels\)"):
        DownstreamClassifier(Encoder(DigitsCNN, feature_dim=8))
    with pytest.raises(MisconfigurationException, match="needs feature_dim"):
        DownstreamClassifier(nn.Flatten(), num_classes=3).build_network()
    with pytest.raises(ValueError, match=r"Features must be \(N, D\).*got \(4, 2\) and \(3,\)"):
        fit_head(torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="weight_decay=-1"):
        fit_head(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), 2, weight_decay=-1)
