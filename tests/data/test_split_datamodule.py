import hashlib

import pytest
import torch
from squares import Recorder, Squares, numbers, trainer
from torch import nn

SPLITS = ("victim", "validation", "attacker", "verification", "test")


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


def test_an_augmentation_with_a_state_goes_to_the_images():
    class Buffered(Negative):
        moved = 0

        def to(self, device):
            self.moved += 1
            return super().to(device)

    data = Squares(batch_size=100, augmentation=Buffered())
    trainer(enable_checkpointing=False).fit(Recorder(), datamodule=data)
    assert data.augmentation.moved > 0


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


def test_statistics_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="mean and std have 3 values, but the images have 2 channels"):
        Squares(mean=(0.5,) * 3, std=(0.5,) * 3).setup()
    Squares(mean=(0.5,), std=(0.5,)).setup()


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
