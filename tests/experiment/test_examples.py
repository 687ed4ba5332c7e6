"""The scripts that people read first run, at a smaller size, and end as they say."""

import re
from pathlib import Path

import torch
import yaml
from meadef_lightning.experiments.examples import own_attack, your_own_trainer
from small import merged, write

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.oracle import Oracle
from meadef_lightning.victims.networks import DigitsCNN


def test_your_own_trainer(tmp_path):
    verdicts = your_own_trainer.main(tmp_path, epochs=8)
    assert verdicts["yours"].wsr > 0.5 > verdicts["innocent"].wsr
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"watermark.key.json", "yours.pt", "innocent.pt", "reference.pt", "verdicts.png"}


def test_an_attack_of_your_own(tmp_path):
    verdicts = own_attack.main(tmp_path, epochs=10, queries=1000)
    assert set(verdicts) == {"distillation", "mixup"}
    assert all(verdict.natural_accuracy > 0.3 for verdict in verdicts.values())
    assert (tmp_path / "own_attack.png").stat().st_size > 1000


def test_the_yaml_it_shows_builds_the_attack(tmp_path):
    shown = re.findall(r"^#     (.*)$", Path(own_attack.__file__).read_text(), re.MULTILINE)
    network = "{class_path: meadef_lightning.victims.networks.DigitsCNN}"
    config = merged("digits/supervised.yaml")
    config["extraction"] = yaml.safe_load("\n".join(shown).replace("network: ...", f"network: {network}"))
    (theft,) = load_experiment([write(config, tmp_path / "mine.yaml")]).build().extraction
    data, oracle = DigitsDataModule(), Oracle(DigitsCNN(10))
    attack = theft.queries(oracle, data)
    assert type(attack) is own_attack.MixupDataModule
    attack.prepare_data()
    attack.setup("fit")
    assert oracle.ledger.distinct == attack.queries_spent == attack.queries == 2000
    pool, (x, answers) = data.tensors("attacker")[0], next(iter(attack.train_dataloader()))
    assert x.min() >= pool.min()
    assert x.max() <= pool.max()  # mixes leave the range of their parents in no pixel
    torch.testing.assert_close(answers, oracle.victim.eval()(x).softmax(1).detach(), atol=1e-5, rtol=0)
