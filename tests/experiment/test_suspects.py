"""Suspects that hold code, functions, and services: refused untouched, or asked as declared."""

import hashlib
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from suspect_models import DATA, KEY, X, described, make_stage, verify
from torch import nn

from meadef_lightning.experiment.suspects import CallableSuspect, load_suspect, open_suspect
from meadef_lightning.oracle.input_space import InputSpace
from meadef_lightning.oracle.mapped_http import MappedHTTPOracle
from meadef_lightning.verification import model_fingerprint
from meadef_lightning.verification import verify as judge_model


def nearest(x, permute=0):
    """A classifier without weights: the nearest mean of the victim split."""
    images, labels = DATA.tensors("victim")
    means = torch.stack([images[labels == k].mean(0) for k in range(10)])
    return -torch.cdist(x.flatten(1), means.flatten(1)).roll(permute, 1)


def nearest_class(x):
    return nearest(x).argmax(1)


def renumbered(x):
    return nearest(x, 3).argmax(1).tolist()


@pytest.fixture
def key_file(tmp_path):
    return str(KEY.save(tmp_path / "watermark.key.json"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("stage"))


# --- formats that hold code


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.ts", "model.torchscript", "model.pt2", "model.PT2"])
def test_pickled_code_is_not_run(stage, tmp_path, name):
    marker, path = tmp_path / "marker", tmp_path / name
    torch.save({"state_dict": stage[1].state_dict(), "callbacks": Evil(marker)}, path)
    if not name.endswith("t"):  # as their formats have it: an archive of pickles
        with zipfile.ZipFile(path, "w") as archive:
            for part in ("data.pkl", "constants.pkl"):
                archive.writestr(f"archive/{part}", pickle.dumps(Evil(marker)))
    with pytest.raises(MisconfigurationException, match=r"read safely|execute code while it is loaded.*--trust_code"):
        load_suspect(path, stage[0] / "config.yaml", DATA)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # noqa: S301 - the point: it would have been
    assert marker.exists()


def test_torchscript_and_exported_programs_need_trust(stage, tmp_path):
    network, example = stage[1].network, torch.zeros(4, 1, 16, 16)
    small = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, example).save(str(tmp_path / "a.ts"))
    shapes = ({0: torch.export.Dim("n")},)
    for exported in (network, small):  # which else warns of weights in another memory format
        exported.to(memory_format=torch.contiguous_format)
    torch.export.save(torch.export.export(network, (example,)), tmp_path / "fixed.pt2")
    torch.export.save(torch.export.export(small, (example,), dynamic_shapes=shapes), tmp_path / "small.pt2")
    for name, model in (("a.ts", network), ("fixed.pt2", network), ("small.pt2", small)):
        with pytest.raises(MisconfigurationException, match="state dict or an ONNX file"):
            load_suspect(tmp_path / name, None, DATA)
        suspect = load_suspect(tmp_path / name, None, DATA, trust_code=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(suspect(X), model(X), rtol=0, atol=1e-5)
        if name != "fixed.pt2":
            digest = hashlib.sha256((tmp_path / name).read_bytes()).digest()
            assert bytes(suspect.state_dict()["file_sha256"].tolist()) == digest
    (tmp_path / "b.pt2").write_bytes(b"garbage")
    with pytest.raises(MisconfigurationException, match=r"is no file of torch\.export\.save"):
        load_suspect(tmp_path / "b.pt2", None, DATA, trust_code=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "Cannot read the model's configuration"),
        ("a: &a [x, x]\nmodel: &b [*a, *a]\n", "no `model:` section with class_path"),
        (
            "\n".join(["a: &a0 [x, x]", *(f"b{i}: &a{i + 1} [*a{i}, *a{i}]" for i in range(40))]),
            "more than 100000 values",
        ),
        ("model: &a [*a]", "more than 100000 values"),
        ("model: 2001-99-99", "Cannot read"),
        ("model: !!python/object/apply:os.system [exit]", "Cannot read"),
        ("x: " + "y" * (1 << 20), "larger than 1048576 bytes"),
        (b"\xff\xfe", "Cannot read"),
    ],
)
def test_hostile_configurations_are_refused(text, message, stage, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MisconfigurationException, match=message):
        load_suspect(stage[0], path, DATA)


def test_a_compressed_checkpoint_is_refused(stage, tmp_path):
    plain = stage[0] / "checkpoints" / "model.ckpt"
    packed = tmp_path / "model.ckpt"
    with zipfile.ZipFile(plain) as read, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as write:
        for part in read.infolist():
            write.writestr(part.filename, read.read(part))
    torch.load(packed, weights_only=True)  # torch itself would unpack it, whatever its size
    config = stage[0] / "config.yaml"
    with pytest.raises(MisconfigurationException, match="compressed archive"):
        load_suspect(packed, config, DATA)
    assert torch.equal(*(load_suspect(plain, model, DATA)(X) for model in (config, None)))


class Doubled(nn.Module):
    def forward(self, x):
        return self.layer(x) + self.layer(x)


def test_the_code_of_a_program_is_in_its_fingerprint_and_read_once(stage, tmp_path, monkeypatch):
    """The same weights answer otherwise under other code; and what is hashed is what was loaded, should the file be exchanged."""
    layer = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    other = Doubled()
    other.layer = layer[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Sequential(nn.Flatten(), layer[1])).save(str(tmp_path / "a.ts"))
        torch.jit.script(nn.Sequential(nn.Flatten(), other)).save(str(tmp_path / "b.ts"))
    torch.export.save(torch.export.export(layer.eval(), (torch.zeros(4, 1, 16, 16),)), tmp_path / "c.pt2")
    reads = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read(path))
    first, second, third = (load_suspect(tmp_path / f, None, DATA, trust_code=True) for f in ("a.ts", "b.ts", "c.pt2"))
    assert reads == ["a.ts", "b.ts", "c.pt2"]
    torch.testing.assert_close(second(X), 2 * first(X))
    assert len({model_fingerprint(one) for one in (first, second, third)}) == 3
    (tmp_path / "d.ts").write_bytes(b"garbage")
    with pytest.raises(MisconfigurationException, match="not a TorchScript file"):
        load_suspect(tmp_path / "d.ts", None, DATA, trust_code=True)


# --- functions, labels and services


def test_any_callable_is_a_suspect():
    options = {"samples": 40, "decoys": 50, "decoy_samples": 4, "accelerator": "cpu"}
    forms = [nearest, lambda x: nearest(x).numpy(), lambda x: nearest(x).tolist(), lambda x: nearest(x).argmax(1)]
    found = [judge_model(CallableSuspect(form), KEY, DATA, **options)[0].to_dict() for form in forms]
    assert found[0]["natural_accuracy"] > 0.8
    assert found[1:3] == found[:1] * 2
    assert [one["answers"] for one in found] == ["probabilities"] * 3 + ["labels"]
    rates = ("wsr", "wfpr", "natural_accuracy", "samples")
    assert [found[3][name] for name in rates] == [found[0][name] for name in rates]
    with pytest.raises(TypeError, match="must be callable"):
        CallableSuspect(3)
    with pytest.raises(ValueError, match="makes no tensor"):
        CallableSuspect(lambda x: "cat").query(X)


def test_a_python_function_with_other_labels_from_the_command_line(tmp_path, key_file, capsys):
    name = f"python:{__name__}:renumbered"
    with pytest.raises(SystemExit, match="imports and runs code"):
        verify(tmp_path, key_file, name)
    aligned = verify(tmp_path, key_file, name, "--trust_code", "--align_labels")
    assert "numbers the classes in another order" in " ".join(capsys.readouterr().out.split())
    labels = json.loads((tmp_path / "verdict" / "labels.json").read_text())
    assert labels["kind"] == "permutation"
    assert labels["classes"] == [[(k - 3) % 10] for k in range(10)]
    assert verify(tmp_path, key_file, f"python:{__name__}:nearest_class", "--trust_code") == aligned
    assert not (tmp_path / "verdict" / "labels.json").exists()  # this suspect's labels were not translated


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:json", "must have the form"),
        ("python:no_such_module:f", "Cannot import"),
        ("python:json:no_such_function", "Cannot import"),
        ("python:json:JSONDecoder", "is no function"),
        ("python:json:__name__", "is no function"),
    ],
)
def test_functions_that_are_none(name, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        open_suspect(name, None, DATA, tmp_path / "ledger.sqlite", trust_code=True)


def test_a_service_is_declared_in_a_yaml(tmp_path):
    http = {
        "url": "http://localhost:9/x", "response": "y[*]", "images": "png", "classes": {"a": 3}, "batch_size": 2,
        "request": {"z": {"$each": "$image"}},
    }  # fmt: skip
    path = described(tmp_path, http=http, input={"size": [4, 4]})
    oracle = open_suspect(str(path), None, DATA, tmp_path / "ledger.sqlite")
    assert isinstance(oracle, MappedHTTPOracle)
    assert (oracle.space, oracle.batch_size) == (InputSpace(size=(4, 4)), 2)
    assert oracle.ledger.path == tmp_path / "ledger.sqlite"
    for sections, message in (
        ({"http": {**http, "method": "GET"}}, "section `http:`"),
        ({"http": {**http, "rate": 1}}, "section `http:`"),
        ({"http": {"url": "x", "response": "y"}}, "section `http:`"),
        ({"input": {"size": 3}}, "section `input:`"),
        ({"model": {}}, "declares no service"),
        ({"inputs": {}}, "has no `model:` section"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            open_suspect(str(described(tmp_path, **sections)), None, DATA, tmp_path / "ledger.sqlite")
    with pytest.raises(MisconfigurationException, match="--model describes a file"):
        open_suspect(str(path), path, DATA, tmp_path / "ledger.sqlite")
