"""Every YAML in experiments/ runs."""

import json

import pytest
import yaml
from small import EXPERIMENTS, fake_fashion_mnist, merged, shrink, write

from meadef_lightning.cli import main
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.watermark import WatermarkCallback, WatermarkKey

PAPER = ("fashion_mnist/supervised.yaml", "overlays/paper_size.yaml", "overlays/paper.yaml")

ROBUSTNESS = ("digits/robustness.yaml", "fashion_mnist/robustness.yaml")
SELF_SUPERVISED = ("digits/simclr.yaml", "fashion_mnist/simclr.yaml", "cifar10/simclr.yaml")


def run(config, tmp_path):
    main(["run", str(write(config, tmp_path / "small.yaml")), "--output", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_no_yaml_is_forgotten():
    """Those below, the LightningCLI overlay, which test_cli runs, the sweeps (test_sweeps), and the grids (test_paper_grids)."""
    tested = {
        "digits/supervised.yaml",
        "digits/extraction.yaml",
        "fashion_mnist/extraction.yaml",
        "fashion_mnist/vgg_thief.yaml",
        "fashion_mnist/ablation.yaml",
        "cifar10/supervised.yaml",
        "cifar10/small.yaml",
        "cifar10/all_images.yaml",
        "cifar10/nine_layers.yaml",
        "overlays/all_images.yaml",
        *ROBUSTNESS,
        *SELF_SUPERVISED,
        "overlays/paper_size_simclr.yaml",
        "overlays/watermark.yaml",
        *PAPER,
    }
    grids = {"digits/grid.yaml", "overlays/one_theft.yaml"}
    shipped = {
        path for path in EXPERIMENTS.rglob("*.yaml") if path.parent.name not in ("sweeps", "paper", "schedulers")
    }
    assert {path.relative_to(EXPERIMENTS).as_posix() for path in shipped} == tested | grids


def test_digits(tmp_path, capsys):
    report = run(shrink(merged("digits/supervised.yaml")), tmp_path)
    assert [row["name"] for row in report["suspects"]] == [
        *("victim", "clean", "soft", "hard", "soft-other-network", "hard-other-network", "independent"),
    ]
    assert "independent" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The victim named")
def test_every_theft(tmp_path):
    report = run(shrink(merged("digits/extraction.yaml")), tmp_path)
    thefts = [row for row in report["suspects"] if row["kind"] == "extracted"]
    assert len(thefts) == 21
    assert len({row["attack"] for row in thefts}) == 9
    assert {row["labels"] for row in thefts} == {"soft", "hard", "topk"}
    assert all(row["queries"] > 0 for row in thefts)


@pytest.mark.filterwarnings("ignore:The victim named")
def test_every_theft_of_fashion_mnist(tmp_path):
    root = str(fake_fashion_mnist(tmp_path / "data"))
    config = shrink(merged("fashion_mnist/extraction.yaml"), root=root, download=False)
    config["extraction"] = config["extraction"][::6]  # the others differ from the digits' in numbers only
    report = run(config, tmp_path)
    curve = [row["queries"] for row in report["suspects"] if row["name"].startswith("distillation-soft-")]
    assert curve == [10, 20]
    assert (tmp_path / "out" / "figures" / "budget.png").exists()


def test_every_removal_and_every_search(tmp_path, capsys):
    config = shrink(merged("digits/robustness.yaml"))
    for i, acting in enumerate(config["removal"] + config["detection"]):
        acting["of"] = [("victim", "soft", "patched")[i % 3]]
    report = run(config, tmp_path)
    key = json.loads((tmp_path / "out" / "watermark.key.json").read_text())
    assert len(report["removal"]) == len(config["removal"]) == 20
    assert all(len(row["curve"]) >= 2 for row in report["removal"])
    scrubbed = {row["name"] for row in report["suspects"] if row["kind"] == "removed"}
    assert scrubbed == {row["name"] for row in report["removal"] if row["target"] != "patched"}
    assert {row["attack"]: row["target"] for row in report["detection"]} == {
        item["name"]: item["of"][0] for item in config["detection"]
    }
    assert {"removal-victim.png", "removal-soft.png", "removal-patched.png"} <= {
        path.name for path in (tmp_path / "out" / "figures").iterdir()
    }
    ranked = {row["attack"] for row in report["detection"] if row["key_rank"] is not None}
    # the other search that ranks keys is of the model with a patch
    assert ranked == {"mixture-scan"}
    patch = config["patched"]["model"]["init_args"]["target_class"]
    for row in report["detection"]:
        found = json.loads((tmp_path / "out" / f"search-{row['attack']}-{row['target']}" / "result.json").read_text())
        asked = patch if row["target"] == "patched" else key["target_class"]
        assert row["named_target"] == (float(asked in found["flagged"]) if row["level"] == "model" else None)
    searched = next(item["of"][0] for item in config["detection"] if item["name"] == "neural-cleanse")
    assert (tmp_path / "out" / f"search-neural-cleanse-{searched}" / "figures" / "triggers.png").exists()
    assert "Searches for a watermark" in capsys.readouterr().out


def test_a_thief_whose_budget_is_spent_at_once_keeps_the_model_as_it_was(tmp_path):
    config = shrink(merged("digits/robustness.yaml"), trainer={"max_epochs": 12})
    (noise,) = (item for item in config["removal"] if item["name"] == "input-noise")
    noise["method"]["init_args"]["strengths"], noise["points"], noise["of"] = [50.0], 0.0, ["victim"]
    config["removal"], config["detection"], config["extraction"] = [noise], [], []
    report = run(config, tmp_path)
    assert report["removal"][0]["chosen"] == 0
    victim, kept = (
        next(row for row in report["suspects"] if row["name"] == name) for name in ("victim", "victim.input-noise")
    )
    assert (kept["accuracy"], kept["wsr"], kept["p_value"]) == (victim["accuracy"], victim["wsr"], victim["p_value"])


def test_the_attacks_on_fashion_mnist_go_on_top_of_the_supervised_experiment(tmp_path):
    root = str(fake_fashion_mnist(tmp_path / "data"))
    config = shrink(merged("fashion_mnist/supervised.yaml", "fashion_mnist/robustness.yaml"), root=root, download=False)
    config["removal"], config["detection"] = config["removal"][5:6], config["detection"][:1]
    report = run(config, tmp_path)
    assert [row["target"] for row in report["removal"]] == ["victim", "soft", "patched"]


@pytest.mark.parametrize("file", SELF_SUPERVISED)
def test_self_supervised(file, tmp_path):
    config = merged(file)
    data = {}
    if "digits" not in file:
        data = {"root": str(fake_fashion_mnist(tmp_path / "data")), "download": False}
        config["data"]["class_path"] = "meadef_lightning.data.FashionMNISTDataModule"
        for view in (config["victim"]["model"]["init_args"]["views"]["init_args"]["view"]["init_args"],):
            view.update({"saturation": 0.0, "hue": 0.0, "grayscale": 0.0})  # grey pictures stand in for coloured ones
        augmented = config["extraction"][1]["student"]["init_args"]["augmentation"]["init_args"]
        augmented.update({"saturation": 0.0, "hue": 0.0, "grayscale": 0.0})
        config["extraction"] = config["extraction"][1:]
    report = run(shrink(config, **data), tmp_path)
    thefts = {row["name"]: row["labels"] for row in report["suspects"] if row["kind"] == "extracted"}
    assert thefts["stolen-encoder"] == "feature"
    found = json.loads((tmp_path / "out" / "verify-stolen-encoder" / "result.json").read_text())
    assert 0 < found["features"]["p_value"] <= 1
    if "digits" in file:
        assert thefts["downstream-labels"] == "hard"


def test_the_papers_size_of_the_self_supervised_experiment():
    """Read and built only: its network is slow on a CPU, and the file beneath it runs above."""
    files = [EXPERIMENTS / name for name in ("fashion_mnist/simclr.yaml", "overlays/paper_size_simclr.yaml")]
    experiment = load_experiment(files)
    spec = experiment.build()
    sizes = experiment.config("data.init_args")
    parts = ("victim_size", "attacker_size", "verification_size", "validation_size")
    assert sum(sizes[name] for name in parts) == 60_000  # the training set
    assert experiment.config("victim.model.init_args.network.class_path").endswith("NineLayerCNN")
    assert [spec.victim.trainer, *(control.trainer for control in spec.independent)] == [{"max_epochs": 200}] * 2
    assert [theft.name for theft in spec.extraction] == ["distillation", "stolen-encoder"]
    spec.extraction[1].student.build_network(1)
    assert sum(weight.numel() for weight in spec.extraction[1].student.parameters()) > 1e6


def test_fashion_mnist(tmp_path):
    root = str(fake_fashion_mnist(tmp_path / "data"))
    report = run(shrink(merged("fashion_mnist/supervised.yaml"), root=root, download=False), tmp_path)
    assert report["suspects"][2]["queries"] == 80


@pytest.mark.parametrize(
    ("overlays", "thefts"),
    [
        (("overlays/all_images.yaml", "fashion_mnist/vgg_thief.yaml"), {"soft-vgg": "VGGLike"}),
        (("fashion_mnist/ablation.yaml",), {"soft": "DigitsCNN", "hard": "DigitsCNN"}),
    ],
)
def test_other_thefts_on_fashion_mnist(overlays, thefts, tmp_path):
    root = str(fake_fashion_mnist(tmp_path / "data"))
    config = shrink(merged("fashion_mnist/supervised.yaml", *overlays), root=root, download=False)
    report = run(config, tmp_path)
    assert [row["name"] for row in report["suspects"] if row["kind"] == "extracted"] == list(thefts)
    for name, network in thefts.items():
        stolen = yaml.safe_load((tmp_path / "out" / name / "config.yaml").read_text())
        assert stolen["model"]["init_args"]["network"]["class_path"].endswith(network)


ALL_IMAGES = {
    ("fashion_mnist/supervised.yaml", "overlays/all_images.yaml"): 60_000,
    ("cifar10/small.yaml", "cifar10/all_images.yaml"): 50_000,
}


@pytest.mark.parametrize("files", ALL_IMAGES)
def test_all_images(files):
    """Read and built only, here and below, as the files beneath them run above and below."""
    sizes = load_experiment([EXPERIMENTS / name for name in files]).config("data.init_args")
    parts = ("victim_size", "attacker_size", "verification_size", "validation_size")
    assert 0.9 * ALL_IMAGES[files] < sum(sizes[name] for name in parts) <= ALL_IMAGES[files]  # of the training set


@pytest.mark.parametrize("files", [*ALL_IMAGES, ("fashion_mnist/supervised.yaml", "fashion_mnist/ablation.yaml")])
def test_the_default_recipe(files):
    key = WatermarkKey.draw(10, "a secret")
    callback = load_experiment([EXPERIMENTS / name for name in files]).build().watermark.callback(key)
    assert isinstance(callback, WatermarkCallback)
    default = WatermarkCallback(key).objective
    assert (callback.objective.tilt, callback.objective.balancing.weights) == (default.tilt, default.balancing.weights)


def test_the_papers_size_and_recipe(tmp_path):
    root = str(fake_fashion_mnist(tmp_path / "data"))
    config = shrink(merged(*PAPER), root=root, download=False)
    config["extraction"] = config["extraction"][2:3]
    run(config, tmp_path)
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert saved["watermark"]["callback"]["init_args"]["balancing"]["class_path"].endswith("MGDA")
    assert saved["victim"]["model"]["init_args"]["network"]["class_path"].endswith("NineLayerCNN")


@pytest.mark.parametrize(
    "files",
    [
        ("cifar10/supervised.yaml",),
        ("cifar10/small.yaml",),
        ("cifar10/small.yaml", "cifar10/all_images.yaml", "cifar10/nine_layers.yaml"),
    ],
)
def test_cifar10(files, tmp_path):
    """The same files on an image folder of CIFAR's shape, since CIFAR's own files cannot be had in a test."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 6)):
        for label in range(10):
            folder = tmp_path / "data" / part / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                pixels[:, :, label % 3] //= 1 + label // 3
                Image.fromarray(pixels).save(folder / f"{i}.png")
    config = shrink(merged(*files), root=str(tmp_path / "data"), in_memory=True)
    config["data"]["class_path"] = "meadef_lightning.data.ImageFolderDataModule"
    config["extraction"] = config["extraction"][1:2]
    report = run(config, tmp_path)
    assert {row["labels"] for row in report["suspects"] if row["kind"] == "extracted"} == {"hard"}
    key = WatermarkKey.load(tmp_path / "out" / "watermark.key.json")
    assert len(key.space) == 7  # without blends


@pytest.mark.parametrize("file", ["digits/supervised.yaml", "fashion_mnist/supervised.yaml", "cifar10/supervised.yaml"])
def test_keys_printed_in_yaml_are_called_public(file):
    assert set(merged(file)["watermark"]["key"]) - {"without"} == {"public_secret"}


def test_the_step_benchmark_measures_what_it_names(tmp_path):
    from meadef_lightning.experiments.benchmarks.step_time import main as benchmark

    variants = ("plain", "default", "published loop")
    result = benchmark(20, 16, rounds=1, steps=1, variants=variants, memory=False, output=str(tmp_path))
    assert list(result) == list(variants)
    assert result["plain"]["ratio"] == 1
    assert json.loads((tmp_path / "step_time.json").read_text())["variants"].keys() == result.keys()
