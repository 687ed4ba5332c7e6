"""The order of training batches: a function of seed and epoch, which an interrupted run goes on with."""

import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from squares import Recorder, Squares, numbers, trainer

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.loading import EpochShuffle


def test_training_is_shuffled_by_epoch_and_global_seed():
    data = Squares(batch_size=200)

    def orders(seed):
        seed_everything(seed, verbose=False)
        model = Recorder()
        trainer(2, enable_checkpointing=False).fit(model, datamodule=data)
        return [numbers(x, data) for x in model.seen]

    first, again, other = orders(1), orders(1), orders(2)
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_loading_leaves_the_global_random_state_alone():
    data = Squares(batch_size=50)
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_loop_reshuffles():
    loader = Squares(batch_size=200).train_dataloader()
    assert isinstance(loader.sampler, EpochShuffle)
    assert not torch.equal(next(iter(loader))[0], next(iter(loader))[0])


class OneCycle(Recorder):
    """Asks for the length of the run before Lightning restores the loader's state, which it then does not hand back."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("kind", [Recorder, OneCycle])
@pytest.mark.parametrize(("limit", "batches"), [(1.0, 5), (3, 3)])
def test_resumed_equals_uninterrupted_from_any_step(tmp_path, limit, batches, kind):
    def data():
        return Squares(batch_size=20, victim_size=100)

    seed_everything(0, verbose=False)
    whole = kind()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(2, [keep], limit_train_batches=limit).fit(whole, datamodule=data())
    assert len(whole.seen) == 2 * batches
    for step in (1, batches - 1, batches, batches + 1):
        seed_everything(99, verbose=False)
        resumed = kind()
        run = trainer(2, enable_checkpointing=False, limit_train_batches=limit)
        run.fit(resumed, datamodule=data(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert len(resumed.seen) == 2 * batches - step
        assert all(torch.equal(a, b) for a, b in zip(resumed.seen, whole.seen[step:], strict=True))
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("fail_at", [2, 4, 5, 6])
def test_nothing_is_lost_or_repeated_after_an_exception(tmp_path, fail_at):
    def data():
        return Squares(batch_size=20, victim_size=100)

    seed_everything(0, verbose=False)
    whole = Recorder()
    trainer(2, enable_checkpointing=False).fit(whole, datamodule=data())
    seed_everything(0, verbose=False)
    broken = Recorder(fail_at)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(2, [OnExceptionCheckpoint(tmp_path)]).fit(broken, datamodule=data())
    resumed = Recorder()
    (checkpoint,) = tmp_path.glob("*.ckpt")
    trainer(2, enable_checkpointing=False).fit(resumed, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
    seen = broken.seen + resumed.seen
    assert all(torch.equal(a, b) for a, b in zip(seen, whole.seen, strict=True))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


TWO_PROCESSES = """
import json, sys, torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from meadef_lightning.data import DigitsDataModule

class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(256, 10)
        self.seen = [[], []]
    def training_step(self, batch, batch_idx):
        self.seen[self.current_epoch] += batch[0].flatten(1).double().sum(1).tolist()
        return self.layer(batch[0].flatten(1)).square().mean()
    def on_train_end(self):
        with open(f"{sys.argv[1]}/{self.global_rank}.json", "w") as file:
            json.dump(self.seen, file)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    seed_everything(0)
    data = DigitsDataModule(victim_size=600, batch_size=64)
    Trainer(
        max_epochs=2, accelerator="cpu", strategy="ddp_fork", devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
    ).fit(Recorder(), datamodule=data)
"""


@pytest.mark.slow
def test_two_processes_share_the_victim_split(tmp_path):
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    subprocess.run([sys.executable, tmp_path / "run.py", tmp_path], check=True, capture_output=True, timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    victim = DigitsDataModule(victim_size=600).tensors("victim")[0].flatten(1).double().sum(1)
    for epoch in (0, 1):
        assert sorted(first[epoch] + second[epoch]) == pytest.approx(sorted(victim.tolist()), abs=1e-3)
    assert first[0] != first[1]


def test_resuming_on_other_images_warns(tmp_path):
    run = trainer(enable_checkpointing=False)
    run.fit(Recorder(), datamodule=Squares(seed=0))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="trained on other images.*Use the seed and sizes of the first run"):
        trainer(2, enable_checkpointing=False).fit(
            Recorder(), datamodule=Squares(seed=1), ckpt_path=tmp_path / "a.ckpt"
        )


def test_a_new_fit_forgets_the_seed_of_a_resumed_one():
    data = Squares(batch_size=200)
    torch.manual_seed(5)
    fresh = next(iter(data.train_dataloader()))[0]
    data.load_state_dict({**data.state_dict(), "shuffle_seed": 6})
    assert not torch.equal(next(iter(data.train_dataloader()))[0], fresh)
    data.teardown("fit")
    assert torch.equal(next(iter(data.train_dataloader()))[0], fresh)


def test_a_position_that_a_test_loaded_is_forgotten(tmp_path):
    data = Squares(batch_size=20, victim_size=100)
    keep = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3)
    trainer(callbacks=[keep]).fit(Recorder(), datamodule=data)
    trainer(enable_checkpointing=False).test(
        Recorder(), datamodule=data, ckpt_path=tmp_path / "mid.ckpt", weights_only=True, verbose=False
    )
    model = Recorder()
    trainer(enable_checkpointing=False).fit(model, datamodule=data)
    assert len(model.seen) == 5
