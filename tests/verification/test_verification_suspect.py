"""What a suspect may answer, where its answers are in its output, and what it is after it was asked."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.verification import verify
from meadef_lightning.verification.suspect import INVALID, answered_labels

QUICK = {"samples": 60, "decoy_samples": 4, "accelerator": "cpu"}


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
