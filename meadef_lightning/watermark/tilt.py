"""Which natural answers carry a watermark to a thief, and how far to tilt them.

A thief sees the victim's answers to natural samples only. What can make *his* network answer combinations with the target is
therefore what these answers say, and most natural samples say nothing about combinations. To first order, a student that fits
answers by a linear layer on features ``φ`` changes its output on a combination ``w`` by ``φ(w)ᵀ (ΦᵀΦ/N + λI)⁻¹ φ(x) / N``
for each unit of change in the answer to ``x``: ridge regression's influence. So the victim learns soft labels on the natural
samples of the two source classes: the more influence a sample has on the watermark, and not on other combinations of the same
sources, the more probability it gives to the target.

The idea of shaping natural answers is ours, not the paper's. It replaces most of what weights on ``L_ver`` buy at a higher price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meadef_lightning.last_linear import last_linear_run
from meadef_lightning.modes import evaluation_mode

FULL = 0.99
"""Quantile of a class's influence at which tilting is full."""


def influence(natural: Tensor, watermark: Tensor, others: Tensor, ridge: float = 0.1, contrast: float = 0.5) -> Tensor:
    """Tells how much each natural sample's answer moves a linear student's answer on the watermark.

    With ``X`` the centred natural features, the scores are ``X (XᵀX/N + λI)⁻¹ v`` where ``v`` is the mean watermark feature minus
    ``contrast`` times the other combinations' mean and ``1 − contrast`` times the naturals', and ``λ`` is ``ridge`` times
    the mean variance of a feature. They are computed in the dual, with one ``N×N`` system whatever the number of features.

    Args:
        natural: Features of natural source samples, ``(N, D)``.
        watermark: Features of watermark samples, ``(M, D)``.
        others: Features of other combinations of the same sources, ``(L, D)``; may be empty.
        ridge: Strength of the regularisation, above 0.
        contrast: How much influence on other combinations counts against a sample, in ``[0, 1]``.

    Returns:
        Scores, float32 ``(N,)``; only their order and relative distances mean anything.
    """
    natural, watermark, others = (features.flatten(1).float() for features in (natural, watermark, others))
    mean = natural.mean(0)
    x = natural - mean
    other = others.mean(0) if len(others) else mean
    gram = x @ x.T / len(x)
    regular = (ridge * gram.diagonal().sum() / x.shape[1]).clamp_min(1e-12)  # equal features have no influence
    v = x @ (watermark.mean(0) - contrast * other - (1 - contrast) * mean)
    # X (XᵀX/N + λI)⁻¹ v = (XXᵀ/N + λI)⁻¹ X v
    # a set dtype here and below, since precisions such as "bf16-true" change the default one inside training_step
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scores: Tensor = torch.linalg.solve(gram + regular * unit, v)
    return scores


def target_mass(scores: Tensor, maximum: float, begin: float = 0.5) -> Tensor:
    """Turns one class's scores into probabilities for the target: 0 up to a quantile, then rising to ``maximum``.

    Args:
        scores: Influence of the class's samples, ``(N,)``.
        maximum: Probability at the 99th percentile and above, in ``[0, 1]``.
        begin: Quantile up to which it is 0, in ``[0, 0.99)``.

    Returns:
        Probabilities ``(N,)`` in ``[0, maximum]``.
    """
    low, high = torch.quantile(scores, torch.tensor([begin, FULL], dtype=scores.dtype, device=scores.device))
    mass: Tensor = maximum * ((scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)).clamp(0, 1)
    return mass


def tilt_loss(logits: Tensor, labels: Tensor, target: int, mass: Tensor, share: float | Tensor) -> Tensor:
    """What the task's cross-entropy must be changed by for soft labels on the source classes.

    Cross-entropy under the label ``(1 − τ)·e_y + τ·e_t`` exceeds that under ``e_y`` by ``τ (log p_y − log p_t)``. With ``share`` the
    source classes' share of the batches, ``share · mean(…)`` over samples of these classes is an unbiased estimate of the
    change of a batch's mean loss.

    Args:
        logits: ``(B, K)``.
        labels: True classes, int64 ``(B,)``.
        target: The target class.
        mass: ``τ`` of every sample, ``(B,)`` in ``[0, 1]``.
        share: Share of all training samples that belong to the source classes.

    Returns:
        A scalar, to be added to the task's loss; it may be negative.
    """
    log_p = logits.float().log_softmax(dim=-1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    return share * (mass * (own - log_p[:, target])).mean()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, uncompiled and without gradients inside the block, and afterwards exactly the flags from before."""
    with evaluation_mode(module), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def penultimate_features(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns the input of the last ``nn.Linear`` that runs in ``forward(x)``, without its gradients.

    Args:
        module: The module whose layers ``forward`` runs through.
        forward: Maps samples to anything.
        x: Samples, ``(B, C, *spatial)``.

    Returns:
        Features, ``(B, …)``.

    Raises:
        ValueError: If no ``nn.Linear`` runs.
    """
    last = last_linear_run(module, forward, x)
    if last is None or len(last[1]) != len(x):
        raise ValueError(
            f"{type(module).__name__} runs no nn.Linear on its samples, on whose input the influence of natural samples is "
            "measured. Set tilt=0 to leave natural answers as they are."
        )
    return last[1].detach()
