"""What is released: the wheel holds everything, the metadata agree, and the oldest versions it promises are those that are tested."""

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

from meadef_lightning import __version__

ROOT = Path(__file__).parents[1]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PACKAGES = {"meadef_lightning": ROOT / "meadef_lightning", "meadef_lightning/experiments": ROOT / "experiments"}
PATTERNS = ("*.py", "*.yaml", "*.jinja", "*.sh", "py.typed")


def requirements(*extras):
    """Lines of setup.cfg that name a requirement, without those that name our own extras."""
    text = SETUP["options"]["install_requires"] + "".join(SETUP["options.extras_require"][extra] for extra in extras)
    return [line for line in text.splitlines() if line and not line.startswith(("#", "meadef-lightning"))]


def build(tree, output, kind):
    """Runs the build backend in ``tree``, without the network; returns the file it made."""
    code = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(output)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(output.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel made of the sources, the one made of the source distribution, and that distribution."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("the build backend is setuptools>=77: pip install -U setuptools")
    folder = tmp_path_factory.mktemp("release")
    tree = folder / "tree"
    for name in ("meadef_lightning", "experiments"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "runs", "*.key.json"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("wheel", "source", "again"):
        (folder / name).mkdir()
    # the source distribution first: a build folder of the wheel's must not help it
    source = build(tree, folder / "source", "sdist")
    shutil.unpack_archive(source, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build(tree, folder / "wheel", "wheel"), build(unpacked, folder / "again", "wheel"), source


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_every_yaml(wheels):
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for pattern in PATTERNS
        for path in folder.rglob(pattern)
        if "runs" not in path.parts
    }
    packed = {name for name in names(wheels[0]) if ".dist-info/" not in name}
    assert packed == expected
    assert {"meadef_lightning/cli.py", "meadef_lightning/experiments/digits/supervised.yaml"} <= packed


def test_the_source_distribution_makes_the_same_wheel(wheels):
    wheel, again, _ = wheels
    assert names(again) == names(wheel)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert all(one.read(name) == two.read(name) for name in names(wheel) if ".dist-info/" not in name)


def test_metadata(wheels):
    with zipfile.ZipFile(wheels[0]) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert "meadef = meadef_lightning.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Provides-Extra")) == set(SETUP["options.extras_require"])
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(core) == len(requirements())


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == SETUP["metadata"]["license_expression"]


def test_minimum_versions_are_the_lower_bounds():
    """``pip install -c tests/minimum-versions.txt`` installs the oldest version of everything that setup.cfg allows."""
    bounds = {}
    for line in requirements("serve", "onnx"):
        name, bound = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:,.*)?", line).groups()
        bounds[name] = bound
    lines = (ROOT / "tests" / "minimum-versions.txt").read_text().splitlines()
    assert [line for line in lines if line[0] != "#"] == [f"{name}=={bound}" for name, bound in bounds.items()]


def test_the_workflow_tests_what_is_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    promised = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert jobs["newest"]["strategy"]["matrix"]["python"] == promised
    assert SETUP["options"]["python_requires"] == f">={promised[0]}"
    steps = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    assert ".ci/run" in steps["newest"]
    assert "-c tests/minimum-versions.txt" in steps["minimum"]
    assert "twine check --strict" in steps["build"]
    for path in re.findall(r"(?:tests|docker|\.ci|experiments)/[\w./-]*\w", "\n".join(steps.values())):
        assert (ROOT / path).exists() or path.startswith("docker/secrets"), path
