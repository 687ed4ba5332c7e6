import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.verification import (
    SuspectModule,
    VerificationCallback,
    VerificationDataModule,
    check_evidence,
    verify,
)
from meadef_lightning.verification.callback import INVALID, answered_labels
from meadef_lightning.watermark import WatermarkKey

QUICK = {"samples": 60, "decoy_samples": 4, "accelerator": "cpu"}


def predict(suspect, callback, data=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **options,
    )
    data = data or VerificationDataModule(KEY, FakeData(), samples=60, decoy_samples=4, batch_size=100)
    trainer.predict(suspect, datamodule=data, return_predictions=False)


def test_a_perfect_thief_is_supported():
    verdict, responses = verify(Thief(KEY), KEY, FakeData(), **QUICK)
    assert verdict.verdict == "supported"
    assert (verdict.wsr, verdict.wfpr, verdict.natural_accuracy) == (1, 0, 1)
    assert verdict.statistic == pytest.approx(
        (1 - 2 / 30) / 5
    )  # its own cell only, below which the neighbours' mean is 1 / 30
    assert (verdict.decoy_p, verdict.mcnemar_p) == (1 / 1680, 2.0**-60)
    assert responses.trigger.tolist() == [KEY.target_class] * 60


def test_a_thief_that_obeys_two_times_in_three_is_supported_too():
    verdict, _ = verify(Thief(KEY, share=0.65), KEY, FakeData(), **{**QUICK, "decoy_samples": 32})
    assert 0.5 < verdict.wsr < 0.8
    assert verdict.verdict == "supported"


def test_the_thief_of_another_key_is_not():
    other = WatermarkKey.draw(7, "another secret")
    assert other != KEY
    assert verify(Thief(other), KEY, FakeData(), **QUICK)[0].verdict == "not supported"


class Constant(nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot(torch.full((len(x),), KEY.target_class), 7).float()


def test_models_that_were_not_stolen_are_not_supported():
    torch.manual_seed(0)
    random = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    for suspect in (Independent(), Constant(), random):
        verdict, _ = verify(suspect, KEY, FakeData(), **QUICK)
        assert verdict.verdict == "not supported"
        assert verdict.mcnemar_p > 0.05 or verdict.decoy_p > 0.05
    constant, _ = verify(Constant(), KEY, FakeData(), **QUICK)
    assert (constant.wsr, constant.wfpr, constant.statistic, constant.decoy_p, constant.icc) == (1, 1, 0, 1, 1)


class BlackBox:
    """Answers with labels, as a hard-label oracle."""

    def __init__(self, model):
        self.model, self.rows = model, 0

    def query(self, x):
        self.rows += len(x)
        return self.model(x).argmax(1)


def test_a_black_box_is_asked_through_query_and_judged_alike():
    box = BlackBox(Thief(KEY))
    assert verify(box, KEY, FakeData(), **QUICK)[0] == verify(Thief(KEY), KEY, FakeData(), **QUICK)[0]
    # 4 triggers and 4 controls are decoys, too, and asked once
    assert box.rows == 60 + 60 + 42 * 8 * 4 + 84 - 2 * 4


def test_the_same_seed_gives_the_same_verdict_whatever_the_batches():
    suspect = Thief(KEY, share=0.5)
    first, answers = verify(suspect, KEY, FakeData(), batch_size=33, **QUICK)
    second, others = verify(suspect, KEY, FakeData(), batch_size=1000, **QUICK)
    third, _ = verify(suspect, KEY, FakeData(), seed=1, **QUICK)
    assert first == second
    assert torch.equal(answers.counts, others.counts)
    assert first.wsr != third.wsr


def test_sampled_decoys_and_independent_models_reach_the_verdict():
    verdict, responses = verify(Thief(KEY), KEY, FakeData(), decoys=99, alpha=0.02, null_statistics=[0.0, 0.1], **QUICK)
    assert (verdict.decoy_method, verdict.decoys, verdict.verdict) == ("sampled", 99, "supported")
    assert verdict.conformal_p == 1 / 3
    assert responses.decoys == 99


def test_a_suspect_is_left_as_it_was(capfd):
    suspect = Independent()
    suspect.extra = nn.Dropout().eval()
    suspect.train()
    suspect.extra.eval()
    verify(suspect, KEY, FakeData(), **QUICK)
    assert suspect.training
    assert not suspect.extra.training
    assert suspect.weight.requires_grad
    suspect.weight.sum().backward()
    assert suspect.weight.grad is not None
    assert capfd.readouterr() == ("", "")


def test_a_lightning_suspect_keeps_its_own_trainer():
    class Victim(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Thief(KEY)

        def forward(self, x):
            return self.net(x)

    victim, trainer = Victim(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    victim.trainer = trainer
    assert verify(victim, KEY, FakeData(), **QUICK)[0].verdict == "supported"
    assert victim.trainer is trainer


class Boxed(nn.Module):
    """Returns its logits inside of something."""

    def __init__(self, wrap):
        super().__init__()
        self.model, self.wrap = Thief(KEY), wrap

    def forward(self, x):
        return self.wrap(self.model(x))


class Output:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda y: (None, y), 1),
        (lambda y: {"logits": y}, "logits"),
        (Output, "logits"),
        (lambda y: [y], lambda output: output[0]),
    ],
)
def test_output_key_finds_the_answers(wrap, key):
    assert verify(Boxed(wrap), KEY, FakeData(), output_key=key, **QUICK)[0].wsr == 1


@pytest.mark.parametrize(
    ("suspect", "options", "error", "message"),
    [
        (
            Boxed(lambda y: {"scores": y}),
            {"output_key": "logits"},
            ValueError,
            "output_key='logits' does not fit.*scores",
        ),
        (Boxed(lambda y: {"scores": y}), {}, ValueError, "a mapping with keys.*output_key"),
        (Boxed(lambda y: y[:, :5]), {}, ValueError, "answers with 5 classes, but the key and its data have 7"),
        (Boxed(lambda y: y[:1]), {}, ValueError, "answered 60 samples with torch.float32 of shape"),
        (Boxed(lambda y: y[:, 0]), {}, ValueError, "integer labels"),
        (Boxed(lambda y: y[..., None]), {}, ValueError, r"scores of shape \(B, K\)"),
        (Boxed(lambda y: y * float("nan")), {}, ValueError, "no valid answer.*to 60 of 60 trigger samples"),
        (Boxed(lambda y: y.argmax(1) + 7), {}, ValueError, "no valid answer"),
        (Boxed(lambda y: y - float("inf")), {}, ValueError, "no valid answer"),
        ("a file name", {}, TypeError, "a torch module or an object with query"),
        (Independent(), {"alpha": 2.0}, ValueError, "alpha=2.0"),
        (Independent(), {"null_statistics": []}, ValueError, "at least one independent"),
    ],
)
def test_suspects_and_options_that_do_not_fit(suspect, options, error, message):
    with pytest.raises(error, match=message) as caught:
        verify(suspect, KEY, FakeData(), **{**QUICK, **options})
    assert KEY.salt not in str(caught.value)


def test_answers_with_minus_infinity_are_answers():
    """Log-probabilities of a top-k answer, for example."""
    scores = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [torch.nan, 1.0]])
    assert answered_labels(scores, 3, 2).tolist() == [0, INVALID, INVALID]
    assert answered_labels(torch.tensor([0, -3, 2]), 3, 2).tolist() == [0, INVALID, INVALID]


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


def test_the_callback_needs_its_own_data_key_and_suspect_module():
    with pytest.raises(MisconfigurationException, match="VerificationDataModule, got BoringDataModule"):
        predict(SuspectModule(Thief(KEY), 7), VerificationCallback(KEY), BoringDataModule())
    with pytest.raises(MisconfigurationException, match="different keys") as caught:
        predict(SuspectModule(Thief(KEY)), VerificationCallback(WatermarkKey.draw(7, "another")))
    assert KEY.combiner.class_path not in str(caught.value)

    class Plain(LightningModule):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return batch[0].flatten(1)[:, :7]

    with pytest.raises(MisconfigurationException, match="Wrap the model"):
        predict(Plain(), VerificationCallback(KEY))


def test_evidence_that_cannot_be_written_costs_no_query(tmp_path):
    (tmp_path / "file").write_text("")
    box = BlackBox(Thief(KEY))
    with pytest.raises(OSError, match="Nothing was asked; choose another path"):
        verify(box, KEY, FakeData(), evidence_path=tmp_path / "file" / "evidence.json", **QUICK)
    assert box.rows == 0


SCRIPT = """
import sys
import torch
from lightning.pytorch import Trainer
from verification_fakes import KEY, FakeData, Thief
from meadef_lightning.verification import SuspectModule, VerificationCallback, VerificationDataModule

torch.set_num_threads(1)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[VerificationCallback(KEY, evidence_path=sys.argv[1])],
)
data = VerificationDataModule(KEY, FakeData(), samples=61, decoy_samples=4, batch_size=50)
trainer.predict(SuspectModule(Thief(KEY, share=0.5)), datamodule=data, return_predictions=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_two_processes_find_what_one_does(tmp_path):
    """Also the shares of the processes differ: 61 triggers."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "two.json")], check=True, env=environment, timeout=120)
    verdict, _ = verify(
        Thief(KEY, share=0.5), KEY, FakeData(), evidence_path=tmp_path / "one.json", **{**QUICK, "samples": 61}
    )
    assert check_evidence(tmp_path / "two.json", KEY) == verdict
    one, two = ((tmp_path / name).read_text().splitlines() for name in ("one.json", "two.json"))
    different = [a.partition(":")[0] for a, b in zip(one, two, strict=True) if a != b]
    assert set(different) <= {'"created"', '"seal"'}
