"""A classifier on top of an encoder: what an encoder is for, and what makes an encoder suspect a classifier suspect.

**Source.** Linear evaluation and fine-tuning, Chen et al., "A Simple Framework for Contrastive Learning" (SimCLR, 2020), §4 and B.8.

**Algorithm.** Either train :class:`DownstreamClassifier` as any supervised victim (``freeze=False`` fine-tunes the encoder, too); or, since a frozen
encoder answers the same in every epoch, encode all samples once (:func:`encode`) and fit the head in closed loop over the cached features
(:func:`fit_head`: multinomial logistic regression, a convex problem with one answer): :meth:`DownstreamClassifier.probe` does both.

**Cost.** The probe: one forward pass over the samples and a few hundred steps of L-BFGS on ``(N, D)``.

**Defaults.** L2 penalty 1e-3 on standardised features; the paper sweeps it for each data set.

**Pitfalls.** A frozen encoder must also be still: in training mode its BatchNorm would go on averaging over the downstream data and be another
encoder in the end. Here it stays in eval mode throughout. Gradients still reach the *inputs*, which trigger inversion needs.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import Self, override

from meadef_lightning.modes import evaluation_mode
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.supervised import SupervisedVictim
from meadef_lightning.watermark.callback import WatermarkCallback


@torch.no_grad()
def encode(encoder: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Features of samples, ``(N, D)`` where ``x`` lies: in eval mode, on the encoder's device; its flags are restored.

    Args:
        encoder: Maps ``(B, C, H, W)`` to ``(B, D)``.
        x: Samples, ``(N, C, H, W)``.
        batch_size: Samples a forward.
    """
    device = next((p.device for p in encoder.parameters()), x.device)
    with evaluation_mode(encoder):
        return torch.cat([encoder(part.to(device)).to(x.device) for part in torch.split(x, batch_size)]).flatten(1)


def fit_head(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-3, iterations: int = 200
) -> nn.Linear:
    """Fits multinomial logistic regression: the minimum of ``CE + weight_decay/2 · ‖W‖²`` on standardised features, by L-BFGS.

    Args:
        features: ``(N, D)`` floating point.
        labels: int64 ``(N,)``, in ``[0, num_classes)``.
        num_classes: Number of classes.
        weight_decay: L2 penalty of the weights, at least 0; the bias has none.
        iterations: Most L-BFGS iterations.

    Returns:
        A linear layer from features as they are (the standardisation is folded in) to logits, on their device.

    Raises:
        ValueError: If the shapes do not fit or ``weight_decay`` is negative.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"Features must be (N, D) and labels (N,) with N >= 1, got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if weight_decay < 0 or iterations < 1:
        raise ValueError(f"{weight_decay=} must be at least 0, and {iterations=} at least 1.")
    features = features.detach().float()
    mean, std = features.mean(0), features.std(0, correction=0)
    scale = torch.where(std > 1e-6, 1 / std.clamp_min(1e-6), 0.0)  # a feature that never changes gets no weight
    z = (features - mean) * scale
    with torch.enable_grad():
        weight = z.new_zeros(num_classes, z.shape[1], requires_grad=True)
        bias = z.new_zeros(num_classes, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(z @ weight.T + bias, labels) + weight_decay / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call]
    head = nn.Linear(z.shape[1], num_classes, device="meta").to_empty(device=z.device)  # draws no random numbers
    with torch.no_grad():
        head.weight.copy_(weight * scale)
        head.bias.copy_(bias - head.weight @ mean)
    return head


class EncoderClassifier(nn.Module):
    """An encoder and a linear layer.

    Args:
        encoder: Maps ``(B, C, H, W)`` to ``(B, D)`` features; used as it is, not copied.
        num_classes: Number of classes.
        feature_dim: Number of features ``D``.
        freeze: Whether the encoder stays as it is: no gradients for its weights, and eval mode whatever mode the rest is in.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, feature_dim: int, freeze: bool = True) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(not freeze)
        self.head = nn.Linear(feature_dim, num_classes)
        self.freeze = freeze
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> Self:
        """Sets the mode, of a frozen encoder always to evaluation."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, K)`` logits."""
        logits: Tensor = self.head(self.encoder(x).flatten(1))
        return logits


class DownstreamClassifier(SupervisedVictim):
    """A classifier that stands on an encoder, trained and judged as any other.

    Args:
        encoder: A trained encoder: an :class:`~meadef_lightning.victims.encoder.Encoder`, of which the network is taken, or any module
            that maps ``(B, C, H, W)`` to features. It is copied, and not changed.
        feature_dim: Number of features; by default the encoder's ``feature_dim``.
        num_classes: Number of classes. By default the data module's ``num_classes``.
        freeze: Whether only the head is trained (linear probe), or everything (fine-tuning).
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser; one cycle over the run by default.
        label_smoothing: Share of the label spread over all classes, in ``[0, 1)``.
        watermark: Callback that embeds a key; see :class:`~meadef_lightning.victims.SupervisedVictim`.

    Raises:
        MisconfigurationException: If an ``Encoder`` has no network yet.
        ValueError: If an argument is out of range.
    """

    sizes: ClassVar = {"num_classes": "num_classes", "feature_dim": "feature_dim"}
    objects: ClassVar = (*SupervisedVictim.objects, "encoder")

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int | None = None,
        num_classes: int | None = None,
        freeze: bool = True,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        watermark: WatermarkCallback | None = None,
    ) -> None:
        if isinstance(encoder, Encoder) and encoder.network is None:
            raise MisconfigurationException(
                "The encoder has no network yet: call its build_network(in_channels) and load its weights before a classifier stands on it."
            )
        body = copy.deepcopy(encoder.ready_network() if isinstance(encoder, Encoder) else encoder)
        network = partial(EncoderClassifier, body, freeze=freeze)
        super().__init__(network, num_classes, None, optimizer, lr_scheduler, label_smoothing, watermark)
        if self.hparams.get("feature_dim") is None:
            self.hparams["feature_dim"] = getattr(encoder, "feature_dim", None)

    @override
    def build_network(
        self, num_classes: int | None = None, in_channels: int | None = None, **sizes: int | None
    ) -> None:
        """Puts the head on the encoder, also outside a Trainer.

        Args:
            num_classes: Number of classes of the data, if known.
            in_channels: Ignored: the encoder is there already.
            **sizes: ``feature_dim``, if known.

        Raises:
            MisconfigurationException: If a size is not known.
        """
        self.build({"num_classes": num_classes, **sizes})

    @classmethod
    def probe(
        cls,
        encoder: nn.Module,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        weight_decay: float = 1e-3,
        batch_size: int = 512,
    ) -> Self:
        """Fits a linear probe on features that are computed once: the fast path, without a Trainer.

        Args:
            encoder: A trained encoder, see the class.
            x: Samples, ``(N, C, H, W)``.
            y: Their classes, int64 ``(N,)``.
            num_classes: Number of classes.
            weight_decay: See :func:`fit_head`.
            batch_size: Samples a forward.

        Returns:
            A classifier, on the encoder's device and in eval mode, with a frozen copy of the encoder.
        """
        features = encode(encoder, x, batch_size)
        head = fit_head(features, y.to(features.device), num_classes, weight_decay)
        with torch.random.fork_rng(devices=[]):  # the head's first weights are replaced
            classifier = cls(encoder, feature_dim=features.shape[1], num_classes=num_classes)
            classifier.build_network()
        network = classifier.ready_network()
        if isinstance(network, EncoderClassifier):
            network.head = head
        device = next((p.device for p in encoder.parameters()), x.device)
        return classifier.to(device).eval()
