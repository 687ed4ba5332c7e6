"""Stages run where their Trainer would: thefts, verdicts, removals and searches on the second device, with the CPU's results."""

from __future__ import annotations

import copy

import pytest
import torch
from device_cases import CLASSES, Blobs, assert_same, network, there
from lightning.pytorch import Trainer, seed_everything
from second_device import SECOND
from small import merged, shrink, write
from torch import nn

from meadef_lightning import extraction, processes
from meadef_lightning.data.augmentation import RandomShiftFlip
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.robustness import Robustness
from meadef_lightning.experiment.seed_run import SeedRun
from meadef_lightning.experiment.verdict_stage import Judge
from meadef_lightning.extraction import DataFreeDataModule, DFMEStudent, EncoderStudent, MAZEStudent, Noise, Student
from meadef_lightning.oracle import Features, Oracle
from meadef_lightning.verification import verify
from meadef_lightning.verification.answers import ask_everything
from meadef_lightning.verification.crafted_sources import adversarial_sources
from meadef_lightning.verification.features import feature_verdict
from meadef_lightning.verification.relabelling import relabelled
from meadef_lightning.victims.views import RandomView
from meadef_lightning.watermark import WatermarkKey

torch.set_num_threads(1)


def test_the_trainers_options_say_the_device(second):
    assert processes.device_of({}) == SECOND
    assert processes.device_of({"devices": 1, "max_epochs": 3, "accelerator": "auto"}) == SECOND
    assert processes.device_of({"accelerator": "cpu", "devices": 1}) == torch.device("cpu")


def factory(outputs, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, outputs))


SMALL = {"latent": 4, "width": 2, "student_steps": 1}
THEFTS = {
    "distillation": (Student(factory), extraction.DistillationDataModule, {"views": 2, "augmentation": RandomShiftFlip()}),
    "jacobian": (Student(factory), extraction.JacobianDataModule, {"seeds": 8, "rounds": 1, "epochs": 1}),
    "targeted": (Student(factory), extraction.TargetedJacobianDataModule, {"seeds": 8, "rounds": 1, "epochs": 1, "steps": 1}),
    "knockoff": (Student(factory), extraction.AdaptiveKnockoffDataModule, {"queries": 30, "rounds": 2, "interim_epochs": 1}),
    "composite": (Student(factory), extraction.CompositeDataModule, {"augmentation": RandomShiftFlip()}),
    "active": (Student(factory), extraction.ActiveThiefDataModule, {"queries": 20, "rounds": 1, "epochs": 1}),
    "copycat": (Student(factory), extraction.CopycatDataModule, {"pool": Noise(30)}),
    "dfme": (DFMEStudent(factory, **SMALL), DataFreeDataModule, {"batch_size": 4, "iterations_per_epoch": 2}),
    "maze": (MAZEStudent(factory, **SMALL, replay_steps=1), DataFreeDataModule, {"batch_size": 4, "iterations_per_epoch": 2}),
    "encoder": (EncoderStudent(factory, augmentation=RandomView()), extraction.StolenEncoderDataModule, {}),
}  # fmt: skip
QUIET = {
    "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The victim named")
@pytest.mark.parametrize("name", THEFTS)
def test_a_theft_is_trained_and_asked_where_the_trainer_is(name, second):
    student, attack, options = THEFTS[name]
    weights = []
    for place in ("cpu", "auto"):
        seed_everything(0, verbose=False)
        thief, trainer = copy.deepcopy(student), Trainer(**QUIET, accelerator=place)
        victim, policy = network(), Features() if name == "encoder" else None
        second.convolutions["cpu"] = 0
        data = attack(Oracle(victim, policy, device=trainer.strategy.root_device), Blobs(), **options)
        trainer.fit(thief, datamodule=data)
        assert (second.convolutions["cpu"] == 0) == (place == "auto")
        weights.append(thief.state_dict())
    assert_same(weights[1], weights[0])


def test_a_suspect_is_asked_on_the_trainers_device(second):
    key, data = WatermarkKey.draw(CLASSES, "a secret"), Blobs()
    options = {"samples": 20, "decoys": 50, "decoy_samples": 2}
    found = []
    for accelerator, model in (("cpu", network()), ("auto", network()), ("auto", there(network()))):
        home = model[0].weight.device
        second.convolutions["cpu"] = 0
        verdict, responses = verify(model, key, data, accelerator=accelerator, **options)
        assert (second.convolutions["cpu"] == 0) == (accelerator == "auto")
        assert model[0].weight.device == home
        found.append([verdict.to_dict(), responses.counts])
    assert found[0][0] == found[1][0] == found[2][0]
    assert_same(found[1:], [found[0]] * 2, torch.device("cpu"))


def test_features_labels_and_tables_are_asked_where_the_model_is(second):
    key, data = WatermarkKey.draw(CLASSES, "a secret"), Blobs()
    data.setup("fit")
    found = []
    for model in (network(), there(network())):
        second.convolutions["cpu"] = 0
        translated, told = relabelled(model, data.tensors("test"), CLASSES, minimum_agreement=0.01)
        features = feature_verdict(model, key, data, samples=20, decoys=50, decoy_samples=2)
        x, y = (part.to(model[0].weight.device) for part in data.tensors("verification"))
        crafted = adversarial_sources([model], x, y, key, steps=2)
        table = ask_everything(model, data, samples=4)
        found.append([told.to_dict(), translated(x).cpu(), features.to_dict(), crafted.cpu(), table.answers])
        assert (second.convolutions["cpu"] == 0) == (model[0].weight.device == SECOND)
    assert_same(found[1], found[0])


# ---- a whole chain


def chain(file, output):
    """Runs every stage of a seed but the report; returns what the report would tell."""
    run = SeedRun(load_experiment([file]), output, 0)
    run.victim("reference")
    made = {name: make() for name, make in run.suspects()}
    judge = Judge(run)
    rows = [judge.row(suspect) for suspect in made.values()]
    fight = Robustness(run, made)
    for stage in fight.removals():
        row, scrubbed = fight.remove(*stage)
        rows += [row, judge.row(scrubbed)]
    return rows + [fight.search(*stage) for stage in fight.searches()]


def test_all_stages_of_an_encoder_run_on_the_device(second, tmp_path, monkeypatch):
    """Trainings, thefts, verdicts, the probes that they stand on, removals and searches; and to read them again needs no device."""
    config = shrink(merged("digits/simclr.yaml"))
    config["downstream"] = {"weight_decay": 10.0}  # probes that are fitted in a few steps
    config["extraction"] = [theft for theft in config["extraction"] if theft["name"] == "downstream-labels"]
    config["removal"] = [
        {"name": "ftll", "method": {"class_path": "meadef_lightning.removal.FineTuning", "init_args": {"mode": "FTLL"}}}
    ]
    config["detection"] = [
        {"name": "strip", "method": {"class_path": "meadef_lightning.detection.STRIP", "init_args": {"overlays": 3}}}
    ]
    for training in [config["victim"], *config["extraction"], *config["independent"]]:
        del training["trainer"]["accelerator"]  # Lightning's choice, then
    file = write(config, tmp_path / "experiment.yaml")
    rows = chain(file, tmp_path / "out")
    assert second.convolutions["cpu"] == 0
    names = [getattr(row, "name", "search") for row in rows]
    assert names == ["victim", "clean", "downstream-labels", "independent", "victim.ftll", "victim.ftll", "search"]

    def no_device(options):
        raise AssertionError("A finished chain was asked where it would run.")

    monkeypatch.setattr(processes, "device_of", no_device)
    assert chain(file, tmp_path / "out") == rows
