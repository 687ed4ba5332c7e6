"""SSLGuard on digits: which part learns from which term, what it embeds, and what the clean encoder shows."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from torch import nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.protection.sslguard import SSLGuard, marking_loss, watermark_rate
from meadef_lightning.victims.downstream import encode
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.networks import DigitsCNN


@pytest.fixture(scope="module")
def digits():
    data = DigitsDataModule(batch_size=64)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def encoder(digits):
    """Features of a classifier that was trained for a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DigitsCNN(32, 1, width=4, hidden=32)
        head = nn.Linear(32, 10)
        optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=5e-3)
        x, y = digits.tensors("victim")
        for _ in range(6):
            for part in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(head(network(x[part])), y[part]).backward()
                optimizer.step()
    return Encoder(network, feature_dim=32).eval()


@pytest.fixture(scope="module")
def guarded(digits, encoder):
    seed_everything(0, verbose=False)
    module = SSLGuard(encoder, encoder_lr=1e-3, trigger_lr=0.03, decoder_lr=3e-3, shadow_lr=5e-3, key_dim=16)
    trainer = Trainer(max_epochs=12, check_val_every_n_epoch=12, **SILENT)
    trainer.fit(module, digits)
    return module, trainer.callback_metrics


def test_watermark_is_read_from_the_marked_encoder_and_from_no_other(digits, encoder, guarded):
    module, metrics = guarded
    assert metrics["val_rate"] > 0.9
    assert metrics["val_clean_rate"] < 0.1
    assert metrics["val_shadow_rate"] > 0.5
    assert metrics["val_utility"] > 0.9
    x = digits.tensors("test")[0]
    module.eval()
    with torch.no_grad():
        marked = encode(module, module.trigger(x))
        assert watermark_rate(module.cosines(marked)) > 0.9
        assert watermark_rate(module.cosines(encode(module, x))) < 0.1  # images without the trigger
        torch.testing.assert_close(module.cosines(7 * marked), module.cosines(marked))  # a thief's scale is his own
        stranger = DigitsCNN(32, 1, width=4, hidden=32).eval()
        assert watermark_rate(module.cosines(encode(stranger, module.trigger(x)))) < 0.5
        copied = SSLGuard(DigitsCNN(32, 1, width=4, hidden=32), feature_dim=32, key_dim=16)
        copied.load_state_dict(module.state_dict())
        assert torch.equal(copied.cosines(encode(copied, copied.trigger(x))), module.cosines(marked))


def test_trigger_lies_in_the_image_space_and_under_the_mask(digits, guarded):
    module, _ = guarded
    x = digits.tensors("test")[0][:20]
    stamped = module.trigger(x).detach()
    changed = (stamped != x).any(0)
    assert changed.sum() <= round(0.35 * 256)
    assert (changed <= module.mask.bool()).all()
    assert module.mask.sum() == round(0.35 * 256)
    assert stamped.min() >= module.low.min() - 1e-6
    assert stamped.max() <= module.high.max() + 1e-6


def test_clean_encoder_and_batchnorm_stay_as_they_were(encoder, guarded):
    module, _ = guarded
    before = encoder.network.state_dict()
    assert all(torch.equal(value, module.clean.state_dict()[name]) for name, value in before.items())
    after = module.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "running" in name)
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_losses_by_hand():
    marked, clean = torch.tensor([1.0, 0.5]), torch.tensor([0.5, -1.0])
    assert marking_loss(marked, clean).item() == pytest.approx(0.25 + 0.625)
    assert watermark_rate(torch.tensor([0.5, 0.51, -0.9, 1.0])) == 0.5


def test_each_part_learns_from_its_own_terms(digits, encoder, monkeypatch):
    module = SSLGuard(encoder, seed=3)
    module.make_trigger((1, 16, 16), torch.tensor([-0.8]), torch.tensor([1.8]))
    module.train()
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **kwargs: logged.update(values))
    x = digits.tensors("victim")[0][:32]
    loss = module.training_step((x, None))
    assert not module.network.training
    assert not module.clean.training
    assert module.shadow.training

    def reaches(term, parameters):
        gradients = torch.autograd.grad(logged[term], list(parameters), retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)

    parts = {
        "encoder": module.network.parameters, "shadow": module.shadow.parameters,
        "decoder": module.decoder.parameters, "trigger": lambda: [module.pattern],
    }  # fmt: skip
    found = {
        term: {name for name, part in parts.items() if reaches(term, part())} for term in logged if term != "train_loss"
    }
    assert found == {
        "utility": {"encoder"},
        "mark": {"encoder", "decoder", "trigger"},
        "unique": {"decoder", "trigger"},
        "theft": {"shadow"},
        "survive": {"decoder", "trigger"},
    }
    torch.testing.assert_close(loss, sum(value for name, value in logged.items() if name != "train_loss"))


def test_secrets_follow_from_the_seed_alone(encoder):
    state = torch.get_rng_state()
    first, second, third = (SSLGuard(encoder, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.secret, second.secret)
    assert not torch.equal(first.secret, third.secret)
    assert torch.equal(first.shadow.classifier[3].weight, second.shadow.classifier[3].weight)
    assert not torch.equal(first.shadow.classifier[3].weight, encoder.network.classifier[3].weight)


def test_errors(encoder):
    with pytest.raises(MisconfigurationException, match="build_network"):
        SSLGuard(Encoder(DigitsCNN, feature_dim=8))
    with pytest.raises(ValueError, match="does not tell its number of features"):
        SSLGuard(nn.Flatten())
    with pytest.raises(ValueError, match="coverage=1"):
        SSLGuard(encoder, coverage=1)
    with pytest.raises(ValueError, match="trigger_lr=0"):
        SSLGuard(encoder, trigger_lr=0)
    with pytest.raises(MisconfigurationException, match="no trigger yet"):
        SSLGuard(encoder).trigger(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"reads 32 features, got shape \(4, 9\)"):
        SSLGuard(encoder).cosines(torch.zeros(4, 9))
