"""How a key names its way of combining: equal by content, checked before anything is imported or built."""

import json
import sys
import types

import pytest
import torch

from meadef_lightning.watermark import DEFAULT_COMBINERS, CombinerSpec, WatermarkKey, default_combiners
from meadef_lightning.watermark.combiners import Combiner, CropPaste, Stripes

OWN = "meadef_lightning.watermark.combiners."


class Mine(Combiner):
    """A user's own way, in a module that is imported already."""

    def combine(self, a, b, generator):
        return torch.maximum(a, b)


def test_a_spec_builds_its_combiner():
    built = CombinerSpec(OWN + "CropPaste", {"position": (0.25, 0), "size": (0.5, 0.5), "rotation": 90}).build()
    assert isinstance(built, CropPaste)
    assert (built.position, built.size, built.rotation) == ((0.25, 0), (0.5, 0.5), 90)
    assert isinstance(CombinerSpec(f"{__name__}.Mine").build(), Mine)
    assert isinstance(CombinerSpec("meadef_lightning.watermark.Stripes", {"axis": -2}).build(), Stripes)


def test_specs_are_equal_by_content_and_keep_their_own_copy():
    arguments = {"position": (0.5, 0.0), "size": [0.5, 1.0]}
    spec = CombinerSpec(OWN + "CropPaste", arguments)
    assert spec == DEFAULT_COMBINERS[1]
    assert hash(spec) == hash(DEFAULT_COMBINERS[1])
    before = hash(spec)
    arguments["size"][0] = 0.25
    arguments["rotation"] = 90
    assert hash(spec) == before
    assert spec != CombinerSpec(OWN + "CropPaste", arguments)
    assert spec != CombinerSpec(OWN + "Diagonal", spec.init_args)
    assert CombinerSpec.from_dict(spec.to_dict()) == spec


def test_ways_can_be_left_out_by_name_in_their_order():
    assert default_combiners() == DEFAULT_COMBINERS
    kept = default_combiners(["PixelBlend"])
    assert kept == tuple(spec for spec in DEFAULT_COMBINERS if spec.class_path != OWN + "PixelBlend")
    assert len(kept) == 7
    assert len(default_combiners(["Stripes", "CropPaste"])) == 4  # all of a class
    with pytest.raises(ValueError, match=r"without=\['Blend'\]: the ways .* 'PixelBlend', 'Stripes'"):
        default_combiners(["Blend", "Donut"])
    with pytest.raises(ValueError, match="leaves 1 way"):
        default_combiners(["Stripes", "CropPaste", "Diagonal", "PixelBlend"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, b"x", torch.zeros(1)])
def test_specs_take_json_values_only(bad):
    with pytest.raises(ValueError, match="mapping of JSON values"):
        CombinerSpec(OWN + "PixelBlend", {"alpha": bad})


@pytest.mark.parametrize(
    "value",
    [
        None,
        "CropPaste",
        [],
        {},
        {"class_path": 3},
        {"init_args": {}},
        {"class_path": "a.B", "other": 1},
        {"class_path": "a.B", "init_args": [1]},
        {"class_path": "a.B", "init_args": "deadbeef"},
    ],
)
def test_from_dict_of_a_spec_refuses_everything_else(value):
    with pytest.raises(ValueError, match=r"combiner (is|must be) a mapping|must be a mapping") as refused:
        CombinerSpec.from_dict(value)
    assert "deadbeef" not in str(refused.value)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "CropPaste",
        "builtins.eval",
        "os.system",
        "torch.nn.Linear",
        "meadef_lightning..CropPaste",
        "meadef_lightning.watermark.nowhere.CropPaste",
        "meadef_lightning.watermark.combiners.torch",
        "meadef_lightning.watermark.combiners.Combiner.forward",
    ],
)
def test_build_refuses_what_is_no_combiner(path):
    with pytest.raises(ValueError, match="not a combiner that is available here"):
        CombinerSpec(path).build()


def test_build_explains_wrong_arguments():
    with pytest.raises(ValueError, match=r"do not fit .*Diagonal.*unexpected keyword"):
        CombinerSpec(OWN + "Diagonal", {"colour": 1}).build()
    with pytest.raises(ValueError, match="alpha=1"):
        CombinerSpec(OWN + "PixelBlend", {"alpha": 1}).build()


def test_foreign_modules_are_never_imported(tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    package = tmp_path / "evil_package"
    package.mkdir()
    effect = (
        f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nfrom meadef_lightning.watermark import PixelBlend\n"
    )
    (tmp_path / "evil_module.py").write_text(effect)
    (package / "__init__.py").write_text(effect)
    (package / "inner.py").write_text(effect)
    monkeypatch.syspath_prepend(tmp_path)
    key = WatermarkKey((0, 1), 2, 3)
    for path in ("evil_module.PixelBlend", "evil_package.PixelBlend", "evil_package.inner.PixelBlend"):
        spec = CombinerSpec(path)
        file = tmp_path / "key.json"
        file.write_text(json.dumps({**key.to_dict(), "combiner": spec.to_dict(), "space": [spec.to_dict()]}))
        loaded = WatermarkKey.load(file)
        repr(loaded), loaded.commitment(), loaded.control_combiners()
        with pytest.raises(ValueError, match="import the module of your own Combiner"):
            loaded.combiner.build()
    assert not marker.exists()
    __import__("evil_module")  # the trap works
    assert marker.exists()
    assert CombinerSpec("evil_module.PixelBlend").build().alpha == 0.5
    for name in ("evil_module", "evil_package", "evil_package.inner"):
        sys.modules.pop(name, None)


def test_a_lazy_module_is_not_woken(monkeypatch):
    woken = []

    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            woken.append(name)
            return Mine

    monkeypatch.setitem(sys.modules, "lazy_thing", Lazy("lazy_thing"))
    monkeypatch.setitem(sys.modules, "blocked_thing", None)
    for path in ("lazy_thing.Mine", "blocked_thing.Mine"):
        with pytest.raises(ValueError, match="not a combiner"):
            CombinerSpec(path).build()
    assert woken == []


def test_the_command_is_not_started_by_a_key():
    before = set(sys.modules)
    for path in ("meadef_lightning.__main__.main", "meadef_lightning.cli.main"):
        with pytest.raises(ValueError, match="not a combiner"):
            CombinerSpec(path).build()
    assert set(sys.modules) == before
