"""SimCLR: the loss against its formula, views from either side, two processes against one, and a training that learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launched import ALONE, run_workers, two_ranks
from lightning.pytorch import Trainer, seed_everything
from ssl_modules import SILENT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.victims.networks import MLP, DigitsCNN
from meadef_lightning.victims.probes import KNNProbe
from meadef_lightning.victims.simclr import SimCLRVictim, feature_spread
from meadef_lightning.watermark import WatermarkKey
from meadef_lightning.watermark.feature_callback import FeatureWatermarkCallback

HERE = Path(__file__).parent


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 1 of the SimCLR paper, pair by pair."""
    z = [row / row.norm() for row in torch.cat([first, second])]
    n, total = len(first), torch.zeros(())
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = [torch.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i]
        total = total - torch.log(torch.exp(z[i] @ z[j] / temperature) / torch.stack(others).sum())
    return total / (2 * n)


def victim(**options: object) -> SimCLRVictim:
    return SimCLRVictim(
        MLP(6, 1, hidden=[12], grid=8), feature_dim=6, **{"projection_head": nn.Linear(6, 4), **options}
    )


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_nt_xent_of_the_projected_views(temperature):
    module = victim(temperature=temperature)
    first, second = torch.randn(2, 5, 1, 8, 8)
    expected = nt_xent(*(module.projection_head(module(view)) for view in (first, second)), temperature)
    for batch in (((first, second), torch.zeros(5)), [[first, second], torch.zeros(5), "names"]):
        torch.testing.assert_close(module.training_step(batch), expected)


def test_views_are_made_of_plain_batches_and_labels_are_not_looked_at():
    class Negatives(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    module = victim(views=Negatives())
    x = torch.randn(5, 1, 8, 8)
    expected = nt_xent(module.projection_head(module(x)), module.projection_head(module(-x)), 0.5)
    for batch in ((x, torch.arange(5)), (x, None), x):
        torch.testing.assert_close(module.training_step(batch), expected)


def test_another_number_of_views_is_refused():
    x = torch.randn(4, 1, 8, 8)
    with pytest.raises(ValueError, match="contrasts two views of each image, but the batch came with 3"):
        victim().training_step(([x, x, x], torch.zeros(4)))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"temperature=0\.0 must be positive"):
        victim(temperature=0.0)
    with pytest.raises(ValueError, match="must return features of shape"):
        SimCLRVictim(MLP(6, 1, grid=8), feature_dim=5).training_step((torch.randn(4, 1, 8, 8), None))


def test_spread_is_one_for_even_directions_and_zero_for_one_point():
    even = torch.cat([torch.eye(8), -torch.eye(8)])
    assert feature_spread(even) == pytest.approx(1.0)
    assert feature_spread(torch.ones(4, 8) * torch.arange(1, 5)[:, None]) == pytest.approx(0.0, abs=1e-3)


def test_the_watermark_is_handed_to_the_trainer_and_stays_out_of_the_checkpoint(tmp_path):
    key = WatermarkKey((1, 3), 4, seed=7, num_classes=5, salt="5a17" * 8)
    module = victim(watermark=FeatureWatermarkCallback(key, start=0.0, samples=2, batchnorm="running"))
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 5
    trainer = Trainer(max_epochs=1, **SILENT)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=10))
    assert trainer.callback_metrics["watermark/ver"] > 0
    assert module.watermark.objective.steps == 2
    trainer.save_checkpoint(tmp_path / "victim.ckpt", weights_only=True)
    text = (tmp_path / "victim.ckpt").read_bytes()
    assert b"5a17" not in text
    hparams = torch.load(tmp_path / "victim.ckpt", weights_only=True)["hyper_parameters"]
    assert set(hparams) == {"feature_dim", "in_channels", "temperature", "gather_distributed"}


@pytest.mark.slow
def test_digits_are_told_apart_without_labels():
    """Neighbours of an encoder trained for a moment beat those of an untrained one."""
    accuracy = {}
    for rate in (0.0, 3e-3):
        seed_everything(0, verbose=False)
        module = SimCLRVictim(
            lambda features, channels: DigitsCNN(features, channels, width=8, hidden=32),
            feature_dim=16,
            optimizer=lambda parameters, rate=rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        )
        trainer = Trainer(max_epochs=6, callbacks=[KNNProbe(neighbours=5)], **SILENT)
        trainer.fit(module, datamodule=DigitsDataModule(image_size=8))
        accuracy[rate] = float(trainer.callback_metrics["knn_accuracy"])
        assert trainer.callback_metrics["val_spread"] > 0
    assert accuracy[3e-3] > accuracy[0.0] + 0.05
    assert accuracy[3e-3] > 0.7


# ---- two processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The same training on two processes, and on one with their batches joined."""
    folder = tmp_path_factory.mktemp("simclr")
    workers = [(env, []) for env in (*two_ranks(), ALONE)]
    logs = run_workers(HERE / "simclr_worker.py", folder, workers)
    files = [folder / name for name in ("2.0.json", "2.1.json", "1.0.json")]
    assert all(path.is_file() for path in files), logs
    return [json.loads(path.read_text()) for path in files]


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs torch with gloo"
)


@needs_gloo
@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_weights_of_one_with_the_joined_batch(processes):
    first, second, joined = (found["True"] for found in processes)
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(joined["losses"], abs=1e-5)
    assert first["weights"] == second["weights"]
    assert first["weights"] == pytest.approx(joined["weights"], abs=1e-5)


@needs_gloo
@pytest.mark.slow
def test_without_gathering_they_would_not(processes):
    """The control of the test above: each process then has fewer negatives, and a smaller loss."""
    first, second, joined = (found["False"] for found in processes)
    assert first["losses"][0] + second["losses"][0] < 2 * joined["losses"][0] - 0.2
    assert first["weights"] != pytest.approx(joined["weights"], abs=1e-3)
