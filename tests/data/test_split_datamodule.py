import hashlib
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from meadef_lightning.data import DigitsDataModule, SplitDataModule, TensorImages
from meadef_lightning.data.loading import EpochShuffle

SPLITS = ("victim", "validation", "attacker", "verification", "test")


class Squares(SplitDataModule):
    """200 + 20 images of 2×8×8 in four classes; pixel (0, 0) of channel 0 is the image's number."""

    class_names = ("a", "b", "c", "d")
    image_shape = (2, 8, 8)
    own_test = True
    opened = 0

    def part(self, numbers):
        images = torch.randint(0, 256, (len(numbers), 2, 8, 8), generator=torch.Generator().manual_seed(0))
        images[:, 0, 0, 0] = numbers
        return TensorImages(images.to(torch.uint8), numbers % 4)

    def load(self):
        self.opened += 1
        return self.part(torch.arange(200)), self.part(torch.arange(200, 220)) if self.own_test else None


class Recorder(LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.layer = nn.Linear(128, 4)
        self.seen = []
        self.fail_at = fail_at

    def forward(self, x):
        return self.layer(x.flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append(x)
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.validated = batch[0]

    def test_step(self, batch, batch_idx):
        self.tested = batch[0]

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(epochs=1, callbacks=(), **kwargs):
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def numbers(x, data):
    return ((x[:, 0, 0, 0] * data.std[0] + data.mean[0]) * 255).round().long().tolist()


def test_splits_are_disjoint_balanced_and_normalised_by_the_victims_statistics():
    data = Squares(victim_size=80, attacker_size=60, verification_size=40, validation_size=20)
    parts = {split: data.tensors(split) for split in SPLITS}
    everything = [n for x, _ in parts.values() for n in numbers(x, data)]
    assert sorted(everything) == list(range(220))
    for x, y in parts.values():
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert torch.equal(torch.tensor(numbers(x, data)) % 4, y)
    assert torch.bincount(parts["victim"][1]).tolist() == pytest.approx([20] * 4, abs=2)
    x = parts["victim"][0]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(2))
    assert data.num_classes == 4


def test_test_split_is_drawn_where_there_is_none():
    class Carved(Squares):
        own_test = False

    data = Carved()
    everything = [n for split in SPLITS for n in numbers(data.tensors(split)[0], data)]
    assert sorted(everything) == list(range(200))
    assert len(data.dataset("test")) == 40
    assert data.split_summary()["disjoint"] is True


def test_given_statistics_are_used():
    data = Squares(mean=(0.0, 0.5), std=(1.0, 0.25))
    raw = data.dataset("victim").images[data.dataset("victim").indices] / 255
    torch.testing.assert_close(data.tensors("victim")[0][:, 1], (raw[:, 1] - 0.5) / 0.25)
    assert data.mean == (0.0, 0.5)
    assert data.std == (1.0, 0.25)


def test_data_is_opened_once():
    data = Squares()
    for stage in ("fit", "validate", "test", None):
        data.setup(stage)
    data.tensors("test")
    assert data.opened == 1


def test_summary_hashes_source_and_sorted_indices():
    data = Squares(seed=3)
    summary = data.split_summary()
    assert summary["data"] == "Squares"
    assert summary["seed"] == 3
    assert summary["disjoint"] is True
    assert summary["sources"]["train"] == data.dataset("victim").fingerprint()
    for split in SPLITS:
        rows = sorted(data.dataset(split).indices.tolist())
        source = summary["sources"]["test" if split == "test" else "train"]
        raw = source.encode() + b"".join(row.to_bytes(8, "little") for row in rows)
        assert summary["splits"][split] == {"size": len(rows), "sha256": hashlib.sha256(raw).hexdigest()}
    assert Squares(seed=3).split_summary() == summary
    assert Squares(seed=4).split_summary()["splits"]["victim"] != summary["splits"]["victim"]


def test_summary_notices_overlap():
    data = Squares()
    data.setup()
    data._datasets["attacker"].indices = data._datasets["victim"].indices[:5]
    assert data.split_summary()["disjoint"] is False


def test_trainer_uses_the_right_split_in_every_stage():
    data, model = Squares(batch_size=200), Recorder()
    run = trainer(enable_checkpointing=False)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    predicted = torch.cat(run.predict(model, datamodule=data))
    assert sorted(numbers(model.seen[0], data)) == sorted(data.dataset("victim").indices.tolist())
    assert numbers(model.validated, data) == data.dataset("validation").indices.tolist()
    assert numbers(model.tested, data) == list(range(200, 220))
    assert torch.equal(predicted, data.tensors("test")[1])


def test_another_split_can_be_trained_on():
    data, model = Squares(batch_size=200), Recorder()
    data.train_split = "attacker"
    trainer(enable_checkpointing=False).fit(model, datamodule=data)
    assert sorted(numbers(model.seen[0], data)) == sorted(data.dataset("attacker").indices.tolist())
    assert Squares.train_split == "victim"


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


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 5), (3, 3)])
def test_resumed_equals_uninterrupted_from_any_step(tmp_path, limit, batches):
    def data():
        return Squares(batch_size=20, victim_size=100)

    seed_everything(0, verbose=False)
    whole = Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(2, [keep], limit_train_batches=limit).fit(whole, datamodule=data())
    assert len(whole.seen) == 2 * batches
    for step in (1, batches - 1, batches, batches + 1):
        seed_everything(99, verbose=False)
        resumed = Recorder()
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


class Negative(nn.Module):
    def forward(self, x):
        return -x


def test_augmentation_meets_training_batches_only():
    data, model = Squares(batch_size=200, augmentation=Negative()), Recorder()
    run = trainer(enable_checkpointing=False)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    assert sorted(numbers(-model.seen[0], data)) == sorted(data.dataset("victim").indices.tolist())
    assert torch.equal(model.validated, data.tensors("validation")[0])
    assert torch.equal(model.tested, data.tensors("test")[0])
    batch = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(batch, 0) is not None


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")
def test_the_models_own_transfer_hook_is_still_called():
    class Doubling(Recorder):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return 2 * x, y

    data, model = Squares(batch_size=200, augmentation=Negative()), Doubling()
    trainer(enable_checkpointing=False).fit(model, datamodule=data)
    assert sorted(numbers(model.seen[0] / -2, data)) == sorted(data.dataset("victim").indices.tolist())
    assert torch.equal(model.validated, 2 * data.tensors("validation")[0])


def test_no_validation_split_means_no_validation():
    data, model = Squares(validation_size=0), Recorder()
    trainer(enable_checkpointing=False).fit(model, datamodule=data)
    assert not hasattr(model, "validated")
    with pytest.raises(ValueError, match="validation split is empty; set validation_size"):
        data.dataset("validation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be 0"),
        ({"victim_size": 0}, "victim_size=0 leaves nothing to train on"),
        ({"mean": (0.5, 0.5)}, "Give both mean and std"),
        ({"mean": (0.5, 0.5), "std": (1.0,)}, "one value a channel"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be positive"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Squares(**arguments)


def test_sizes_that_do_not_fit_are_named():
    data = Squares(victim_size=150, attacker_size=60, verification_size=0, validation_size=0)
    with pytest.raises(ValueError, match=r"ask for 210 samples .*victim=150, attacker=60.* but there are 200"):
        data.setup()


def test_absent_classes_are_named():
    class Five(Squares):
        class_names = ("a", "b", "c", "d", "unicorn")

    with pytest.raises(ValueError, match=r"'unicorn' have no image among the 101 of the victim split.*Raise victim"):
        Five().setup()


def test_labels_without_class_are_named():
    class Three(Squares):
        class_names = ("a", "b", "c")

    with pytest.raises(ValueError, match="has 3 classes but there is a label 3"):
        Three().setup()


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"no split 'train'; choose from \['attacker'"):
        Squares().dataset("train")
