"""Several keys in one model: which sets are tried, the table on made-up rows, and a real study at test size beside what `meadef run` trains."""

import csv
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks import several_keys
from meadef_lightning.experiments.benchmarks.several_keys import Row, rings, table
from scipy import stats
from small import merged, shrink, write

from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.seed_run import SeedRun
from meadef_lightning.verification import verify
from meadef_lightning.watermark import WatermarkKey


@given(st.integers(1, 7), st.data())
def test_every_key_is_embedded_equally_often(count, data):
    size = data.draw(st.integers(1, count))
    sets = rings([str(i) for i in range(count)], size)
    assert all(len(set(secrets)) == size for secrets in sets)
    assert set(Counter(secret for secrets in sets for secret in secrets).values()) == {size if size < count else 1}
    assert len({frozenset(secrets) for secrets in sets}) == len(sets)


@pytest.mark.parametrize("size", [0, 3])
def test_more_keys_than_there_are(size):
    with pytest.raises(MisconfigurationException, match=f"between 1 and the number of keys, 2, got {size}"):
        rings(["a", "b"], size)


def test_means_over_sets():
    common = {"together": 2, "seed": 0, "accuracy": 0.9, "wfpr": 0.0, "alone": 0.5}
    rows = [
        Row(keys="a, b", suspect="victim", cost=1.0, wsr=1.0, p_value=1e-6, verdict="supported", **common),
        Row(keys="a, b", suspect="clean", cost=1.0, wsr=0.0, p_value=0.5, verdict="not supported", **common),
        Row(keys="a, b", suspect="independent-0", cost=1.0, wsr=0.2, p_value=0.01, verdict="inconclusive", **common),
        Row(keys="b, c", suspect="victim", cost=2.0, wsr=0.8, p_value=2e-5, verdict="supported", **common),
    ]
    assert table(rows) == [
        # t(.975, 1) · s / √2: of 1 and 2 points 6.4, of 80 and 100 per cent 127.1
        ["2", "victim", "1.5±6.4", "90.0±0.0", "90.0±127.1", "0.0±0.0", "2/2", "1e-06 to 2e-05"],
        ["2", "innocent", "-", "90.0±0.0", "10.0±127.1", "0.0±0.0", "0/2", "0.01 to 0.5"],
    ]


def test_a_small_study(tmp_path, monkeypatch, capsys):
    config = shrink(merged("digits/supervised.yaml"))
    config["extraction"] = [theft for theft in config["extraction"] if theft["name"] in ("soft", "hard")]
    file = write(config, tmp_path / "small.yaml")
    options = {"output": tmp_path / "out", "keys": ["one", "two"], "together": [1, 2], "seeds": [3]}
    section = several_keys.main([file], **options)
    with (tmp_path / "out" / "several_keys.csv").open() as text:
        rows = list(csv.DictReader(text))
    names = ["victim", "soft", "hard", "clean", "independent"]
    assert [(row["keys"], row["suspect"]) for row in rows] == [
        (keys, name) for keys in ("one", "two", "one, two") for name in names
    ]
    assert (tmp_path / "out" / "several_keys.md").read_text() == section.markdown()
    assert "several_keys --together '[1, 2]'" in capsys.readouterr().out

    # one key alone is what `meadef run` trains, bit for bit
    drawn = ["--watermark.key", "{public_secret: two}", "--seeds", "[3]"]
    plain = SeedRun(load_experiment([file], drawn), tmp_path / "plain", 3)
    plain.victim("victim")
    study = several_keys.Study([file], [], tmp_path / "out" / "seed-3", 3)
    both = several_keys.SeveralKeys(
        study.experiment, tmp_path / "out" / "seed-3" / "one+two", 3, keys := [study.key("one"), study.key("two")]
    )
    alone = several_keys.SeveralKeys(study.experiment, tmp_path / "out" / "seed-3" / "two", 3, keys[1:])
    weights = plain.load_victim().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in alone.load_victim().state_dict().items())
    assert any(not torch.equal(value, weights[name]) for name, value in both.load_victim().state_dict().items())
    assert {f"watermark-{i}/ver" for i in range(2)} <= set(both.victim("victim")["metrics"])

    # two keys are judged together: Fisher's product of what each gives alone
    assert [key.commitment() for key in keys] == [
        WatermarkKey.draw(10, secret).commitment() for secret in ("one", "two")
    ]
    kept = [WatermarkKey.load(both.root / f"watermark-{i}.key.json") for i in range(2)]
    assert [key.commitment() for key in kept] == [key.commitment() for key in keys]
    settings = asdict(both.spec.verification)
    model, reference = both.load_victim(), study.run.load_reference("reference")
    verdicts = [
        verify(model, key, both.data, reference=verify(reference, key, both.data, **settings)[1], **settings)[0]
        for key in keys
    ]
    product = stats.chi2.sf(-2 * sum(torch.tensor([v.decoy_p for v in verdicts]).double().log()).item(), 4)
    found = next(row for row in rows if (row["keys"], row["suspect"]) == ("one, two", "victim"))
    assert float(found["p_value"]) == pytest.approx(product)
    assert float(found["wsr"]) == pytest.approx((verdicts[0].wsr + verdicts[1].wsr) / 2)
    assert float(found["alone"]) == max(verdict.decoy_p for verdict in verdicts)

    # every stage and every judgement is read again: what would train or ask fails
    monkeypatch.setattr("meadef_lightning.experiment.stages.fit", None)
    monkeypatch.setattr(several_keys, "verify", None)
    assert several_keys.main([file], **options).rows == section.rows
    # what was made with other options is not read for these
    with pytest.raises(MisconfigurationException, match="inputs"):
        several_keys.main([file], **options, overrides=["--verification.samples", "30"])
