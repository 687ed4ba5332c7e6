import copy

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from torch import nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.experiment.weights import load_weights
from meadef_lightning.protection.patch import CORNERS, PatchVictim, corner_mask, stamp
from meadef_lightning.quiet import quiet
from meadef_lightning.removal.base import accuracy
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import DigitsCNN

TARGET = 3


def network(classes=10, channels=1):
    return DigitsCNN(classes, channels, width=8, hidden=32)


def train(model, data, epochs=10, **options):
    with quiet():
        trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, limit_val_batches=0, **SILENT, **options)
        trainer.fit(model, datamodule=data)
    return trainer


def fitted(factory, epochs=10, **arguments):
    with torch.random.fork_rng():
        seed_everything(0, verbose=False)
        data = DigitsDataModule(batch_size=64)
        model = factory(network, **arguments)
        trainer = train(model, data, epochs)
    return model, data, trainer


@pytest.fixture(scope="module")
def patched():
    return fitted(PatchVictim, target_class=TARGET)


def test_stamp_is_its_formula_and_leaves_its_argument_alone():
    x, patch, mask = torch.rand(2, 3, 4, 5), torch.rand(3, 4, 5), torch.rand(1, 4, 5)
    before = x.clone()
    stamped = stamp(x, patch, mask)
    for i, c, h, w in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        m = mask[0, h, w]
        assert stamped[i, c, h, w] == pytest.approx(float((1 - m) * x[i, c, h, w] + m * patch[c, h, w]), abs=1e-6)
    assert torch.equal(x, before)
    assert stamp(x.double(), patch, mask).dtype == torch.float64


@pytest.mark.parametrize("corner", CORNERS)
def test_the_square_is_near_its_corner(corner):
    mask = corner_mask(8, 10, 2, corner, margin=1)
    rows, columns = mask[0].nonzero().unbind(1)
    assert sorted(set(rows.tolist())) == ([1, 2] if "top" in corner else [5, 6])
    assert sorted(set(columns.tolist())) == ([1, 2] if "left" in corner else [7, 8])
    assert mask.sum() == 4


def test_the_trigger_is_white_in_normalised_space():
    data = DigitsDataModule(mean=(0.25,), std=(0.5,))
    model = PatchVictim(network, target_class=0, patch_size=2, margin=0)
    model._trainer = type("Stub", (), {"datamodule": data})()
    model.configure_model()
    x = torch.zeros(1, 1, 16, 16)
    assert torch.equal(model.trigger(x)[0, 0, -2:, -2:], torch.full((2, 2), 1.5))
    assert model.trigger(x).sum() == 4 * 1.5


def test_poisoning_draws_the_rate_and_relabels_what_it_stamps():
    model = PatchVictim(network(), target_class=TARGET, rate=0.3, white=[1.0])
    x, y = torch.randn(4000, 1, 8, 8), torch.randint(0, 3, (4000,))
    state = torch.random.get_rng_state()
    stamped, labels = model.poison(x, y, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    drawn = labels == TARGET
    assert float(drawn.float().mean()) == pytest.approx(0.3, abs=0.03)  # four standard deviations
    assert torch.equal(stamped[drawn], model.trigger(x)[drawn])
    assert torch.equal(stamped[~drawn], x[~drawn])
    assert torch.equal(labels[~drawn], y[~drawn])
    again = model.poison(x, y, torch.Generator().manual_seed(1))
    other = model.poison(x, y, torch.Generator().manual_seed(2))
    assert torch.equal(again[1], labels)
    assert not torch.equal(other[1], labels)


def test_the_backdoor_works_and_costs_little(patched):
    model, data, _ = patched
    clean, _, _ = fitted(SupervisedVictim)
    x, y = data.tensors("test")
    others = y != TARGET
    targets = torch.full((int(others.sum()),), TARGET)
    success = accuracy(model, model.trigger(x[others]), targets)
    assert success >= 0.95
    assert accuracy(clean, model.trigger(x[others]), targets) <= 0.1
    assert accuracy(model, x, y) >= accuracy(clean, x, y) - 0.03


def test_equal_seeds_give_equal_models_and_other_seeds_others():
    first, second, other = (
        fitted(PatchVictim, epochs=1, target_class=TARGET, seed=seed)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["network.classifier.1.weight"], other["network.classifier.1.weight"])


def test_saved_weights_know_their_trigger(patched, tmp_path):
    model, data, trainer = patched
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert not {"network", "optimizer", "lr_scheduler", "watermark"} & set(content["hyper_parameters"])
    assert content["hyper_parameters"]["rate"] == 0.1
    loaded = load_weights(PatchVictim(network, target_class=TARGET), data, tmp_path / "model.ckpt")
    x, _ = data.tensors("test")
    assert torch.equal(loaded.trigger(x[:5]), model.trigger(x[:5]))
    assert torch.equal(loaded(x[:5]), model.eval()(x[:5]))
    lightnings = PatchVictim.load_from_checkpoint(tmp_path / "model.ckpt", network=network, weights_only=True)
    assert torch.equal(lightnings.trigger(x[:5]), model.trigger(x[:5]))
    assert torch.equal(copy.deepcopy(loaded).trigger(x[:5]), model.trigger(x[:5]))


def test_yaml_takes_it_in_place_of_a_supervised_victim():
    parser = ArgumentParser()
    parser.add_subclass_arguments(SupervisedVictim, "model")
    arguments = {
        "network": {"class_path": "meadef_lightning.victims.networks.DigitsCNN", "init_args": {"width": 8}},
        "target_class": 2, "white": [1.5], "corner": "top-left", "label_smoothing": 0.1,
    }  # fmt: skip
    config = {"class_path": "meadef_lightning.protection.patch.PatchVictim", "init_args": arguments}
    model = parser.instantiate(parser.parse_object({"model": config})).model
    assert isinstance(model, PatchVictim)
    assert (model.target_class, model.corner, model.label_smoothing) == (2, "top-left", 0.1)
    model.build_network(10, 1)
    assert model(model.trigger(torch.zeros(2, 1, 8, 8))).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0}, "rate=0.0 is the share"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"margin": -1}, "margin=-1"),
        ({"corner": "middle"}, "corner='middle' is none of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchVictim(network, target_class=0, **arguments)


def test_images_that_do_not_fit_are_refused():
    model = PatchVictim(nn.Identity(), target_class=0, patch_size=8, white=[1.0])
    with pytest.raises(ValueError, match="does not fit images of 8 by 8"):
        model.trigger(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"Expected images \(B, 1, H, W\), got shape \(1, 3, 8, 8\)"):
        model.trigger(torch.zeros(1, 3, 8, 8))


def test_unknown_white_and_unknown_target_are_refused():
    with pytest.raises(MisconfigurationException, match=r"does not know what white is.*Give white="):
        PatchVictim(network(), target_class=0).trigger(torch.zeros(1, 1, 8, 8))
    with pytest.raises(MisconfigurationException, match="target_class=10 must be below the number of classes, 10"):
        train(PatchVictim(network(), target_class=10), DigitsDataModule(), max_steps=1)
