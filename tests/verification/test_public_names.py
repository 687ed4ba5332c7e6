"""Every public name of every room can be imported, and ``meadef --help`` needs none of them."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import meadef_lightning

ROOMS = [room.name for room in pkgutil.iter_modules(meadef_lightning.__path__, "meadef_lightning.") if room.ispkg]


def test_the_rooms_are_found():
    assert {"meadef_lightning.verification", "meadef_lightning.oracle", "meadef_lightning.watermark"} <= set(ROOMS)


@pytest.mark.parametrize("name", ["meadef_lightning", *ROOMS])
def test_every_name_in_all_imports(name):
    room = importlib.import_module(name)
    names = getattr(room, "__all__", [])
    assert len(set(names)) == len(names)
    for one in names:
        assert not inspect.ismodule(getattr(room, one)), one


def test_the_protocol_is_public():
    from meadef_lightning import oracle, verification

    for room, names in (
        (
            verification,
            "Bundle CamouflagedDataModule Commitment LabelMap relabelled make_signing_key repeat_draw feature_verdict",
        ),
        (oracle, "MappedHTTPOracle HTTPMapping InputSpace"),
    ):
        assert set(names.split()) <= set(room.__all__)
    # a function must not hide the module of its name
    for info in pkgutil.iter_modules(verification.__path__):
        assert info.name not in verification.__all__ or inspect.ismodule(getattr(verification, info.name)), info.name


def test_help_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from meadef_lightning.cli import main; main(['--help']); "
        "sys.exit(bool({'torch', 'lightning', 'cryptography', 'scipy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
