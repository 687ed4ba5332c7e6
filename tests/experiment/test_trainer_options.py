"""Where stages run: options for all Trainers at once, what torchrun started, and the device on which a victim answers."""

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small import merged, shrink, write

from meadef_lightning import processes
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run
from meadef_lightning.experiment.stages import extraction_stage
from meadef_lightning.experiment.training import check_processes
from meadef_lightning.experiment.weights import build_network

STAGES = ("victim", "patched", "extraction", "independent")


@pytest.fixture
def file(tmp_path):
    return write(shrink(merged("digits/supervised.yaml")), tmp_path / "experiment.yaml")


def options(experiment):
    """The Trainer's options of every stage."""
    found = []
    for name in STAGES:
        part = experiment.config(name)
        found += [stage["trainer"] for stage in (part if isinstance(part, list) else [part])]
    return found


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of one of eight processes on two machines."""
    for name, value in {
        "TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def test_one_option_for_every_stage_over_its_own(file):
    experiment = load_experiment([file], ["--trainer.devices", "2", "--trainer.max_epochs", "7"])
    assert len(options(experiment)) == 7
    assert all(stage["devices"] == 2 and stage["max_epochs"] == 7 for stage in options(experiment))
    assert experiment.config("victim.trainer")["limit_train_batches"] == 3  # the rest stays
    again = write({"trainer": {"max_epochs": 7, "devices": 2}}, file.with_name("more.yaml"))
    assert options(load_experiment([file, again])) == options(experiment)


def test_without_it_nothing_changes(file):
    """So that directories of earlier runs are still recognised."""
    plain = load_experiment([file])
    assert plain.config("victim.trainer") == shrink(merged("digits/supervised.yaml"))["victim"]["trainer"]
    other = load_experiment([file], ["--trainer.devices", "2"])
    assert plain.hash_of(plain.config("victim")) != other.hash_of(other.config("victim"))
    assert plain.hash_of(plain.config("verification")) == other.hash_of(other.config("verification"))


def test_what_torchrun_started_is_used(file, torchrun):
    for stage in options(load_experiment([file])):
        assert (stage["devices"], stage["num_nodes"], stage["strategy"]) == (4, 2, "ddp")
    sharded = load_experiment([file], ["--trainer.strategy", "fsdp2"])
    assert {stage["strategy"] for stage in options(sharded)} == {"fsdp2"}
    own = load_experiment([file], ["--victim.trainer.devices", "1"])
    assert "strategy" not in own.config("victim.trainer")


def test_one_process_of_torchrun_is_no_team(file, torchrun, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.started_from_outside() == {}


def test_another_number_of_processes_than_torchruns_is_refused(file, torchrun, tmp_path):
    experiment = load_experiment([file], ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto"])  # fmt: skip
    with pytest.raises(MisconfigurationException, match=r"torchrun started 8 processes, but .* use one. Leave devices"):
        run(experiment, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_know_one_training_only_are_refused(file, tmp_path, strategy):
    """Raised where the training comes that wants them."""
    experiment = load_experiment([file], ["--trainer.strategy", strategy, "--trainer.devices", "2"])
    with pytest.raises(MisconfigurationException, match=f"{strategy}.*know a single training only.*Use ddp"):
        run(experiment, tmp_path / "out")


def test_a_stage_with_processes_of_its_own_is_refused(file, tmp_path):
    experiment = load_experiment([file])
    trainer = {**experiment.config("victim.trainer"), "devices": 2, "strategy": "ddp"}
    with pytest.raises(
        MisconfigurationException, match=r"wants 2 process\(es\), but 1 run the experiment.*--trainer.devices"
    ):
        check_processes(trainer)
    check_processes(experiment.config("victim.trainer"))


class SeenError(Exception):
    """The oracle, as the attack gets it."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_victim_answers_on_the_trainers_device(file, tmp_path, device):
    """On the meta device, where nothing is computed but which every machine has, in the place of a GPU."""
    spec = load_experiment([file]).build()
    spec.data.setup()
    attack = spec.extraction[0]
    if device == "meta":
        strategy = SingleDeviceStrategy(torch.device("meta"), accelerator=CPUAccelerator())
        attack.trainer = {"max_epochs": 1, "strategy": strategy}

    def attacked(oracle, data):
        raise SeenError({weight.device.type for weight in oracle.victim.parameters()})

    attack.queries = attacked
    victim = spec.victim.model
    build_network(victim, spec.data)
    with pytest.raises(SeenError) as seen:
        extraction_stage(tmp_path / "theft", attack, {}, lambda: victim, spec.data, 0, {})
    assert seen.value.args[0] == {device}


def test_alone_is_one_process():
    assert (processes.count(), processes.rank()) == (1, 0)
    assert processes.first(lambda: 3) == processes.in_turn(lambda: 3) == 3
    with processes.alone():
        assert processes.count() == 1
        assert processes.launch({"devices": 2, "strategy": "ddp"}, lambda: "here") == "here"
    assert processes.other_failure(ValueError("mine")) is None


def test_exceptions_are_made_sendable():
    class LocalError(Exception):
        pass

    sent = processes._sendable(LocalError("told"))
    assert (type(sent), str(sent)) == (RuntimeError, "LocalError: told")
    own = ValueError("as it is")
    assert processes._sendable(own) is own


def test_a_device_is_named_for_a_trainer_of_one_process():
    assert processes.one_process(torch.device("cuda", 3))["devices"] == [3]
    assert processes.one_process(torch.device("cpu")) == {
        "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto",
    }  # fmt: skip
