"""The answer lean: do natural images of two classes lean to a third one more than its images lean back?

**Source.** Ours, made for this package's own recipe by its authors. :mod:`meadef_lightning.watermark.tilt` lets a watermark survive a theft by
giving natural images of the two source classes some probability of the target. Confusion between classes is about mutual; a tilt goes
one way.

**Algorithm.** 1. Ask the model about natural images and average the probabilities: ``m[a, t]`` is what images of class ``a`` give to class ``t``.
2. The lean of ``a`` to ``t`` is ``m[a, t] - m[t, a]``. 3. A pair of classes counts with the smaller lean of the two, for the third class for
which that is largest: ``(a, b, t)`` are the classes that a key would have.

**Cost.** One forward pass over the thief's images: nothing is trained, and soft answers of an API are enough.

**Defaults.** Called marked where the largest joint lean is above 0.04. There is no published threshold: this one lies between 12 clean
Fashion-MNIST models (at most 0.03) and 9 marked ones (at least 0.06) of one kind, so judge by the AUC.

**Pitfalls.** It tells the key's classes, not its way of combining. Models trained on few images, or on images they saw in training, are so
sure that nothing leans. Class labels alone (a model stolen through them) show less. Classes of unequal frequency lean to the frequent one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import ModelDetector, without_training
from meadef_lightning.detection.mixture_scan import MixtureFinding


def leans(probabilities: Tensor, y: Tensor) -> Tensor:
    """How much more images of one class lean to another than the other way round.

    Args:
        probabilities: Answers to natural images, ``(N, K)``.
        y: Their classes, int64 ``(N,)``; each class at least once.

    Returns:
        float32 ``(K, K)``, antisymmetric: entry ``(a, t)`` is the mean probability that images of ``a`` give to ``t``, minus that which
        images of ``t`` give to ``a``.

    Raises:
        ValueError: If a class has no image.
    """
    members = F.one_hot(y, probabilities.shape[1]).to(probabilities.device).float()
    counts = members.sum(0)
    if not bool(counts.all()):
        missing = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"All classes are compared, but there is no image of {missing}. Give the thief more images (share)."
        )
    mean = members.T @ probabilities.float() / counts[:, None]
    return mean - mean.T


def joint_leans(lean: Tensor) -> Tensor:
    """The smaller lean of two classes to a third.

    Args:
        lean: From `leans`, ``(K, K)``.

    Returns:
        ``(K, K, K)``, symmetric in the first two; −∞ where two of the three classes are one.
    """
    same = torch.eye(len(lean), dtype=torch.bool, device=lean.device)
    impossible = same[:, :, None] | same[:, None, :] | same[None, :, :]
    return torch.minimum(lean[:, None], lean[None]).masked_fill(impossible, -torch.inf)


class AnswerLean(ModelDetector):
    """Looks for two classes whose natural images lean to a third one; see the module's documentation.

    ``Finding.score`` is the largest joint lean, a probability; ``Finding.classes`` holds that of each class in the role of the third.

    Args:
        batch_size: Images in a forward pass.
        threshold: A larger joint lean is called a watermark's.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(self, batch_size: int = 512, threshold: float = 0.04) -> None:
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1.")
        self.batch_size, self.threshold = batch_size, threshold

    @override
    def inspect(self, model: nn.Module, data: ThiefData, seed: int = 0) -> MixtureFinding:
        if data.num_classes < 3:
            raise ValueError(f"num_classes={data.num_classes}, but a third class needs at least 3.")
        device = next((p.device for p in model.parameters()), data.x.device)
        frozen = without_training(model)
        with torch.no_grad():
            answers = torch.cat(
                [frozen(part.to(device)).float().softmax(dim=-1).cpu() for part in torch.split(data.x, self.batch_size)]
            )
        pairs = joint_leans(leans(answers, data.y.cpu()))
        classes = pairs.amax(dim=(0, 1))
        flagged = tuple((classes > self.threshold).nonzero().flatten().tolist())
        return MixtureFinding(
            score=float(classes.max()),
            threshold=self.threshold,
            decision=bool(flagged),
            classes=classes,
            flagged=flagged,
            pairs=pairs,
        )
