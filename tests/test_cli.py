"""The commands, as a user types them."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from meadef_lightning import cli
from meadef_lightning.cli import main
from meadef_lightning.data import DigitsDataModule
from meadef_lightning.experiment.lock import locked
from meadef_lightning.victims import SupervisedVictim
from meadef_lightning.victims.networks import DigitsCNN
from meadef_lightning.watermark import WatermarkKey

KEY = WatermarkKey.draw(10, "test")


class Theirs(LightningModule):
    """Somebody's module, which knows nothing of us."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def key_file(tmp_path):
    return str(KEY.save(tmp_path / "watermark.key.json"))


def test_help_and_version(capsys):
    for arguments in ([], ["--help"]):
        main(arguments)
        assert "usage: meadef COMMAND" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("meadef ")


@pytest.mark.parametrize("command", ["run", "demo", "verify", "serve", "fit"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_help_of_run_teaches_the_experiment_file(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "--victim.model",
        "--watermark.key",
        "--extraction",
        "--independent",
        "--verification.alpha",
        "--output",
    ):
        assert option in text
    assert "Environment variable that holds the owner secret" in text


def test_help_is_quick_because_it_imports_little():
    code = "import sys; from meadef_lightning.cli import main; main(['--help']); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("False\n")


def test_console_script_is_installed():
    from importlib.metadata import entry_points

    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "meadef"]
    assert script.load() is main


def test_overlay_adds_the_watermark_to_somebodys_configuration(tmp_path, monkeypatch, key_file):
    monkeypatch.chdir(tmp_path)
    overlay = str(Path(__file__).parents[1] / "experiments" / "overlays" / "watermark.yaml")
    base = {
        "model": {"class_path": f"{__name__}.Theirs"},
        "data": {"class_path": "DigitsDataModule"},
        "trainer": {
            "max_epochs": 2,
            "limit_train_batches": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
        },
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    main(["fit", "-c", "base.yaml", "-c", overlay])
    (log,) = tmp_path.glob("lightning_logs/version_*")
    columns = (log / "metrics.csv").read_text().splitlines()[0] if (log / "metrics.csv").exists() else ""
    saved = yaml.safe_load((log / "config.yaml").read_text())
    assert [c["class_path"].rpartition(".")[2] for c in saved["trainer"]["callbacks"]] == [
        "LearningRateMonitor",
        "WatermarkCallback",
    ]
    assert saved["trainer"]["callbacks"][1]["init_args"]["key"] == "watermark.key.json"
    assert KEY.salt not in (log / "config.yaml").read_text()
    assert "watermark/ver" in columns or not columns


def checkpoint(tmp_path, state=None):
    """A directory as LightningCLI leaves it."""
    folder = tmp_path / "suspect"
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "model": {
            "class_path": "meadef_lightning.victims.SupervisedVictim",
            "init_args": {"network": {"class_path": "meadef_lightning.victims.networks.DigitsCNN"}},
        }
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    model = SupervisedVictim(DigitsCNN, num_classes=10, in_channels=1)
    model.configure_model()
    torch.save({"state_dict": state or model.state_dict()}, folder / "checkpoints" / "model.ckpt")
    return folder, model


SMALL = [
    "--data",
    "DigitsDataModule",
    "--verification.samples",
    "60",
    "--verification.decoys",
    "99",
    "--verification.decoy_samples",
    "4",
]


def verify(tmp_path, key_file, suspect, *more):
    (tmp_path / "verdict" / "evidence.json").unlink(missing_ok=True)  # of another command it is not overwritten
    main(["verify", "--key", key_file, "--suspect", str(suspect), *SMALL, "--output", str(tmp_path / "verdict"), *more])
    return json.loads((tmp_path / "verdict" / "verdict.json").read_text())


def test_verify_an_innocent_model(tmp_path, key_file, capsys):
    folder, model = checkpoint(tmp_path)
    verdict = verify(tmp_path, key_file, folder, "--reference", str(folder))
    assert verdict["verdict"] != "supported"
    assert verdict["reference"]
    x, y = DigitsDataModule().tensors("test")
    with torch.no_grad():
        assert verdict["natural_accuracy"] == pytest.approx(float((model.eval()(x).argmax(-1) == y).double().mean()))
    assert (tmp_path / "verdict" / "evidence.json").exists()
    assert "Verdict:" in capsys.readouterr().out


def test_verify_checkpoint_state_dict_and_torchscript_alike(tmp_path, key_file):
    folder, model = checkpoint(tmp_path)
    first = verify(tmp_path, key_file, folder / "checkpoints" / "model.ckpt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert verify(tmp_path, key_file, tmp_path / "weights.pt", "--model", str(folder / "config.yaml")) == first
    torch.jit.trace(model.network.eval(), torch.zeros(2, 1, 16, 16)).save(str(tmp_path / "model.ts"))
    assert verify(tmp_path, key_file, tmp_path / "model.ts", "--trust_code") == first


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return str(stop.value.code) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["destroy"], "no command 'destroy'; it is one of demo, run, grid, verify, key, evidence, serve, fit"),
        (["run"], "Give an experiment file, before all options, e.g. meadef run"),
        (["run", "missing.yaml"], "no experiment file missing.yaml"),
    ],
)
def test_mistakes_are_explained(arguments, message, capsys):
    assert message in fails(arguments, capsys)


def test_verify_mistakes(tmp_path, key_file, capsys):
    folder, _ = checkpoint(tmp_path)
    base = ["verify", "--output", str(tmp_path / "out"), *SMALL]
    (tmp_path / "corrupt.json").write_text("{")
    assert "not valid JSON" in fails([*base, "--key", str(tmp_path / "corrupt.json"), "--suspect", str(folder)], capsys)
    assert "There is no model at" in fails([*base, "--key", key_file, "--suspect", str(tmp_path / "none")], capsys)
    three = str(WatermarkKey.draw(3, "x").save(tmp_path / "three.json"))
    assert "key is for 3 classes" in fails([*base, "--key", three, "--suspect", str(folder)], capsys)
    (folder / "checkpoints" / "model.ckpt").write_bytes(b"garbage")
    assert "can be read safely" in fails([*base, "--key", key_file, "--suspect", str(folder)], capsys)
    (tmp_path / "bare.ckpt").write_bytes(b"garbage")
    message = fails([*base, "--key", key_file, "--suspect", str(tmp_path / "bare.ckpt")], capsys)
    assert "no config.yaml beside" in message
    assert "--model" in message


def test_verify_keeps_what_another_command_found_and_one_at_a_time(tmp_path, key_file, capsys):
    folder, _ = checkpoint(tmp_path)
    output = tmp_path / "out"
    command = ["verify", "--key", key_file, "--suspect", str(folder), *SMALL, "--output", str(output)]
    main(command)
    main(command)  # the same again is no other finding
    evidence = (output / "evidence.json").read_bytes()
    assert "holds the evidence of: meadef verify" in fails([*command, "--verification.seed", "1"], capsys)
    assert (output / "evidence.json").read_bytes() == evidence
    with locked(output):
        assert "Another run is at work" in fails(command, capsys)


@pytest.fixture
def serve(tmp_path, monkeypatch, capfd):
    """Runs ``meadef serve`` on a free port, in a thread; gives its URL, and what it says."""
    from meadef_lightning.oracle import server

    running, started = [], threading.Event()
    make = server.server

    def noted(app):
        running.append((make(app), threading.current_thread()))
        started.set()
        return running[-1][0]

    monkeypatch.setattr(server, "server", noted)

    def start(suspect, *more):
        arguments = ["serve", "--checkpoint", str(suspect), "--data", "DigitsDataModule", "--port", "0", *more]
        threading.Thread(target=main, args=(arguments,), daemon=True).start()
        assert started.wait(30)
        text = capfd.readouterr().out
        return re.search(r"http://127.0.0.1:\d+", text)[0], text

    yield start
    for server_, thread in running:
        server_.should_exit = True
        thread.join(10)


def test_serve_a_stage_directory(tmp_path, serve, monkeypatch):
    from meadef_lightning.oracle import HTTPOracle, Oracle, QueryLedger, ServerBudgetExceededError, TopK

    monkeypatch.delenv("MEADEF_API_KEYS", raising=False)
    folder, model = checkpoint(tmp_path)
    output = tmp_path / "served"
    url, text = serve(
        folder, "--policy", "TopK", "--policy.k", "3", "--limits.budget", "40", "--limits.rows_per_request", "25",
        "--output", str(output),
    )  # fmt: skip
    keys = output / "api-keys.txt"  # made, since there was none
    assert keys.stat().st_mode & 0o077 == 0
    name, _, key = keys.read_text().strip().partition(":")
    assert key not in text
    assert "Serving topk answers" in text
    x, _ = DigitsDataModule().tensors("test")
    oracle = HTTPOracle(url, key, retries=0)
    answers = oracle.query(x[:30])
    torch.testing.assert_close(answers, Oracle(model, TopK(3), batch_size=25).query(x[:30]))
    with pytest.raises(ServerBudgetExceededError, match="30 are spent, 20 new ones were asked, 10 are left"):
        oracle.query(x[:50])
    with pytest.raises(OSError, match="normalise the images"):
        oracle.query(x[:1] * 255)
    assert QueryLedger(output / f"{name}.sqlite").totals().distinct == 30


def test_a_served_suspect_is_judged(tmp_path, serve, key_file, monkeypatch):
    folder, _ = checkpoint(tmp_path)
    monkeypatch.setenv("MEADEF_API_KEYS", "judge:a-test-key-0123456789")
    monkeypatch.setenv("MEADEF_API_KEY", "a-test-key-0123456789")
    url, _ = serve(folder, "--output", str(tmp_path / "served"))
    local = verify(tmp_path / "local", key_file, folder)
    assert verify(tmp_path / "remote", key_file, url) == local


def test_serve_mistakes(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MEADEF_API_KEYS", raising=False)
    folder, _ = checkpoint(tmp_path)
    base = ["serve", "--checkpoint", str(folder), "--data", "DigitsDataModule", "--output", str(tmp_path / "served")]
    keys = tmp_path / "keys.txt"
    assert "Cannot read the API keys" in fails([*base, "--api_keys", str(keys)], capsys)
    keys.write_text("alice:tooshort")
    message = fails([*base, "--api_keys", str(keys)], capsys)
    assert "16 to 512 visible" in message
    assert "tooshort" not in message
    monkeypatch.setenv("MEADEF_API_KEYS", "tooshort")
    assert "the environment variable MEADEF_API_KEYS is not of the form NAME:KEY" in fails(base, capsys)
    monkeypatch.setenv("MEADEF_API_KEYS", "alice:a-test-key-0123456789")
    from meadef_lightning.oracle import Oracle, QueryLedger, Soft

    ledger = QueryLedger(tmp_path / "served" / "alice.sqlite")
    Oracle(DigitsCNN(10, 1), Soft(), ledger).query(torch.zeros(1, 1, 16, 16))
    assert "answers of another victim or policy" in fails(base, capsys)
    assert "port=70000 must lie in 0 to 65535" in fails(
        [*base[:-1], str(tmp_path / "other"), "--port", "70000"], capsys
    )
    assert "--device bogus cannot be used here" in fails([*base, "--device", "bogus"], capsys)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "meadef_lightning.oracle.server", raising=False)
    assert 'pip install "meadef-lightning[serve]"' in fails(base, capsys)


@pytest.mark.parametrize(("command", "told"), [("run", "; the same command goes on from here"), ("serve", "")])
@pytest.mark.parametrize("training", [False, True])
def test_ctrl_c(command, told, training, monkeypatch, capsys):
    def interrupted(_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if training:  # as Lightning does
                sys.exit(1)
            raise

    monkeypatch.setitem(cli._COMMANDS, command, interrupted)
    with pytest.raises(SystemExit) as stop:
        main([command])
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"\nmeadef {command}: interrupted{told}.\n"


def test_sigterm(monkeypatch, capsys):
    def interrupted(_):
        raise SIGTERMException  # as Lightning does

    monkeypatch.setitem(cli._COMMANDS, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == 143
    assert capsys.readouterr().err == "\nmeadef run: interrupted; the same command goes on from here.\n"


def test_other_exits_stay_as_they_are(monkeypatch, capsys):
    monkeypatch.setitem(cli._COMMANDS, "run", lambda _: sys.exit(3))
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == 3
    assert not capsys.readouterr().err


def test_a_users_error_has_no_traceback_unless_asked_for(monkeypatch):
    with pytest.raises(SystemExit):
        main(["run", "missing.yaml"])
    monkeypatch.setenv("MEADEF_DEBUG", "1")
    with pytest.raises(MisconfigurationException, match="no experiment file"):
        main(["run", "missing.yaml"])
