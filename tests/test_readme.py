"""What the README and the pages beside it show runs as written; commands are parsed, not run."""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / "meadef_lightning").rglob("*.md")),
]

# what a block of commands may call besides meadef and our own scripts: not ours to check
OTHERS = {
    "pip", "python -m pip", "python -m pytest", "python -m venv", "pytest", "pdoc", "jupytext", "jupyter", "git", "cd", "export", "curl", "wandb",
    "docker", "podman", "sbatch", "source", ".", "openssl", "torchrun", "ssh", "unzip", "ls", "mkdir", "cat", "xargs",
}  # fmt: skip
# the functions that start a command's work once its arguments are parsed
WORK = {
    "meadef_lightning.experiment.pipeline": ["run"],
    "meadef_lightning.experiment.judge": ["judge_suspect"],
    "meadef_lightning.experiment.serve": ["serve"],
    "meadef_lightning.experiment.grid_run": ["Plan"],
    "meadef_lightning.experiment.keys": ["_draw", "_show", "_sign_key", "_commit"],
    "meadef_lightning.experiment.bundles": ["_bundle", "_check", "_combine"],
    "meadef_lightning.experiments.benchmarks.answer_lean": ["cases"],
    "meadef_lightning.experiments.benchmarks.calibration": ["study"],
    "meadef_lightning.experiments.benchmarks.false_claims": ["run_study"],
    "meadef_lightning.experiments.benchmarks.pareto": ["cell"],
    "meadef_lightning.experiments.benchmarks.several_keys": ["Study"],
}
YOURS = """
model:
  class_path: meadef_lightning.victims.SupervisedVictim
  init_args: {network: {class_path: meadef_lightning.victims.networks.DigitsCNN}}
data: {class_path: meadef_lightning.data.DigitsDataModule}
trainer: {accelerator: cpu, logger: false, enable_checkpointing: false}
"""


class Parsed(Exception):  # noqa: N818
    """The arguments were understood, and the work would begin now."""


def commands(text):
    """The commands of a page's shell blocks, as lists of words, without variables set before them."""
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;")
            lexer.whitespace_split = True
            command = []
            for word in [*lexer, ";"]:
                if word and set(word) <= set("|&;"):
                    while command and re.fullmatch(r"\w+=.*", command[0]):
                        command = command[1:]
                    if command:
                        yield command
                    command = []
                else:
                    command.append(word)


def stop(*_, **__):
    raise Parsed


def parse(words, monkeypatch):
    """Runs a command up to where its work would begin.

    Returns:
        Whether the command is ours; others are not looked at.

    Raises:
        Parsed: if its arguments are understood.
    """
    program, arguments = words[0], words[1:]
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        program, arguments = f"python -m {arguments[1]}", arguments[2:]
    elif program in ("python", "python3"):
        file = ROOT / arguments[0]
        assert file.exists(), f"there is no {arguments[0]}"
        program, arguments = (
            ".".join(("python -m meadef_lightning", *file.relative_to(ROOT).with_suffix("").parts)),
            arguments[1:],
        )
    if program in OTHERS:
        return False
    if program == "meadef" or program == "python -m meadef_lightning":
        import lightning.pytorch as pl

        from meadef_lightning.cli import main

        for module in WORK:
            if ".benchmarks." not in module:
                for name in WORK[module]:
                    monkeypatch.setattr(importlib.import_module(module), name, stop)
        for name in ("fit", "validate", "test", "predict"):
            monkeypatch.setattr(pl.Trainer, name, stop)
        main(arguments)
        if arguments[:1] in ([], ["--help"], ["--version"]):
            raise Parsed  # these are done at once
        return True
    assert program.startswith("python -m meadef_lightning."), (
        f"no test knows {program!r}; name it in OTHERS if it is not ours"
    )
    name = program.removeprefix("python -m ")
    if ".experiments." in name and ".benchmarks." not in name and not arguments:
        raise Parsed  # a script without arguments: test_examples runs those
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name in WORK:
        for work in WORK[name]:
            monkeypatch.setattr(module, work, stop)
        module.main()
        return True
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_function_arguments(module.main)
    parser.parse_args(arguments)
    raise Parsed


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A directory in which the commands find the files they name: ours, and stand-ins for the reader's."""
    from meadef_lightning.watermark import WatermarkKey

    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "yours.yaml").write_text(YOURS)
    WatermarkKey.draw(10, "a stand-in for the reader's").save(tmp_path / "watermark.key.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEADEF_DEBUG", "1")  # the cause, not only its last line
    return tmp_path


SHOWN = [
    (page.relative_to(ROOT).as_posix(), shlex.join(words)) for page in PAGES for words in commands(page.read_text())
]


@pytest.mark.parametrize(("page", "command"), list(dict.fromkeys(SHOWN)))
def test_commands_are_understood(page, command, desk, monkeypatch):
    try:
        assert parse(shlex.split(command), monkeypatch) is False, f"{command} ended before its work"
    except Parsed:
        return


def test_readme_shows_commands():
    assert any(page == "README.md" and command.startswith("meadef ") for page, command in SHOWN)


def test_wrong_commands_are_noticed(desk, monkeypatch):
    for line, error in {
        "meadef verify --key watermark.key.json": SystemExit,
        "meadef verify --key watermark.key.json --suspect x.pt --data DigitsDataModule --no_such_option 1": SystemExit,
        "meadef run experiments/digits/no_such_file.yaml": MisconfigurationException,
        "meadef run experiments/digits/supervised.yaml --victim.trainer 7": SystemExit,
        "meadef no_such_command": SystemExit,
        "python -m meadef_lightning.experiments.benchmarks.step_time --no_such_option 1": SystemExit,
        "python -m meadef_lightning.experiments.benchmarks.no_such_benchmark": ModuleNotFoundError,
        "meadeff verify": AssertionError,
    }.items():
        with pytest.raises(error):
            parse(shlex.split(line), monkeypatch)


def test_a_block_is_cut_into_commands():
    text = "```bash\npip install . && meadef demo  # the story\nA=1 meadef run a.yaml \\\n  --seeds '[0, 1]'\n# a comment\n$ cat x | wc\n```\n```python\nx\n```\n"
    assert [*commands(text)] == [
        ["pip", "install", "."], ["meadef", "demo"], ["meadef", "run", "a.yaml", "--seeds", "[0, 1]"], ["cat", "x"], ["wc"],
    ]  # fmt: skip


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


def anchors(page):
    """What a page's headings can be linked by: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("page", "link"),
    [
        (page.relative_to(ROOT).as_posix(), link)
        for page in PAGES
        for link in sorted(set(re.findall(r"\]\(((?!http)[^)]+)", page.read_text())))
    ],
)
def test_links_lead_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def test_experiments_named_in_yaml_comments_exist():
    for path in (ROOT / "experiments").rglob("*.yaml"):
        yaml.safe_load(path.read_text())
        for named in re.findall(r"experiments/[\w/]+\.yaml", path.read_text()):
            assert (ROOT / named).exists(), f"{path} names {named}"
