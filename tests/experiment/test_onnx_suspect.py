"""ONNX files: they answer as the model they were exported from, and hostile ones are refused."""

import json
import os
import sys

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from suspect_models import DATA, KEY, Theirs, X, described, export, make_stage, verify
from torch import nn

from meadef_lightning.experiment import onnx_suspect
from meadef_lightning.experiment.onnx_suspect import OnnxSuspect, in_batches
from meadef_lightning.experiment.suspects import load_suspect
from meadef_lightning.oracle.input_space import InputSpace, ToInputSpace


@pytest.fixture
def key_file(tmp_path):
    return str(KEY.save(tmp_path / "watermark.key.json"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def thief(stage, tmp_path_factory):
    return export(stage[1].network, tmp_path_factory.mktemp("onnx") / "thief.onnx")


def test_onnx_answers_as_the_model_it_was_exported_from(stage, thief, tmp_path):
    suspect = load_suspect(thief, None, DATA)
    fixed = load_suspect(export(stage[1].network, tmp_path / "fixed.onnx", batch=4, dynamic=False), None, DATA)
    with torch.no_grad():
        expected = stage[1](X)
        for count in (1, 4, 7):
            for model in (suspect, fixed):
                torch.testing.assert_close(model(X[:count]), expected[:count], rtol=0, atol=1e-5)


def test_onnx_gets_the_verdict_of_the_checkpoint(stage, thief, tmp_path, key_file):
    assert verify(tmp_path, key_file, thief) == verify(tmp_path, key_file, stage[0])
    evidence = json.loads((tmp_path / "verdict" / "evidence.json").read_text())
    assert evidence["model"]["sha256"]


def external(thief, folder):
    import onnx

    onnx.save_model(
        onnx.load_model(thief), folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    return folder / "model.onnx"


def test_weights_may_lie_in_a_file_beside_the_graph_and_count_as_part_of_it(thief, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    path = external(thief, tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    first, plain = load_suspect(path, None, DATA), load_suspect(thief, None, DATA)
    assert torch.equal(first(X), plain(X))
    weights = bytearray((tmp_path / "w.bin").read_bytes())
    weights[3] ^= 1
    (tmp_path / "w.bin").write_bytes(weights)
    assert not torch.equal(first.file_sha256, OnnxSuspect(path).file_sha256)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"location": "../secret"}, r"'\.\./secret', which is not the plain name"),
        ({"location": "/etc/hostname"}, "not the plain name"),
        ({"location": "sub/w.bin"}, "not the plain name"),
        ({"location": "C:w.bin"}, "not the plain name"),
        ({"location": "..\\secret"}, "not the plain name"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "not the plain name"),
        ({"location": ".."}, "not the plain name"),
        ({"location": ""}, "not the plain name"),
        ({"location": "link"}, "is a link"),
        ({"location": "pipe"}, "no regular file"),
        ({"location": "sub"}, "Cannot read|no regular file"),
        ({"location": "none"}, "Cannot read .*none: No such file"),
        ({"offset": "-8"}, "at no valid place"),
        ({"length": "9" * 15}, "shorter than the"),
        ({"length": "0x10"}, "at no valid place"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_paths_of_a_hostile_graph_are_refused(thief, tmp_path, facts, message, nested):
    import onnx

    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    (folder / "sub" / "w.bin").write_bytes(b"s" * 4096)
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    path = external(thief, folder)
    model = onnx.load_model(path, load_external_data=False)
    weight = model.graph.initializer[0]
    if nested:  # a constant within a branch within the graph
        hidden = onnx.helper.make_node("Constant", [], ["c"], value=weight)
        branch = onnx.helper.make_graph([hidden], "branch", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))
        weight = model.graph.node[-1].attribute[0].g.node[0].attribute[0].t
    known = {entry.key: entry.value for entry in weight.external_data} | facts
    del weight.external_data[:]
    for name, value in known.items():
        weight.external_data.add(key=name, value=value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(MisconfigurationException, match=message):
        OnnxSuspect(path)


def test_weights_that_are_counted_again_and_again_are_bounded(thief, tmp_path, monkeypatch):
    path = external(thief, tmp_path)
    monkeypatch.setattr(onnx_suspect, "MAX_ONNX_BYTES", 20_000)
    with pytest.raises(MisconfigurationException, match="take more than 20000 bytes"):
        OnnxSuspect(path)


def test_onnx_files_that_do_not_fit(thief, tmp_path, stage):
    import onnx

    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(MisconfigurationException, match=r"is no ONNX file|cannot run"):
        OnnxSuspect(tmp_path / "garbage.onnx")
    model = onnx.load_model(thief)
    model.graph.node[0].domain = "evil.example"
    onnx.save_model(model, tmp_path / "custom.onnx")
    with pytest.raises(MisconfigurationException, match="ONNX Runtime cannot run"):
        OnnxSuspect(tmp_path / "custom.onnx")
    wide = export(nn.Sequential(nn.Flatten(), nn.Linear(256, 12)), tmp_path / "wide.onnx")
    with pytest.raises(MisconfigurationException, match=r"12 classes, but the data has 10.*--align_labels"):
        load_suspect(wide, None, DATA)
    assert load_suspect(wide, None, DATA, any_labels=True)(X).shape == (7, 12)
    theirs = export(Theirs(), tmp_path / "theirs.onnx", (3, 8, 8))
    with pytest.raises(
        MisconfigurationException, match=r"images of shape \(3, 8, 8\), but gets \(1, 16, 16\). Declare"
    ):
        load_suspect(theirs, None, DATA)
    flat = export(nn.Linear(5, 10), tmp_path / "flat.onnx", (5,))
    with pytest.raises(MisconfigurationException, match="must have one input, a batch of images"):
        load_suspect(flat, None, DATA)
    square = export(nn.Conv2d(1, 1, 3), tmp_path / "square.onnx")
    with pytest.raises(MisconfigurationException, match="must be scores"):
        load_suspect(square, None, DATA)


def test_without_onnx_runtime_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MisconfigurationException, match=r'pip install "meadef-lightning\[onnx\]"'):
        load_suspect(tmp_path / "a.onnx", None, DATA)


def test_input_and_output_are_declared(tmp_path):
    model = Theirs(several=True)
    path = export(model, tmp_path / "theirs.onnx", (3, 8, 8), outputs=("other", "scores"))
    space = {"channels": "rgb", "size": [8, 8], "scale": 255}
    with pytest.raises(MisconfigurationException, match=r"Name the one with the answers .* `output: other`"):
        load_suspect(path, described(tmp_path, input=space), DATA)
    suspect = load_suspect(path, described(tmp_path, input=space, output="scores"), DATA)
    convert = ToInputSpace(InputSpace("rgb", (8, 8), 255), DATA.mean, DATA.std)
    with torch.no_grad():
        expected = model(convert(X))[1]
        torch.testing.assert_close(suspect(X), expected, rtol=0, atol=1e-5)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        section = {"class_path": "suspect_models.Theirs", "init_args": {"several": True}}
        plain = load_suspect(tmp_path / "weights.pt", described(tmp_path, model=section, input=space, output=1), DATA)
        assert torch.equal(plain(X), expected)


def test_a_reference_keeps_its_own_description(stage, thief, tmp_path, key_file):
    model = described(tmp_path, input={"scale": 1.0, "mean": [DATA.mean[0]], "std": [DATA.std[0]]})
    found = verify(tmp_path, key_file, thief, "--reference", str(stage[0]), "--model", str(model))
    assert found["reference"]
    assert found["statistic"] == pytest.approx(0, abs=0.05)  # the same model, up to rounding


def test_batches_of_one_size():
    sizes = []

    def ask(x):
        sizes.append(len(x))
        return x * 2

    for count in (1, 3, 6, 7):
        x = torch.arange(count).float()[:, None]
        assert torch.equal(in_batches(ask, x, 3), x * 2)
    assert set(sizes) == {3}
    assert torch.equal(in_batches(ask, x, None), x * 2)
    assert sizes[-1] == 7
