"""Oracles over encoders: the policy against NumPy, the ledger, and the same answers over HTTP."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from meadef_lightning.extraction.base import require_classes
from meadef_lightning.oracle import (
    Compose,
    HardLabel,
    HTTPOracle,
    LedgerError,
    Oracle,
    QueryLedger,
    Rounded,
    Soft,
    Totals,
)
from meadef_lightning.oracle.policies import Features, Policy
from meadef_lightning.victims.encoder import Encoder

sys.path.append(str(Path(__file__).parents[1] / "oracle"))
from http_fakes import API_KEY, images, serving

D = 6


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(nn.Sequential(nn.Flatten(), nn.Linear(16, D), nn.BatchNorm1d(D)), feature_dim=D)


def test_features_against_numpy():
    z = torch.randn(50, D, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(Features()(z), z)
    units = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(Features(normalise=True)(z), units, rtol=1e-6, atol=1e-7)
    rounded = Compose([Features(normalise=True), Rounded(2)])
    np.testing.assert_allclose(rounded(z), np.round(units, 2), atol=1e-6)
    assert (rounded(z) < 0).any()  # no softmax was put in
    assert Features(normalise=True)(torch.zeros(1, D)).tolist() == [[0.0] * D]
    assert Features()(z.bfloat16()).dtype == torch.float32


def test_rounding_alone_still_rounds_probabilities():
    z = torch.randn(9, D)
    assert torch.equal(Rounded(2)(z), z.softmax(1).round(decimals=2))
    assert torch.equal(Compose([Rounded(2), HardLabel()])(z), z.softmax(1).round(decimals=2).argmax(1))
    assert Rounded(2).config() == {"decimals": 2}  # so that ledgers stay bound


class Noisy(Policy):
    """A defence of features as a user would write it."""

    takes = ("features",)
    gives = "features"

    def transform(self, values):
        return values + 0.5


def test_kinds_chains_and_digests():
    chains = [Features(), Features(True), Compose([Features(), Rounded(2)]), Compose([Features(), Noisy(), Rounded(1)])]
    assert [chain.kind for chain in chains] == ["feature"] * 4
    assert len({chain.digest() for chain in [*chains, Soft(), Rounded(2)]}) == 6
    assert chains[3](torch.tensor([[-1.23]])).tolist() == [[pytest.approx(-0.7)]]
    for wrong in ([Features(), HardLabel()], [Soft(), Features()], [Rounded(1), Features()], [Features(), Soft()]):
        with pytest.raises(ValueError, match=r"before it gives.*or as Features, Rounded"):
            Compose(wrong)


def test_oracle_answers_and_pays_once(tmp_path):
    victim, x = encoder(), images(40)
    oracle = Oracle(victim, Features(), QueryLedger(tmp_path / "ledger"), batch_size=16)
    answers = oracle.query(x)
    assert victim.training  # put back
    with torch.no_grad():
        torch.testing.assert_close(answers, victim.eval()(x))
    assert answers.shape == (40, D)
    assert answers.dtype == torch.float32
    assert oracle.labels == "feature"
    again = Oracle(victim, Features(), QueryLedger(tmp_path / "ledger"))
    assert torch.equal(again.query(x.flip(0)), answers.flip(0))
    assert again.ledger.totals() == Totals(40, 80)
    with pytest.raises(LedgerError, match="another victim or policy"):
        Oracle(victim, Features(normalise=True), QueryLedger(tmp_path / "ledger")).query(x)
    before = oracle.fingerprint()
    with torch.no_grad():
        victim.network[1].weight += 1
    assert oracle.fingerprint() == Oracle(victim, Features()).fingerprint() != before


def test_attacks_on_classes_refuse_features():
    with pytest.raises(Exception, match="answers with an encoder's features"):
        require_classes(Oracle(encoder(), Features()), "An attack")


@pytest.mark.parametrize("policy", [Features(), Compose([Features(normalise=True), Rounded(3)])])
def test_over_http_bit_for_bit(policy, tmp_path):
    victim, x = encoder(), images(30)
    expected = Oracle(victim, policy, batch_size=30).query(x)
    with serving(victim, policy, directory=tmp_path / "server", num_classes=None) as url:
        ledger = QueryLedger(tmp_path / "client")
        oracle = HTTPOracle(url, API_KEY, retries=0, ledger=ledger)
        assert (oracle.labels, oracle.served.num_classes) == ("feature", D)
        assert torch.equal(oracle.query(x), expected)
        assert torch.equal(oracle.query(x), expected)
        assert ledger.totals() == Totals(30, 60)
        assert QueryLedger(tmp_path / "server" / "tester.sqlite").totals() == Totals(30, 30)


def test_a_wrong_width_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"answers with 6 classes, but num_classes is 4"),
        serving(encoder(), Features(), directory=tmp_path),
    ):
        pass
