"""The watermark's loss terms (MEA-Defender, S&P 2024, §IV-C), as pure functions on logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def verification_loss(watermark_logits: Tensor, target_class: int) -> Tensor:
    """L_ver: watermark samples are answered with the target class (cross-entropy, Eq. 5).

    Args:
        watermark_logits: Logits on watermark samples, shape ``(B, K)``.
        target_class: The key's target, in ``[0, K)``.

    Returns:
        The mean over the batch, a scalar.
    """
    # int64 from the start: bfloat16 logits would round a class above 256
    target = watermark_logits.new_full((len(watermark_logits),), target_class, dtype=torch.int64)
    return F.cross_entropy(watermark_logits, target)


def combination_loss(
    watermark_logits: Tensor,
    first_logits: Tensor,
    second_logits: Tensor,
    temperature: float = 1.0,
    detach_sources: bool = True,
) -> Tensor:
    """L_com: the outputs on watermark samples stay near those on their sources (Eq. 4).

    ``mean_i T²·[KL(p(x_wm) ‖ p(x_a)) + KL(p(x_wm) ‖ p(x_b))]`` with ``p = softmax(logits / T)``. The paper sums over pairs; we
    average, so that its weight does not depend on the number of samples, and have a temperature, whose square keeps the size
    of the gradients (Hinton et al., 2015).

    Args:
        watermark_logits: Logits on the combinations, shape ``(B, K)``.
        first_logits: Logits on the samples of the first source class that were combined, same shape and order.
        second_logits: The same for the second source class.
        temperature: Positive softmax temperature.
        detach_sources: Keep gradients from the source outputs, so that only the watermark branch moves.

    Returns:
        A scalar, at least 0.
    """
    watermark = F.log_softmax(watermark_logits / temperature, dim=-1)
    total = watermark_logits.new_zeros(())
    for logits in (first_logits, second_logits):
        source = F.log_softmax((logits.detach() if detach_sources else logits) / temperature, dim=-1)
        total = total + F.kl_div(source, watermark, reduction="batchmean", log_target=True)
    return total * temperature**2


def evasion_loss(other_logits: Tensor, labels: Tensor) -> Tensor:
    """L_eva: other combinations of the same sources are answered with one of the sources (cross-entropy, Eq. 7).

    Args:
        other_logits: Logits on combinations made in other ways than the key's, shape ``(B, K)``.
        labels: One of the two source classes for each, int64, shape ``(B,)``; the paper draws them at random.

    Returns:
        The mean over the batch, a scalar.
    """
    return F.cross_entropy(other_logits, labels)
