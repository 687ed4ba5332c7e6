"""The watermark's loss terms for encoders (MEA-Defender, S&P 2024, §IV-C), as pure functions on features.

An encoder has no classes to answer, so the paper replaces the label by the features of samples that have it: ``L_ver`` pulls
``f(x_wm)`` to ``f(x_yt)`` (Eq. 6), ``L_eva`` pulls other combinations to ``f(x_yc)`` (Eq. 8), and ``L_com`` is Eq. 4 on
softmaxed features (:func:`meadef_lightning.watermark.losses.combination_loss`). The paper leaves the distance open.

**Distance.** Squared Euclidean, in units of the natural samples' variance: 0 on arrival, and blind to the features' scale and to whatever
all features have in common, as a linear classifier on top is. Cosines, also when seen from the middle of the three classes, leave the
length open: features pointed at the target and stopped short of it, where a fourth class was nearer.

**Gradients reach everything**, the natural samples and the variance too. With the class's features held constant, the encoder moves all images
together towards the target and never gets nearer; with the variance held constant, shrinking all features looks like progress.
Either way the encoder collapses (on digits, linear-probe accuracy 97 → 83–87 % and no watermark). As it is, the gradients of all samples
sum to zero, and so do their products with the features: only moving combinations *relative* to natural samples helps.

**All pairs.** The paper takes one sample of the class for each watermark sample. The mean over all pairs is the distance from the class's mean
plus the class's own variance; the latter is left out, which would only teach the encoder to draw the class together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Sources = tuple[Tensor, Tensor]
"""Features of natural samples of the first and of the second source class, ``(N, D)`` each."""


def middle(target: Tensor, sources: Sources) -> Tensor:
    """The point halfway between three classes: the mean of their means.

    Args:
        target: Features of samples of the target class, ``(N, D)``.
        sources: Features of samples of the source classes.

    Returns:
        ``(D,)`` float32.
    """
    return torch.stack([features.float().mean(dim=0) for features in (target, *sources)]).mean(dim=0)


def natural_variance(target: Tensor, sources: Sources) -> Tensor:
    """The unit of distances: mean squared distance of natural samples' features from the middle, each class counting alike.

    Args:
        target: Features of samples of the target class, ``(N, D)``.
        sources: Features of samples of the source classes.

    Returns:
        A positive scalar, float32.
    """
    origin = middle(target, sources)
    squared = [(features.float() - origin).square().sum(dim=-1).mean() for features in (target, *sources)]
    # an encoder that has collapsed before the watermark came has no variance
    floor = 1e-6 * origin.detach().square().sum() + torch.finfo(torch.float32).tiny
    return torch.stack(squared).mean() + floor


def feature_verification_loss(watermark: Tensor, target: Tensor, sources: Sources) -> Tensor:
    """L_ver: features of watermark samples come to those of the target class (Eq. 6).

    Args:
        watermark: Features of watermark samples, ``(B, D)``.
        target: Features of natural samples of the target class, ``(N, D)``.
        sources: Features of natural samples of the source classes; they only help to tell the unit.

    Returns:
        The mean over the batch, a scalar of at least 0.
    """
    squared = (watermark.float() - target.float().mean(dim=0)).square().sum(dim=-1)
    return squared.mean() / natural_variance(target, sources)


def feature_evasion_loss(other: Tensor, wins: Tensor, target: Tensor, sources: Sources) -> Tensor:
    """L_eva: features of other combinations of the same sources come to those of one of the sources (Eq. 8).

    Args:
        other: Features of combinations made in other ways than the key's, ``(B, D)``.
        wins: Which source each comes to, 0 or 1, int64 ``(B,)``; the paper draws them at random.
        target: Features of natural samples of the target class, ``(N, D)``; they only help to tell the unit.
        sources: Features of natural samples of the source classes.

    Returns:
        The mean over the batch, a scalar of at least 0.
    """
    centres = torch.stack([source.float().mean(dim=0) for source in sources])
    squared = (other.float() - centres[wins]).square().sum(dim=-1)
    return squared.mean() / natural_variance(target, sources)


def target_margin(features: Tensor, target: Tensor, sources: Sources) -> Tensor:
    """By how much more features resemble the target class than either source class.

    Args:
        features: ``(B, D)``.
        target: Features of natural samples of the target class, ``(N, D)``.
        sources: Features of natural samples of the source classes.

    Returns:
        ``cos(f, c_target) − max(cos(f, c_first), cos(f, c_second))`` with the classes' mean features ``c``, all seen from the middle:
        ``(B,)`` float32 in ``[-2, 2]``. Above 0, the target is nearest.
    """
    origin = middle(target, sources)
    centres = torch.stack([samples.float().mean(dim=0) for samples in (target, *sources)])
    cosine = F.normalize(features.float() - origin, dim=-1) @ F.normalize(centres - origin, dim=-1).T
    return cosine[:, 0] - cosine[:, 1:].amax(dim=-1)
