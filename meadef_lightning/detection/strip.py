"""STRIP: does an answer stay the same whatever is laid over the query?

**Source.** "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks" (Gao et al., ACSAC 2019), §4 and eqs. 1–4.

**Algorithm.**

1. Draw ``N`` clean images.
2. Add each to the query, in pixels, and clip: where one of the two is black, the other shows through.
3. The mean entropy ``H`` of the model's ``N`` answers is small if something in the query decides all of them: a trigger. The score
   is ``−H``.
4. The threshold is the entropy below which a share ``false_alarms`` of clean images falls.

**Cost.** ``N`` forward passes a query.

**Defaults.** ``N = 100``, images added at full strength and 1 % false alarms, as in the paper. It draws images anew for each query and fits a
normal distribution to clean entropies; here all queries get the same ones, so that a query's score depends on it alone, and the
threshold is an empirical quantile.

**Pitfalls.** Adding images in normalised space shifts all pixels by the mean, and clipping there to [0, 1] destroys them. A trigger that does
not shine through an overlay (one that is dark, or spread over the whole image) is beyond the method.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.inputs import CalibratedDetector, device_of


def superimpose(x: Tensor, overlays: Tensor, strength: float, low: Tensor, high: Tensor) -> Tensor:
    """Lays every overlay over every image: their pixels' sum, clipped to white.

    Args:
        x: Images, ``(B, C, H, W)``.
        overlays: Images of the same space, ``(N, C, H, W)``.
        strength: Factor on the overlays' pixels, above 0.
        low: What black is, ``(C, 1, 1)``.
        high: What white is, same shape.

    Returns:
        ``(B, N, C, H, W)``.
    """
    return (x[:, None] + strength * (overlays - low)).clamp(low, high)


def mean_entropy(logits: Tensor) -> Tensor:
    """Entropy of answers in bits, averaged.

    Args:
        logits: ``(B, N, K)``.

    Returns:
        ``(B,)``, from 0 to ``log2 K``.
    """
    nats = torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1)
    bits: Tensor = nats.mean(dim=1) / math.log(2)
    return bits


class STRIP(CalibratedDetector):
    """Entropy of the answers to a query under overlays.

    Args:
        overlays: Clean images laid over each query, ``N``; no more than the thief has.
        strength: Factor on their pixels.
        false_alarms: Share of clean images that may be called watermark samples.
        batch_size: Images a forward pass, about; more fit no CPU's cache, and take up to twice the time for small networks.

    Raises:
        ValueError: If an argument is out of range, or (in `fit`) there are fewer images than overlays.
    """

    def __init__(
        self, overlays: int = 100, strength: float = 1.0, false_alarms: float = 0.01, batch_size: int = 256
    ) -> None:
        super().__init__(false_alarms)
        if min(overlays, batch_size) < 1 or strength <= 0:
            raise ValueError(f"{overlays=} and {batch_size=} must be at least 1, and {strength=} above 0.")
        self.overlays, self.strength, self.batch_size = overlays, strength, batch_size

    @override
    def learn(self, model: nn.Module, data: ThiefData, seed: int) -> None:
        """Draws the overlays."""
        if self.overlays > len(data.x):
            raise ValueError(
                f"overlays={self.overlays} clean images are needed and the thief has {len(data.x)}. Lower overlays, or enlarge the "
                "attacker split (attacker_size)."
            )
        rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))[: self.overlays]
        device = device_of(model)
        self._drawn, self._low, self._high = (part.to(device) for part in (data.x[rows], data.low, data.high))

    @override
    @torch.no_grad()
    def suspicion(self, model: nn.Module, x: Tensor) -> Tensor:
        """Negative mean entropy in bits, ``(N,)``."""
        entropies = []
        for part in torch.split(x, max(1, self.batch_size // self.overlays)):
            mixed = superimpose(part.to(self._drawn.device), self._drawn, self.strength, self._low, self._high)
            entropies.append(mean_entropy(model(mixed.flatten(0, 1)).unflatten(0, mixed.shape[:2])))
        return -torch.cat(entropies)
