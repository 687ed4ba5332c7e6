r"""What the data-free thefts share: a generator, gradients estimated from answers, and a data module that asks nothing.

A thief without images lets a generator make the queries. The student learns to answer them as the victim does, the generator to
find images on which the two disagree. Through the victim no gradient flows, so the generator's is estimated by forward
differences: along random directions :math:`u_i`, uniform on the unit sphere of the :math:`d` pixel values,

.. math:: \hat g = \frac{d}{m} \sum_{i=1}^{m} \frac{L(x + \epsilon u_i) - L(x)}{\epsilon} \, u_i ,

whose mean over directions is the gradient of a linear :math:`L`, since :math:`E[u u^\top] = I / d`. Here :math:`x` is what the
generator gives *before* its tanh, so every query is an image. The loop is in `datafree_student`, the attacks are `dfme` and
`maze`.

**Source.** The generator's game and its estimated gradient are those of both attacks' papers, which their pages name.

**Budget.** An iteration of :math:`g` generator and :math:`s` student steps costs :math:`B (g (m + 1) + s)` queries. All are counted,
those of the estimates too. Training ends after ``max_epochs · iterations_per_epoch`` iterations, or before the first iteration
that the ledger's budget does not cover as a whole; learning rates are scheduled over whichever of the two is shorter.

**Precision.** With ``ε = 1e-3`` a pixel changes by about ``ε / √d``: less than half precision, bfloat16 and TF32 can tell apart.
Estimates therefore run in float32 whatever the Trainer's precision, with TF32 switched off.

**Repeatable.** An iteration draws from a random state of its own, seeded by ``(seed, iteration)``. A run that goes on from a full
checkpoint asks the same again and is answered from the ledger. Without its own file, the ledger keeps all answers in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.loading import ResumableLoader
from meadef_lightning.extraction.base import ExtractionDataModule, TransferSet
from meadef_lightning.oracle import BlackBox, BudgetExceededError, row_digests


def unit_directions(count: int, x: Tensor) -> Tensor:
    """Directions ``(count, B, …)`` for points ``x (B, …)``, each uniform on the unit sphere; draws from the global generator."""
    normal = torch.randn((count, *x.shape), dtype=x.dtype, device=x.device)
    return F.normalize(normal.flatten(2), dim=2).view_as(normal)


def forward_differences(values: Tensor, directions: Tensor, epsilon: float) -> Tensor:
    """The estimate of the gradient above, for each point of a batch.

    Args:
        values: ``(m + 1, B)``: the function at the points, and at the points moved by ``epsilon`` along each direction.
        directions: ``(m, B, …)`` unit vectors.
        epsilon: Length of the move.

    Returns:
        ``(B, …)``.
    """
    m, _, *shape = directions.shape
    slopes = (values[1:] - values[0]) / epsilon
    return math.prod(shape) / m * torch.einsum("mb,mb...->b...", slopes, directions)


def _float32_switches() -> list[tuple[Any, str, Any]]:
    """What decides the precision of float32 products: owner, attribute, and its value for full precision."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # PyTorch 2.9 and later, where the switches below must not be read any more
        owners = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.matmul)
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(owner, "allow_tf32", False) for owner in (backends.cudnn, backends.cuda.matmul)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 that is float32: no autocast on the device, and no TF32, which is PyTorch's default in convolutions on GPUs."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _float32_switches()]
    try:
        for switch in _float32_switches():
            setattr(*switch)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch in before:
            setattr(*switch)


class ImageGenerator(nn.Module):
    """Three convolutions between upsamplings, with batch normalisation and ReLU (DFME, §4).

    Upsampling repeats pixels, where the paper interpolates linearly: the backward pass of that is not deterministic on GPUs.
    Batch normalisation always uses the batch at hand.

    Args:
        image_shape: Channels, height and width.
        low: Black in the victim's input space, ``(C, 1, 1)``.
        high: White in the victim's input space, ``(C, 1, 1)``.
        latent: Length of a latent vector.
        width: Channels of the last hidden layer.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], low: Tensor, high: Tensor, latent: int = 256, width: int = 64
    ) -> None:
        super().__init__()
        channels, *size = image_shape
        half, quarter = (tuple(math.ceil(side / part) for side in size) for part in (2, 4))

        def norm(features: int) -> nn.Module:
            return nn.BatchNorm2d(features, track_running_stats=False)

        self.latent = latent
        self.layers = nn.Sequential(
            nn.Linear(latent, 2 * width * math.prod(quarter)),
            nn.Unflatten(1, (2 * width, *quarter)),
            norm(2 * width),
            nn.Upsample(half),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            norm(2 * width),
            nn.ReLU(),
            nn.Upsample(tuple(size)),
            nn.Conv2d(2 * width, width, 3, padding=1),
            norm(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    @override
    def forward(self, z: Tensor) -> Tensor:
        """Latent vectors ``(B, latent)`` to what becomes images in `images`, ``(B, C, H, W)``, unbounded."""
        return cast("Tensor", self.layers(z))

    def images(self, x: Tensor) -> Tensor:
        """Brings ``(…, C, H, W)`` into the range of pixels, along a tanh."""
        low, high = cast("tuple[Tensor, Tensor]", (self.low, self.high))
        return torch.clamp(low + (high - low) * (x.tanh() + 1) / 2, low, high)


class DataFreeDataModule(ExtractionDataModule):
    """A theft without data: nothing is asked in advance, and the student asks while it trains.

    Training batches are the numbers of the iterations; there is no validation. Tests run on the data's test split.

    Args:
        oracle: The victim's only door; soft, top-k or rounded answers.
        data: The victim's data splits, which tell number of classes, image shape and pixel range, and test the student.
        batch_size: Images that the generator makes at once.
        iterations_per_epoch: Iterations that are called an epoch.
        seed: Seed of everything that is drawn.

    Raises:
        ValueError: If a number is out of range.
        MisconfigurationException: In `setup`, if the answers or the Trainer do not fit; see `_refusal`.
    """

    one_process = True

    def __init__(
        self,
        oracle: BlackBox,
        data: SplitDataModule,
        batch_size: int = 256,
        iterations_per_epoch: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(oracle, data, batch_size, validation_fraction=0.0, seed=seed)
        if iterations_per_epoch < 1:
            raise ValueError(f"iterations_per_epoch must be at least 1, got {iterations_per_epoch}.")
        self.iterations_per_epoch = iterations_per_epoch

    @property
    @override
    def queries_spent(self) -> int:
        """Distinct inputs that the ledger has paid for so far."""
        return self.oracle.ledger.distinct

    @override
    def collect(self) -> TransferSet:
        """There is no transfer set."""
        raise RuntimeError(f"{type(self).__name__} collects nothing: its student asks while it trains.")

    @override
    def setup(self, stage: str | None = None) -> None:
        """Prepares the data, and refuses what the attack cannot do before anything is asked."""
        self.data.setup(stage)
        if stage not in ("test", "predict") and (reason := self._refusal()):
            raise MisconfigurationException(reason)

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Numbers of the iterations of an epoch."""
        steps = cast("Any", range(self.iterations_per_epoch))
        return self.resumable_loader(steps, batch_size=None, generator=torch.Generator())

    @override
    def val_dataloader(self) -> list[Any]:
        """None: the thief has no images."""
        return []

    @override
    def query_summary(self) -> dict[str, Any]:
        """What was asked; see `ExtractionDataModule.query_summary`."""
        distinct, calls = self.oracle.ledger.totals()
        return {**super().query_summary(), "queries": calls, "distinct": distinct}

    def affordable(self, x: Tensor, cost: int) -> bool:
        """Whether an iteration that begins by asking ``x`` and costs ``cost`` queries can be paid for to its end.

        What an interrupted run paid for does not count again: an iteration that it began was affordable then.
        """
        ledger = self.oracle.ledger
        if ledger.remaining is None or ledger.remaining >= cost:
            return True
        try:
            new = ledger.check(row_digests(x))
        except BudgetExceededError as error:
            new = error.asked
        return new == 0 or ledger.remaining >= cost - (len(x) - new)

    def _refusal(self) -> str | None:
        if self.oracle.labels not in ("soft", "topk"):
            return (
                f"A data-free theft by estimated gradients needs probabilities, but the oracle gives {self.oracle.labels} answers. A "
                "class does not change when an image changes by a thousandth, so every difference would tell of the student alone. "
                "Give the attack a policy with probabilities, or steal from classes with images (DistillationDataModule with a pool)."
            )
        trainer = self.trainer
        if trainer is None:
            return None
        if not hasattr(trainer.lightning_module, "queries_per_iteration"):
            name = type(trainer.lightning_module).__name__
            return f"{type(self).__name__} has no data to train a {name} on. Use DFMEStudent or MAZEStudent, which make their own."
        if trainer.world_size > 1:
            return f"Data-free thefts train in one process, got {trainer.world_size}: every process would ask the same. Set devices=1."
        if str(trainer.precision) in ("16-true", "bf16-true"):
            return f"precision={trainer.precision!r} cannot hold the differences between queries. Use 32-true, 16-mixed or bf16-mixed."
        if trainer.max_epochs == -1 or (trainer.max_steps != -1 and not trainer.fast_dev_run):  # type: ignore[attr-defined]
            return (
                f"A data-free theft is as long as max_epochs · iterations_per_epoch, got max_epochs={trainer.max_epochs} and "
                f"max_steps={trainer.max_steps}. Set max_epochs, and leave max_steps: it would count every step of either optimiser."
            )
        return None
