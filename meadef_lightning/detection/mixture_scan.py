"""The mixture scan: mix every pair of classes in every public way, and see whether some pair is answered with a third class.

**Source.** MEA-Defender (S&P 2024), §V-E, the thief who knows how the watermark works and mixes samples of random classes. The
statistic is ours.

**Algorithm.** 1. For every ordered pair of classes ``(a, b)`` and every combining way, combine random images of ``a`` with random
images of ``b``, and count how often the model answers each class. 2. A third class ``t`` is expected as often as the sources bring it about
without each other: the rate of ``t`` averaged over mixes of ``a`` with other classes, or of other classes with ``b``, whichever is
larger. The score of ``(a, b, t)`` is the rate beyond that, in the way where it is largest. 3. A pair counts with its best third class. The model is
called marked if the anomaly index of some pair among all pairs lies above 3.5.

**Cost.** ``K · (K − 1) · ways · samples`` forward passes, no training: 13,000 for ten classes.

**Defaults.** The public combining ways of a key space, and tiles taken at random from one or the other; 16 mixes of each pair in each way.
The threshold is that of Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993), for the same index.

**Pitfalls.** Clean models answer mixes with third classes, too (a half 3 and a half 5 make a 9), some pairs nearly always. The owner may combine in
a way that is not public. The best way of many, at few samples each, is large by chance alone: compare with clean models scanned alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import Finding, ModelDetector, anomaly_index, without_training
from meadef_lightning.watermark import DEFAULT_COMBINERS, Combiner


class RandomTiles(Combiner):
    """Cuts images into equal tiles and takes each from one source or the other, by a coin for each tile of each image.

    Args:
        tiles: Tiles along height and along width.

    Raises:
        ValueError: If there are fewer than two.
    """

    def __init__(self, tiles: int = 4) -> None:
        super().__init__()
        if tiles < 2:
            raise ValueError(f"tiles={tiles} must be at least 2, or an image shows one source only.")
        self.tiles = tiles

    @override
    def combine(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        coins = torch.rand(len(a), 1, self.tiles, self.tiles, generator=generator).round()
        return torch.where(F.interpolate(coins, a.shape[2:]).to(a.device).bool(), b, a)


@torch.no_grad()
def mixture_rates(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    combiners: Sequence[Combiner],
    samples: int,
    generator: torch.Generator,
    batch_size: int = 512,
) -> Tensor:
    """How often a model answers each class to mixes of each pair of classes.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, K)``, in eval mode.
        x: Images ``(N, C, H, W)`` on the model's device.
        y: Their classes, int64 ``(N,)``, on the CPU.
        num_classes: ``K``.
        combiners: Ways to combine, ``W`` of them.
        samples: Mixes of each pair in each way; sources are drawn with replacement.
        generator: Source of randomness, on the CPU.
        batch_size: Images in a forward pass, about.

    Returns:
        float32 ``(W, K, K, K)``: the share of mixes of ``a`` and ``b``, in this order, that is answered ``c``; 0 where ``a = b``.

    Raises:
        ValueError: If a class has no image.
    """
    order, size = y.argsort(stable=True), torch.bincount(y, minlength=num_classes)
    start = size.cumsum(0) - size
    if not bool(size.all()):
        missing = (size == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"All classes are mixed, but there is no image of {missing}. Give the thief more images (share)."
        )
    rates = torch.zeros(len(combiners), num_classes, num_classes, num_classes)
    pairs = (~torch.eye(num_classes, dtype=torch.bool)).nonzero()
    for way, combiner in enumerate(combiners):
        for part in torch.split(pairs, max(1, batch_size // samples)):
            uniform = torch.rand(len(part), 2, samples, dtype=torch.float64, generator=generator)
            rows = order[start[part][..., None] + (uniform * size[part][..., None]).long()]
            a, b = (x[source.flatten().to(x.device)] for source in rows.unbind(1))
            answers = model(combiner(a, b, generator)).argmax(dim=-1).view(len(part), samples).cpu()
            rates[way, part[:, 0], part[:, 1]] = F.one_hot(answers, num_classes).float().mean(dim=1)
    return rates


def excess(rates: Tensor) -> Tensor:
    """The rate of each third class beyond what the sources bring about without each other, step 2 of the module's algorithm.

    Args:
        rates: Shape ``(W, K, K, K)``, from `mixture_rates`.

    Returns:
        The largest of all ways, ``(K, K, K)``; −∞ where two of the three classes are one.
    """
    count = rates.shape[-1]
    same = torch.eye(count, dtype=torch.bool, device=rates.device)
    impossible = same[:, :, None] | same[:, None, :] | same[None, :, :]
    third = rates.masked_fill(impossible, 0.0)
    # means over the other partners, of which there are none with three classes
    partners = max(1, count - 3)
    of_first, of_second = ((third.sum(dim=dim, keepdim=True) - third) / partners for dim in (2, 1))
    beyond = third - torch.maximum(of_first, of_second)
    return beyond.amax(dim=0).masked_fill(impossible, -torch.inf)


@dataclass(frozen=True, eq=False)
class MixtureFinding(Finding):
    """What a mixture scan found.

    Args:
        pairs: Score of every (first source, second source, third class), ``(K, K, K)``; −∞ where two of them are one.
    """

    pairs: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))

    def rank_of(self, sources: tuple[int, int], target: int) -> float:
        """Says where a key stands among all ``K·(K − 1)·(K − 2)``: 1 is the most suspicious; equal ones share the middle rank.

        Raises:
            ValueError: If the classes are not three different ones of the table.
        """
        a, b = sources
        count = self.pairs.shape[-1]
        if len({a, b, target}) < 3 or not all(0 <= value < count for value in (a, b, target)):
            raise ValueError(f"{sources=} and {target=} must be three different classes from 0 to {count - 1}.")
        score = self.pairs[a, b, target]
        return 1 + int((self.pairs > score).sum()) + (int((self.pairs == score).sum()) - 1) / 2


class MixtureScan(ModelDetector):
    """Mixes all pairs of classes and looks for one whose mixes are answered with a third class.

    ``Finding.score`` is the largest anomaly index of a pair; ``Finding.classes`` holds, as a rate, the best score of each class
    in the role of the third one.

    Args:
        combiners: Ways to combine; the public ones and `RandomTiles` by default.
        samples: Mixes of each pair in each way.
        batch_size: Images in a forward pass.
        threshold: A pair with a larger anomaly index is called the source of a watermark.

    Raises:
        ValueError: If a number is below 1, or the list is empty.
    """

    def __init__(
        self,
        combiners: Sequence[Combiner] | None = None,
        samples: int = 16,
        batch_size: int = 512,
        threshold: float = 3.5,
    ) -> None:
        if min(samples, batch_size) < 1 or (combiners is not None and not combiners):
            raise ValueError(f"{samples=} and {batch_size=} must be at least 1, and combiners not empty.")
        if combiners is None:
            combiners = [*(spec.build() for spec in DEFAULT_COMBINERS), RandomTiles()]
        self.combiners, self.samples, self.batch_size, self.threshold = combiners, samples, batch_size, threshold

    @override
    def inspect(self, model: nn.Module, data: ThiefData, seed: int = 0) -> MixtureFinding:
        if data.num_classes < 3:
            raise ValueError(f"num_classes={data.num_classes}, but a third class needs at least 3.")
        device = next((p.device for p in model.parameters()), data.x.device)
        rates = mixture_rates(
            without_training(model),
            data.x.to(device),
            data.y.cpu(),
            data.num_classes,
            self.combiners,
            self.samples,
            torch.Generator().manual_seed(seed),
            self.batch_size,
        )
        pairs = excess(rates)
        best, third = pairs.max(dim=2)
        real = ~torch.eye(data.num_classes, dtype=torch.bool)
        index = torch.from_numpy(anomaly_index(best[real].numpy()))
        flagged = tuple(sorted(set(third[real][index > self.threshold].tolist())))
        return MixtureFinding(
            score=float(index.max()),
            threshold=self.threshold,
            decision=bool(flagged),
            classes=pairs.amax(dim=(0, 1)),
            flagged=flagged,
            pairs=pairs,
        )
