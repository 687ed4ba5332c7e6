"""Several reference models in an experiment: every suspect is judged above their mean, and one alone is what it always was."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small import merged, shrink, write

from meadef_lightning.experiment import stages
from meadef_lightning.experiment.grid_cost import work_of
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.pipeline import run
from meadef_lightning.experiment.seed_run import SeedRun
from meadef_lightning.experiment.weights import MODEL
from meadef_lightning.verification import Evidence, VerificationDataModule, check_evidence
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.watermark import WatermarkKey

SUSPECTS = ("victim", "clean", "soft", "independent")


@pytest.fixture(scope="module")
def config():
    config = shrink(merged("digits/supervised.yaml"))
    config["extraction"] = config["extraction"][:1]
    return config


def start(config, folder, output, **changes):
    return run(load_experiment([write({**config, **changes}, folder / "experiment.yaml")]), output)


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    start(config, root, root / "out", references=2)
    return root / "out"


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """A run as they were before there could be several."""
    root = tmp_path_factory.mktemp("one")
    start(config, root, root / "out")
    return root / "out"


MLPS = {
    "name": "mlp",
    "count": 2,
    "model": {
        "class_path": "meadef_lightning.victims.SupervisedVictim",
        "init_args": {"network": {"class_path": "meadef_lightning.victims.networks.MLP"}},
    },
}


@pytest.fixture(scope="module")
def mixed(config, tmp_path_factory):
    """One reference like the victim, and two of another kind."""
    root = tmp_path_factory.mktemp("mixed")
    others = [{**MLPS, "trainer": config["independent"][0]["trainer"]}]
    start(config, root, root / "out", other_references=others)
    return root / "out"


def read(path):
    return json.loads(path.read_text())


def weights(directory):
    return torch.load(directory / MODEL, weights_only=True)["state_dict"]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_reference_is_the_only_one_of_old_and_the_second_another(one, two):
    assert same(weights(one / "reference"), weights(two / "reference"))
    assert not same(weights(two / "reference"), weights(two / "reference-1"))
    # neither changes what else is trained
    for name in SUSPECTS:
        assert same(weights(one / name), weights(two / name))
    assert not (one / "reference-1").exists()


def test_every_verification_rests_on_both(two, one):
    digests = {name: read(two / name / "result.json")["sha256"] for name in ("reference", "reference-1")}
    key = WatermarkKey.load(two / "watermark.key.json")
    for name in SUSPECTS:
        inputs = read(two / f"verify-{name}" / "stage.json")["inputs"]
        assert {part: inputs[part] for part in digests} == digests
        evidence = Evidence.load(two / f"verify-{name}" / "evidence.json")
        answers = evidence.opened(key)
        assert [torch.tensor(known).sum() for known in answers["references"]] == [
            torch.tensor(answers["cells"]).sum()
        ] * 2
        assert len(answers["soft"]["references"]) == 2
        assert all(len(table) == len(answers["cells"]) for table in answers["soft"]["references"])
        assert len(set(evidence.model["references"])) == 2
        verdict = check_evidence(two / f"verify-{name}" / "evidence.json", key)
        assert verdict.answers == "probabilities"
        assert verdict.to_dict() == read(two / f"verify-{name}" / "result.json")["verdict"]
        assert any("above the mean of what 2 reference models give" in note for note in verdict.notes)
    alone = read(one / "verify-soft" / "result.json")["verdict"]
    assert alone["notes"][0] == (
        "What every key's statistic is made of is above what a reference model gives. A reference must have been trained without regard to the key."
    )


def test_the_statistic_is_that_above_the_models_on_disk(two):
    experiment = load_experiment([two / "config.yaml"])
    seed_run = SeedRun(experiment, two, 0)
    options = {name: value for name, value in experiment.config("verification").items() if name != "alpha"}

    def shares(model):
        """From the probabilities of the model itself, composite by composite."""
        questions = VerificationDataModule(seed_run.key, seed_run.data, **options)
        questions.setup("predict")
        loader = questions.predict_dataloader()[2]
        with torch.no_grad():
            probabilities = torch.cat([model.eval()(x).softmax(1) for x, _ in loader]).double()
        table = questions.table
        ways, pairs, each = len(table.space.combiners), len(table.pairs), questions.decoy_samples
        probabilities = probabilities.reshape(ways, pairs, each, -1).transpose(0, 1).flatten(0, 1) + 1e-4
        rest = probabilities.scatter(2, table.cells[:, None, :2].expand(-1, each, -1), 0.0)
        return (1000 * rest / rest.sum(2, keepdim=True)).floor().mean(1) / 1000

    table = DecoyTable(seed_run.key, options["decoys"], options["seed"])
    known = [shares(seed_run.load_reference(name)) for name in ("reference", "reference-1")]
    expected, _ = table.statistics(shares(seed_run.load_victim()), known)
    found = read(two / "verify-victim" / "result.json")["verdict"]["statistic"]
    assert found == pytest.approx(expected, abs=1e-12)


def test_references_of_another_kind_are_trained_on_the_victims_images_and_judged_above(mixed, one):
    experiment = load_experiment([mixed / "config.yaml"])
    seed_run = SeedRun(experiment, mixed, 0)
    names = ["reference", "mlp-0", "mlp-1"]
    assert seed_run.spec.reference_names == names
    assert same(weights(one / "reference"), weights(mixed / "reference"))
    assert not same(weights(mixed / "mlp-0"), weights(mixed / "mlp-1"))
    assert [type(seed_run.load_reference(name).ready_network()).__name__ for name in names[1:]] == ["MLP", "MLP"]
    inputs = read(mixed / "verify-soft" / "stage.json")["inputs"]
    assert {name: inputs[name] for name in names} == {
        name: read(mixed / name / "result.json")["sha256"] for name in names
    }
    assert len(set(Evidence.load(mixed / "verify-soft" / "evidence.json").model["references"])) == 3

    asked = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "meadef_lightning.experiment.seed_run.train_stage",
            lambda directory, name, inputs, build, *rest: (
                asked.setdefault(name, build()[1].train_split) and {"sha256": ""}
            ),
        )
        seed_run.reference("mlp-1")
        seed_run.suspects()[-1][1]()
    assert asked == {"mlp-1": "victim", "independent": "attacker"}


def test_a_finished_run_with_one_is_still_finished(one, config, tmp_path, monkeypatch):
    assert set(read(one / "verify-soft" / "stage.json")["inputs"]) == {
        *("data", "seed", "config", "key", "suspect", "victim", "reference"),
    }
    text = (one / "config.yaml").read_text()
    assert "references: 1\n" in text
    before = (one / "report.json").read_bytes()
    for name in ("fit", "file_sha256"):
        monkeypatch.setattr(stages, name, lambda *_: pytest.fail("a finished stage was run again"))
    monkeypatch.setattr(
        "meadef_lightning.experiment.verdict_stage.verify", lambda *_, **__: pytest.fail("judged again")
    )
    start(config, tmp_path, one)
    assert (one / "report.json").read_bytes() == before


def test_more_references_in_the_same_directory_are_refused_by_name(one, config, tmp_path):
    shutil.copytree(one, tmp_path / "out")
    with pytest.raises(MisconfigurationException, match=r"verify-victim.*other inputs.*'reference-1'.*--output"):
        start(config, tmp_path, tmp_path / "out", references=2)
    for part in ("report.json", "verify-victim/evidence.json"):
        assert (tmp_path / "out" / part).read_bytes() == (one / part).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": 0}, r"references=0 must be at least 1"),
        ({"references": -3}, r"references=-3 must be at least 1"),
        ({"references": 1.5}, r"not valid.*references"),
        ({"references": "many"}, r"not valid.*references"),
        ({"references": 3, "name": "reference-2"}, r"twice: \['reference-2'\]"),
        ({"name": "reference"}, r"reserved: \['reference'\]"),
        ({"name": "independent-1", "count": 2}, r"twice: \['independent-1'\]"),
        ({"others": [{**MLPS, "name": "soft"}], "name": "soft-1"}, r"twice: \['soft-1'\]"),
        ({"others": [{**MLPS, "name": "clean", "count": 1}]}, r"reserved: \['clean'\]"),
    ],
)
def test_what_cannot_be(config, tmp_path, changes, message):
    changed = json.loads(json.dumps(config))
    changed["references"] = changes.get("references", 1)
    changed["extraction"][0]["name"] = changes.get("name", "soft")
    changed["independent"][0]["count"] = changes.get("count", 1)
    changed["other_references"] = changes.get("others", [])
    with pytest.raises(MisconfigurationException, match=message):
        load_experiment([write(changed, tmp_path / "experiment.yaml")])


def test_names_that_no_reference_takes_are_free(config, tmp_path):
    changed = json.loads(json.dumps(config))
    changed["references"] = 2
    changed["extraction"][0]["name"] = "reference-2"
    changed["independent"][0]["count"] = 2
    spec = load_experiment([write(changed, tmp_path / "experiment.yaml")]).build()
    assert spec.reference_names == ["reference", "reference-1"]
    assert spec.independent[0].names == ["independent-0", "independent-1"]


def test_the_estimate_of_the_cost_counts_them_all(config, tmp_path):
    def work(references):
        return work_of(load_experiment([write({**config, "references": references}, tmp_path / "experiment.yaml")]))

    one, three = work(1), work(3)
    assert three.keys() - one.keys() == {"reference-1", "reference-2"}
    assert three["reference-2"] == three["reference"] == one["reference"] > 0
    others = [{**MLPS, "trainer": config["independent"][0]["trainer"]}]
    mixed = work_of(load_experiment([write({**config, "other_references": others}, tmp_path / "experiment.yaml")]))
    assert mixed.keys() - one.keys() == {"mlp-0", "mlp-1"}
    assert 0 < mixed["mlp-0"] == mixed["mlp-1"] != one["reference"]
