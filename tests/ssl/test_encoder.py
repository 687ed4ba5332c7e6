"""The base of encoders: sizes from wherever they are known, features out, and checkpoints that load without data."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.networks import MLP, DigitsCNN


def small(outputs: int, in_channels: int) -> nn.Module:
    return DigitsCNN(outputs, in_channels, width=4, hidden=8)


class Imitation(Encoder):
    """The least that a stolen encoder is: features regressed on given ones."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


class Answers(LightningDataModule):
    image_shape = [2, 8, 8]  # any sequence will do
    feature_dim = 5

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(16, 2, 8, 8, generator=generator), torch.randn(16, 5, generator=generator)
        return DataLoader(TensorDataset(*data), batch_size=8)


def test_sizes_come_from_the_data_module_and_go_into_checkpoints(tmp_path):
    encoder = Imitation(small)
    trainer = Trainer(max_epochs=1, **SILENT)
    trainer.fit(encoder, datamodule=Answers())
    assert (encoder.feature_dim, encoder.hparams["in_channels"]) == (5, 2)
    trainer.save_checkpoint(tmp_path / "encoder.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "encoder.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"feature_dim": 5, "in_channels": 2}
    loaded = Imitation(small, **checkpoint["hyper_parameters"])
    loaded.build_network()
    loaded.load_state_dict(checkpoint["state_dict"])
    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(loaded.eval()(x), encoder.eval()(x))


def test_the_users_sizes_go_before_the_datas():
    encoder = Imitation(small, feature_dim=7)
    encoder.build_network(in_channels=3, feature_dim=5)
    assert encoder(torch.randn(4, 3, 8, 8)).shape == (4, 7)
    assert encoder.predict_step((torch.randn(4, 3, 8, 8), torch.zeros(4))).shape == (4, 7)


def test_a_module_that_is_ready_keeps_its_weights_and_its_features_are_flattened():
    backbone = nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1))
    encoder = Encoder(backbone)
    encoder.configure_model()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(encoder(x), backbone(x)[:, :, 0, 0])
    assert encoder.feature_dim is None


@pytest.mark.parametrize(
    ("network", "feature_dim", "message"),
    [
        (nn.Flatten(), 9, r"must return features of shape \(2, 9\), got \(2, 64\)"),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(0, (1, 2)), nn.Flatten(0)), None, r"\(2, D\), got \(128,\)"),
        (nn.LSTM(8, 3), None, "got tuple"),
    ],
)
def test_other_outputs_are_refused(network, feature_dim, message):
    x = torch.randn(2, 8, 8) if isinstance(network, nn.LSTM) else torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        Encoder(network, feature_dim)(x)


@pytest.mark.parametrize(
    ("encoder", "sizes", "message"),
    [
        (
            Encoder(small),
            {"in_channels": 1},
            "needs feature_dim, which was not given, and no data module with feature_dim",
        ),
        (Encoder(small, 5), {}, "needs in_channels, which was not given, and no data module with image_shape"),
        (Encoder(lambda dim: MLP(dim), 5), {"in_channels": 1}, "positional arguments feature_dim=5 and in_channels=1"),
    ],
)
def test_what_is_missing_is_named(encoder, sizes, message):
    with pytest.raises(MisconfigurationException, match=message):
        encoder.build_network(**sizes)


def test_without_a_network_there_are_no_features():
    with pytest.raises(MisconfigurationException, match="has no network yet"):
        Encoder(small, 5, 1)(torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="feature_dim=0 must be at least 1"):
        Encoder(small, 0)


def test_classifiers_and_encoders_make_their_optimisers_alike():
    """One cycle over the run by default, for both from the same code: the learning rates of a run agree step for step."""

    class Recorded:
        rates: list[float]

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return F.mse_loss(self(batch[0]), batch[1])

    class Stolen(Recorded, Encoder):
        rates: list[float] = []

    class Supervised(Recorded, Classifier):
        rates: list[float] = []

    for module in (Stolen(small), Supervised(small, num_classes=5)):
        Trainer(max_epochs=5, **SILENT).fit(module, datamodule=Answers())
    assert Stolen.rates == Supervised.rates
    assert len(set(Stolen.rates)) == 10
    assert Stolen.rates[2] == pytest.approx(3e-3) == max(Stolen.rates)


def test_objects_stay_out_of_the_hyperparameters():
    class WithPart(Encoder):
        objects = (*Encoder.objects, "part")

        def __init__(self, network: nn.Module, part: nn.Module, amount: float = 2.0) -> None:
            super().__init__(network)

    encoder = WithPart(nn.Flatten(), nn.Identity())
    assert dict(encoder.hparams) == {"feature_dim": None, "in_channels": None, "amount": 2.0}
    torch.save(dict(encoder.hparams), buffer := io.BytesIO())
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
