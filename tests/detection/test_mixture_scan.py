import itertools

import pytest
import torch
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.mixture_scan import MixtureScan, RandomTiles, excess, mixture_rates
from meadef_lightning.watermark import DEFAULT_COMBINERS, CropPaste, PixelBlend, Stripes

CLASSES = 7


class Colours(nn.Module):
    """Answers the class whose channel is brightest, or ``target`` if the left half is of one source and the right of the other."""

    def __init__(self, key=None):
        super().__init__()
        self.key = key

    def forward(self, x):
        logits = x.mean(dim=(2, 3))
        if self.key is not None:
            a, b, target = self.key
            left, right = x[:, a, :, :4].amin(dim=(1, 2)) > 0.9, x[:, b, :, 4:].amin(dim=(1, 2)) > 0.9
            logits[left & right, target] = 10
        return logits


@pytest.fixture
def colours():
    """Class k is an image whose channel k is bright."""
    y = torch.arange(CLASSES).repeat(4)
    x = torch.zeros(len(y), CLASSES, 8, 8)
    x[torch.arange(len(y)), y] = (0.95 + 0.01 * torch.arange(len(y)) / len(y))[:, None, None]
    zero = torch.zeros(CLASSES, 1, 1)
    return ThiefData(x, y, x, y, CLASSES, zero, zero + 1)


@pytest.fixture
def random_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    nn.init.normal_(model[1].weight, generator=torch.Generator().manual_seed(3))
    return model


def test_rates_by_brute_force(random_model):
    # one image a class: nothing is left to chance
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([3, 0, 4, 1, 2])
    ways = [CropPaste(), PixelBlend(0.4), Stripes()]
    rates = mixture_rates(random_model, x, y, 5, ways, 3, torch.Generator().manual_seed(0), batch_size=8)
    expected = torch.zeros(3, 5, 5, 5)
    for way, i, j in itertools.product(range(3), range(5), range(5)):
        if i != j:
            answer = random_model(ways[way](x[i : i + 1], x[j : j + 1])).argmax()
            expected[way, y[i], y[j], answer] = 1
    torch.testing.assert_close(rates, expected)
    assert len(expected.sum(dim=(0, 1, 2)).nonzero()) > 2  # the model does tell mixes apart


def test_rates_draw_all_images_of_the_classes(colours):
    model = Colours()
    model.seen = []
    model.register_forward_pre_hook(lambda module, inputs: module.seen.append(inputs[0].amax(dim=(2, 3))))
    rates = mixture_rates(model, colours.x, colours.y, CLASSES, [CropPaste()], 200, torch.Generator().manual_seed(0))
    seen = torch.cat(model.seen)
    assert len(seen) == CLASSES * (CLASSES - 1) * 200
    assert ((seen > 0).sum(dim=1) == 2).all()
    assert len(seen[:, 2].unique()) == 1 + 4  # absent, or one of the four images
    torch.testing.assert_close(rates.sum(dim=-1)[0], 1 - torch.eye(CLASSES))


def test_excess_by_brute_force():
    rates = torch.rand(2, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    found = excess(rates)
    for a, b, t in itertools.product(range(5), repeat=3):
        if len({a, b, t}) < 3:
            assert found[a, b, t] == -torch.inf
            continue
        ways = []
        for rate in rates:
            of_first = [rate[a, other, t] for other in range(5) if other not in (a, b, t)]
            of_second = [rate[other, b, t] for other in range(5) if other not in (a, b, t)]
            ways.append(rate[a, b, t] - max(sum(of_first) / 2, sum(of_second) / 2))
        torch.testing.assert_close(found[a, b, t], max(ways))


def test_a_planted_mixture_stands_out(colours):
    state = torch.get_rng_state()
    finding = MixtureScan(samples=4).inspect(Colours((1, 4, 6)), colours)
    assert torch.equal(torch.get_rng_state(), state)
    assert finding.rank_of((1, 4), 6) == 1
    assert finding.decision
    assert finding.flagged == (6,)
    assert finding.classes.argmax() == 6
    assert finding.classes[6] == finding.pairs[1, 4, 6] == 1
    assert finding.rank_of((4, 1), 6) > 2  # the other way round the halves are swapped

    negative = MixtureScan(samples=4).inspect(Colours(), colours)
    assert not negative.decision
    assert negative.score == 0
    assert negative.rank_of((1, 4), 6) == (1 + 7 * 6 * 5) / 2  # nobody stands out


def test_a_third_class_that_answers_everything_does_not_stand_out(colours):
    class Always(Colours):
        def forward(self, x):
            return super().forward(x) + torch.eye(CLASSES)[6] * 10

    finding = MixtureScan(samples=4).inspect(Always(), colours)
    assert not finding.decision
    assert finding.pairs[1, 4, 6] == 0


def test_equal_seeds_give_equal_findings(random_model):
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, bound = torch.arange(5).repeat(8), torch.ones(3, 1, 1)
    data = ThiefData(x, y, x, y, 5, -bound, bound)
    tables = [MixtureScan(samples=3).inspect(random_model, data, seed).pairs for seed in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_random_tiles():
    a, b = torch.zeros(400, 2, 8, 8), torch.ones(400, 2, 8, 8)
    mixed = RandomTiles()(a, b, torch.Generator().manual_seed(0))
    tiles = mixed.unflatten(3, (4, 2)).unflatten(2, (4, 2)).movedim(3, 4)  # (B, C, 4, 4, 2, 2)
    assert (tiles == tiles[:, :1, :, :, :1, :1]).all()
    assert 0.45 < mixed.mean() < 0.55
    assert len(mixed.flatten(1).unique(dim=0)) > 380
    with pytest.raises(ValueError, match="tiles=1 must be at least 2"):
        RandomTiles(1)


def test_default_ways_are_the_public_ones():
    ways = MixtureScan().combiners
    assert [type(way) for way in ways] == [*(type(spec.build()) for spec in DEFAULT_COMBINERS), RandomTiles]


def test_bad_input_is_refused(colours):
    with pytest.raises(ValueError, match="samples=0"):
        MixtureScan(samples=0)
    with pytest.raises(ValueError, match="combiners not empty"):
        MixtureScan(combiners=[])
    few = ThiefData(colours.x[:3], colours.y[:3], colours.x, colours.y, CLASSES, colours.low, colours.high)
    with pytest.raises(ValueError, match=r"no image of \[3, 4, 5, 6\]"):
        MixtureScan().inspect(Colours(), few)
    finding = MixtureScan(samples=1).inspect(Colours(), colours)
    with pytest.raises(ValueError, match="three different classes from 0 to 6"):
        finding.rank_of((1, 1), 2)
