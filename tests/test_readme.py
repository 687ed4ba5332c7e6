"""What the README shows runs as written."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_snippet(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snippet.py").write_text(
        code.replace("max_epochs=20", "max_epochs=20, enable_progress_bar=False, accelerator='cpu'")
    )
    names = runpy.run_path("snippet.py")
    metrics = names["trainer"].callback_metrics
    assert metrics["watermark/wsr"] > 0.4
    assert metrics["val_accuracy"] > 0.8
    assert (tmp_path / "watermark.key.json").exists()


def test_commands_and_ci_agree():
    (install, test) = re.search(r'(python -m pip install -e "\.\[dev\]") && (python -m pytest)', README).groups()
    ci = (ROOT / ".ci" / "run").read_text()
    assert install.replace("install", "install --quiet") in ci
    assert test in ci


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_experiments_named_in_yaml_comments_exist():
    for path in (ROOT / "experiments").rglob("*.yaml"):
        yaml.safe_load(path.read_text())
        for named in re.findall(r"experiments/[\w/]+\.yaml", path.read_text()):
            assert (ROOT / named).exists(), f"{path} names {named}"
