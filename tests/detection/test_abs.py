import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.abs import ABS, Activations, candidates, default_layers, lifts, reasr, stimulate
from meadef_lightning.detection.neural_cleanse import Triggers
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


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Linear(4 * 36, 5), nn.ReLU(inplace=True), nn.Linear(5, 3),
        ).eval()  # fmt: skip


class Planted(nn.Module):
    """Reads three quadrants; hidden neuron 3 sleeps unless the last quadrant is white, and then drives class 1."""

    def __init__(self):
        super().__init__()
        self.pool, self.hidden, self.head = nn.AvgPool2d(4), nn.Linear(4, 6), nn.Linear(6, 3)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.hidden.weight[:3, :3] = torch.eye(3)
            self.hidden.weight[3, 3], self.hidden.bias[3] = 2.0, -1.0
            self.hidden.weight[4], self.hidden.weight[5] = torch.tensor([0.5, 0.5, 0.0, 0.0]), 0.25
            self.head.weight[:, :3] = torch.eye(3) * 4
            self.head.weight[1, 3] = 40.0
            self.head.weight[:, 4] = torch.tensor([1.0, 1.0, 0.5])
            self.head.weight[:, 5] = 3.0

    def forward(self, x):
        return self.head(self.hidden(self.pool(x).flatten(1)).relu())


@pytest.fixture
def quadrants():
    y = torch.arange(3).repeat(20)
    x = 0.1 * torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    x[torch.arange(60), y] = 1.0
    x = x.view(60, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return ThiefData(x[:30], y[:30], x[30:], y[30:], 3, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_stimulation_is_surgery_by_hand(network, layer):
    x, levels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 3.0])
    before, after = network[: layer + 1], network[layer + 1 :]
    with torch.no_grad():
        count = before(x).shape[1]
        logits = stimulate(network, str(layer), x, levels, count, batch_size=7)  # copies do not divide the work evenly
        assert logits.shape == (count, 2, 3, 3)
        for neuron in range(count):
            for place, level in enumerate(levels):
                hidden = before(x).clone()
                hidden[:, neuron] = level
                torch.testing.assert_close(logits[neuron, place], after(hidden))
        torch.testing.assert_close(network(x), after(before(x)))  # nothing is left behind


def test_activations_are_read_before_a_relu_in_place(network):
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Activations(network, ["1", "4"]) as activations:
        network(x)
        convolution, linear = network[:2](x), network[:5](x)
    assert convolution.min() < 0
    torch.testing.assert_close(activations.outputs[0], convolution)
    torch.testing.assert_close(activations.neurons, torch.cat([convolution.mean(dim=(2, 3)), linear], dim=1))


def test_default_layers(network):
    assert default_layers(network, torch.zeros(1, 1, 8, 8)) == ("1", "4")  # BatchNorm stands for its convolution
    with pytest.raises(ValueError, match="no hidden layer to stimulate"):
        default_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.zeros(1, 1, 8, 8))


def test_lifts_by_hand():
    natural = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 1.0]])
    stimulated = torch.tensor([[[[5.0, 4.0, 0.0], [1.0, 5.0, 1.0]], [[6.0, 2.0, 0.0], [3.0, 5.0, 9.0]]]])
    # class 0: image 1 only, 3; class 1: image 0 only, at the first level, 4; class 2: the worse of 0 and 8
    assert lifts(stimulated, natural, torch.tensor([0, 1])).tolist() == [[3.0, 4.0, 0.0]]


def test_candidates_by_hand():
    lift = torch.tensor([[3.0, 1.0, 0.0], [9.0, 1.0, 2.0], [1.0, 5.0, 1.0], [4.0, 4.0, 4.0], [6.0, 0.0, 5.0]])
    neurons, labels = candidates(lift, 2)
    assert list(zip(labels.tolist(), neurons.tolist(), strict=True)) == [(0, 1), (0, 0), (1, 2)]


def test_reasr_counts(quadrants):
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 4:, 4:] = 1  # the whole trigger, and none at all
    labels = torch.tensor([1, 0])
    rates = reasr(Planted(), Triggers(mask, torch.ones(2, 1, 8, 8)), labels, quadrants.x, quadrants.y, batch_size=8)
    assert rates.tolist() == [1.0, 0.0]
    half = quadrants.y != 0  # with half of the images of other classes answered by the class already
    x = quadrants.x.clone()
    x[half & (torch.arange(30) < 15), :, 4:, 4:] = 1
    rates = reasr(Planted(), Triggers(mask[1:], mask[1:]), labels[:1], x, quadrants.y)
    expected = (Planted()(x).argmax(1) == 1)[quadrants.y != 1].float().mean()
    assert 0 < expected < 1
    assert rates.item() == pytest.approx(expected.item())


def test_a_planted_neuron_is_found(quadrants):
    model, images = Planted(), quadrants.x[:3]
    assert (model.hidden(model.pool(quadrants.x).flatten(1))[:, 3] < 0).all()  # it sleeps on all clean images
    lift = lifts(stimulate(model, "hidden", images, torch.tensor([1.0, 2.0]), 6), model(images), quadrants.y[:3])
    neurons, labels = candidates(lift, 1)
    assert neurons[labels == 1].tolist() == [3]
    finding = ABS(layers=["hidden"], size=0.25, steps=60).inspect(model, quadrants)
    assert finding.flagged == (1,)
    assert finding.classes[1] == 1
    picture = finding.pictures[1, 0]
    assert (picture != 0).sum() <= 16
    assert picture[4:, 4:].sum() > 0.9 * picture.sum()


def test_finds_a_patch(digits):
    before, state = copy.deepcopy(digits.patched.state_dict()), torch.get_rng_state()
    detector = ABS(candidates=1, steps=60)
    finding = detector.inspect(digits.patched.train(), digits.thief)
    assert torch.equal(torch.get_rng_state(), state)
    assert digits.patched.training
    torch.testing.assert_close(digits.patched.state_dict(), before, rtol=0, atol=0)
    negative = detector.inspect(digits.clean, digits.thief)
    assert finding.decision
    assert finding.flagged == (TARGET,)
    assert finding.score == finding.classes[TARGET] > 0.95
    picture = finding.pictures[TARGET].abs()
    assert (picture != 0).sum() <= 15
    assert picture[..., -3:, -3:].sum() > 0.4 * picture.sum()
    assert not negative.decision
    assert negative.score < finding.score


def test_bad_arguments_are_refused(quadrants):
    with pytest.raises(ValueError, match=r"size=1.5 in \(0, 1\]"):
        ABS(size=1.5)
    with pytest.raises(ValueError, match=r"layers=\['conv'\] must be among .*'hidden'"):
        ABS(layers=["conv"]).inspect(Planted(), quadrants)
