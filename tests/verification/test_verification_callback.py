"""Verification inside of a Trainer of one's own, in one process and in two."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from silent import SILENT
from verification_fakes import KEY, FakeData, Soft, Thief

from meadef_lightning.verification import (
    Evidence,
    SuspectModule,
    VerificationCallback,
    VerificationDataModule,
    check_evidence,
    verify,
)
from meadef_lightning.watermark import WatermarkKey

QUICK = {"samples": 60, "decoy_samples": 4, "accelerator": "cpu"}


class Plain(LightningModule):
    """A module of one's own, which no SuspectModule asks."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.answer(batch[0])


class HardBox:
    def __init__(self, model):
        self.model = model

    def query(self, x):
        return self.model(x).argmax(1)


def predict(suspect, callback, data=None, **options):
    trainer = Trainer(callbacks=[callback], **SILENT, **options)
    data = data or VerificationDataModule(KEY, FakeData(), samples=60, decoy_samples=4, batch_size=100)
    trainer.predict(suspect, datamodule=data, return_predictions=False)


def test_the_callback_judges_any_prediction_run(tmp_path):
    callback = VerificationCallback(KEY, alpha=0.01, evidence_path=tmp_path / "deep" / "evidence.json")
    predict(SuspectModule(Thief(KEY)), callback)
    assert callback.verdict.alpha == 0.01
    assert callback.verdict == verify(Thief(KEY), KEY, FakeData(), alpha=0.01, **QUICK)[0]
    assert check_evidence(tmp_path / "deep" / "evidence.json", KEY) == callback.verdict


def test_a_run_cut_short_is_no_verdict():
    data = VerificationDataModule(KEY, FakeData(), samples=60, decoy_samples=4, batch_size=20)
    with pytest.raises(ValueError, match=r"40 of 60 trigger samples were not asked.*limit_predict_batches"):
        predict(SuspectModule(Thief(KEY)), VerificationCallback(KEY), data, limit_predict_batches=1)


@pytest.mark.parametrize("last", [False, True])
def test_sigterm_ends_it(last, tmp_path):
    class Told(Thief):
        """The scheduler wants the machine back while this suspect answers."""

        asked = 0

        def forward(self, x):
            self.asked += len(x)
            if self.asked >= (questions if last else 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    data = VerificationDataModule(KEY, FakeData(), samples=60, decoy_samples=4, batch_size=20)
    data.setup("predict")
    questions = sum(len(loader.dataset) for loader in data.predict_dataloader())
    suspect = Told(KEY)
    with pytest.raises(SIGTERMException):
        predict(SuspectModule(suspect), VerificationCallback(KEY, evidence_path=tmp_path / "evidence.json"), data)
    assert suspect.asked == (questions if last else 20)
    assert not (tmp_path / "evidence.json").exists()


def test_the_callback_needs_its_own_data_key_and_suspect_module():
    with pytest.raises(MisconfigurationException, match="VerificationDataModule, got BoringDataModule"):
        predict(SuspectModule(Thief(KEY), 7), VerificationCallback(KEY), BoringDataModule())
    with pytest.raises(MisconfigurationException, match="different keys") as caught:
        predict(SuspectModule(Thief(KEY)), VerificationCallback(WatermarkKey.draw(7, "another")))
    assert KEY.combiner.class_path not in str(caught.value)

    for wrong in (lambda x: x, lambda x: x.flatten(1)[:, 0], lambda x: {"scores": x}, lambda x: x[:1, 0, 0, 0].long()):
        with pytest.raises(MisconfigurationException, match=r"scores of shape \(B, K\) or the .* Wrap the model"):
            predict(Plain(wrong), VerificationCallback(KEY))
    with pytest.raises(ValueError, match="answers with 8 classes, but the key and its data have 7"):
        predict(Plain(lambda x: x.flatten(1)[:, :8]), VerificationCallback(KEY))


@pytest.mark.parametrize("answers", ["probabilities", "labels"])
def test_a_module_of_ones_own_gives_scores_or_classes(answers):
    thief, callback = Thief(KEY, share=0.5), VerificationCallback(KEY)
    predict(Plain(thief if answers == "probabilities" else lambda x: thief(x).argmax(1)), callback)
    expected, _ = verify(thief if answers == "probabilities" else HardBox(thief), KEY, FakeData(), **QUICK)
    assert callback.verdict == expected
    assert expected.answers == answers


SCRIPT = """
import sys
import torch
from lightning.pytorch import Trainer
from verification_fakes import KEY, FakeData, Soft, Thief
from meadef_lightning.verification import SuspectModule, VerificationCallback, VerificationDataModule

class Mixed(Soft):
    # the second process gets labels
    def forward(self, x):
        self.form = "labels" if torch.distributed.get_rank() else "logits"
        return super().forward(x)

torch.set_num_threads(1)
for model, path in zip((Soft(Thief(KEY, share=0.5)), Mixed(Thief(KEY, share=0.5))), sys.argv[1:]):
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[VerificationCallback(KEY, evidence_path=path)],
    )
    data = VerificationDataModule(KEY, FakeData(), samples=61, decoy_samples=4, batch_size=50)
    trainer.predict(SuspectModule(model), datamodule=data, return_predictions=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_two_processes_find_what_one_does(tmp_path):
    """Also the shares of the processes differ: 61 triggers. Probabilities add up, and labels in one process are labels in all."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}
    written = [str(tmp_path / name) for name in ("two.json", "mixed.json")]
    subprocess.run([sys.executable, "-c", SCRIPT, *written], check=True, env=environment, timeout=240)
    suspect = Soft(Thief(KEY, share=0.5))
    verdict, responses = verify(
        suspect, KEY, FakeData(), evidence_path=tmp_path / "one.json", **{**QUICK, "samples": 61}
    )
    assert check_evidence(tmp_path / "two.json", KEY) == verdict
    assert verdict.answers == "probabilities"
    assert Evidence.load(written[0]).opened(KEY)["soft"]["cells"] == responses.soft.cells.tolist()
    one, two = ((tmp_path / name).read_text().splitlines() for name in ("one.json", "two.json"))
    different = [a.partition(":")[0] for a, b in zip(one, two, strict=True) if a != b]
    assert set(different) <= {'"created"', '"seal"'}
    labels, _ = verify(HardBox(suspect), KEY, FakeData(), **{**QUICK, "samples": 61})
    assert check_evidence(written[1], KEY) == labels
    assert labels.answers == "labels"
