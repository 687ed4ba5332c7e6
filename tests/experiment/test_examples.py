"""The scripts that people read first run, at a smaller size, and end as they say."""

from meadef_lightning.experiments.examples import own_attack, your_own_trainer


def test_your_own_trainer(tmp_path):
    verdicts = your_own_trainer.main(tmp_path, epochs=8)
    assert verdicts["yours"].wsr > 0.5 > verdicts["innocent"].wsr
    assert {"watermark.key.json", "yours.pt", "innocent.pt", "reference.pt"} == {p.name for p in tmp_path.iterdir()}


def test_an_attack_of_your_own(tmp_path):
    verdicts = own_attack.main(tmp_path, epochs=10, queries=1000)
    assert set(verdicts) == {"distillation", "mixup"}
    assert all(verdict.natural_accuracy > 0.3 for verdict in verdicts.values())
    assert (tmp_path / "own_attack.png").stat().st_size > 1000
