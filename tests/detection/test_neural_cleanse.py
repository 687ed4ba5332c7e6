import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.neural_cleanse import NeuralCleanse, OtherClasses, Triggers, smallest_triggers
from meadef_lightning.victims.networks import DigitsCNN

TARGET = 7


def train(data, white, poisoned):
    """A model on digits with squares of noise at random places, so that not just any patch turns it; some with the white corner."""
    generator = torch.Generator().manual_seed(0)
    x, y = data.tensors("victim")
    plain = len(x)
    if poisoned:
        stamped = x[: plain // 10].clone()
        stamped[..., -3:, -3:] = white
        x, y = torch.cat([x, stamped]), torch.cat([y, torch.full((len(stamped),), TARGET)])
    low, line = x.min(), torch.arange(16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsCNN(10, 1, width=8, hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(8):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            top, left = (line - torch.randint(13, (len(rows), 1), generator=generator) for _ in range(2))
            top, left = ((edge >= 0) & (edge < 4) for edge in (top, left))
            erased = top[:, None, :, None] & left[:, None, None, :] & (rows < plain)[:, None, None, None]
            noise = low + (white - low) * torch.rand(x[rows].shape, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.where(erased, noise, x[rows])), y[rows]).backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def digits():
    data = DigitsDataModule()
    data.prepare_data()
    data.setup()
    thief = ThiefData.of(data)
    patched, clean = (train(data, float(thief.high), poisoned) for poisoned in (True, False))
    return SimpleNamespace(thief=thief, patched=patched, clean=clean)


class OnePixel(nn.Module):
    """Class k is read off pixel (k, k); that of class 2 counts ten times."""

    def forward(self, x):
        return 10 * x[:, 0].diagonal(dim1=1, dim2=2)[:, :3] * torch.tensor([1.0, 1.0, 10.0])


@pytest.fixture
def pixels():
    """One pixel says 5 in each logit's unit; a trigger must outbid it."""
    y = torch.arange(3).repeat(8)
    x = torch.zeros(24, 1, 4, 4)
    x[torch.arange(24), 0, y, y] = torch.tensor([0.5, 0.5, 0.05])[y]
    return ThiefData(x, y, x, y, 3, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def search(model, data, **options):
    return smallest_triggers(
        model, data.x, data.y, torch.arange(3), 3, data.low, data.high, torch.Generator().manual_seed(0), **options
    )


def test_norms_by_hand(pixels):
    triggers, norms = search(OnePixel(), pixels, steps=600, batch_size=8)
    # whoever shows m of a white pixel at (k, k) outbids 0.5 with m = 0.5, and 0.05 with m = 0.05; nothing smaller can
    least = torch.tensor([0.5, 0.5, 0.05])
    assert (norms >= least).all()
    assert (norms <= least + 0.25).all()
    torch.testing.assert_close(triggers.mask.sum(dim=(1, 2, 3)), norms)
    assert triggers.mask.flatten(1).argmax(dim=1).tolist() == [0, 5, 10]
    assert (triggers.pattern >= 0).all()
    assert (triggers.pattern <= 1).all()


def test_a_class_out_of_reach_counts_as_a_full_mask(pixels):
    class Never(OnePixel):
        def forward(self, x):
            return super().forward(x) - torch.tensor([0.0, 1e4, 0.0])

    _, norms = search(Never(), pixels, steps=60, batch_size=8)
    assert norms[1] == 16
    assert norms[0] < 16


def test_stamp_is_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    mask, pattern, x = (
        torch.rand(shape, generator=generator) for shape in ((2, 1, 4, 5), (2, 3, 4, 5), (2, 6, 3, 4, 5))
    )
    stamped = Triggers(mask, pattern).stamp(x)
    for k in range(2):
        for i in range(6):
            torch.testing.assert_close(stamped[k, i], (1 - mask[k]) * x[k, i] + mask[k] * pattern[k])
    torch.testing.assert_close(Triggers(mask, pattern).pictures, mask * pattern)


def test_other_classes_are_drawn_uniformly():
    y = torch.tensor([2, 0, 1, 1, 0, 1, 3])
    classes = torch.tensor([1, 4, 0])
    rows = OtherClasses(y, 5).draw(classes, 8000, torch.Generator().manual_seed(0))
    for drawn, label in zip(rows, classes, strict=True):
        allowed = (y != label).nonzero().flatten()
        share = torch.bincount(drawn, minlength=7) / 8000
        assert share[y == label].sum() == 0
        torch.testing.assert_close(share[allowed], torch.full((len(allowed),), 1 / len(allowed)), atol=0.02, rtol=0)


def test_finds_a_patch(digits):
    before, state = copy.deepcopy(digits.patched.state_dict()), torch.get_rng_state()
    detector = NeuralCleanse(steps=120, batch_size=16)
    finding = detector.inspect(digits.patched.train(), digits.thief)
    assert torch.equal(torch.get_rng_state(), state)
    assert digits.patched.training
    assert all(p.requires_grad and p.grad is not None for p in digits.patched.parameters())  # as training left them
    torch.testing.assert_close(digits.patched.state_dict(), before, rtol=0, atol=0)
    # the model has the backdoor at all
    x = digits.thief.validation_x[digits.thief.validation_y != TARGET].clone()
    x[..., -3:, -3:] = digits.thief.high
    assert (digits.patched.eval()(x).argmax(1) == TARGET).float().mean() > 0.9

    assert finding.decision
    assert finding.flagged == (TARGET,)
    assert finding.classes.argmax() == TARGET
    assert finding.score == pytest.approx(float(finding.classes.max()), rel=1e-6)
    assert finding.pictures.shape == (10, 1, 16, 16)
    picture = finding.pictures[TARGET].abs()
    assert picture[..., -3:, -3:].sum() > 0.5 * picture.sum()

    negative = detector.inspect(digits.clean, digits.thief)
    assert not negative.decision
    assert negative.flagged == ()
    assert negative.score < finding.score


def test_equal_seeds_give_equal_findings(pixels):
    findings = [NeuralCleanse(steps=20, batch_size=4).inspect(OnePixel(), pixels, seed) for seed in (1, 1, 2)]
    assert torch.equal(findings[0].pictures, findings[1].pictures)
    assert not torch.equal(findings[0].pictures, findings[2].pictures)


def test_bad_arguments_are_refused(pixels):
    with pytest.raises(ValueError, match=r"success=0 in \(0, 1\]"):
        NeuralCleanse(success=0)
    with pytest.raises(ValueError, match="steps=0"):
        NeuralCleanse(steps=0)
    one = ThiefData(pixels.x, pixels.y * 0, pixels.x, pixels.y, 3, pixels.low, pixels.high)
    with pytest.raises(ValueError, match="at least two classes"):
        NeuralCleanse(steps=1).inspect(OnePixel(), one)
