"""What the image classifiers here are made of: stacks of convolutions, fully connected layers, and the form that joins them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 8
"""Smallest height and width that every network accepts."""


def check_images(x: Tensor, in_channels: int) -> None:
    """Refuses what is not a batch of images for a network.

    Args:
        x: the input.
        in_channels: number of channels that the network was built for.

    Raises:
        ValueError: the shape is not (B, in_channels, H, W) with H and W at least 8.
    """
    wanted = f"a batch of images (B, {in_channels}, H, W) with H and W of {SMALLEST} or more"
    if x.ndim != 4:
        hint = " Add the batch dimension with x.unsqueeze(0)." if x.ndim == 3 else ""
        raise ValueError(f"Expected {wanted}, got shape {tuple(x.shape)}.{hint}")
    if x.shape[1] != in_channels:
        raise ValueError(
            f"Expected {wanted}, got shape {tuple(x.shape)}. Build the network with in_channels={x.shape[1]}."
        )
    if min(x.shape[2:]) < SMALLEST:
        raise ValueError(f"Expected {wanted}, got shape {tuple(x.shape)}. Enlarge the images (image_size).")


class ConvClassifier(nn.Module):
    """Convolutions, pooling to a fixed grid, and fully connected layers: the form of all plain networks here.

    Args:
        features: from images to feature maps.
        classifier: from flattened feature maps to logits.
        in_channels: channels of the images.
        grid: height and width to which the feature maps are pooled, so that images of any size fit the classifier.
        smallest: smaller images are padded to this height and width, evenly on all sides, with 0: the mean.
    """

    def __init__(
        self, features: nn.Module, classifier: nn.Module, in_channels: int, grid: int, smallest: int = SMALLEST
    ) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = classifier
        self.in_channels = in_channels
        self.smallest = smallest
        for module in self.modules():
            # PyTorch's default shrinks the signal from layer to layer; deep networks without BatchNorm do not learn.
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Channels last: a training step takes 0.7 of the time on a CPU, and less with mixed precision on a GPU, too.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images.

        Args:
            x: images (B, in_channels, H, W), H and W at least 8.

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError: the input has another shape.
        """
        check_images(x, self.in_channels)
        height, width = (max(0, self.smallest - size) for size in x.shape[2:])
        if height or width:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def conv_stack(
    in_channels: int, plan: Sequence[int | str], kernel: int = 3, padding: int = 1, batch_norm: bool = False
) -> nn.Sequential:
    """Builds convolutions, each followed by ReLU, with max-pooling in between.

    Args:
        in_channels: channels of the input.
        plan: output channels of each convolution, and ``"pool"`` for halving height and width (rounding up).
        kernel: size of the kernels.
        padding: zeros around the input of each convolution.
        batch_norm: whether to normalise before each ReLU.

    Returns:
        The layers.
    """
    layers: list[nn.Module] = []
    for step in plan:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # rounding up: a single pixel stays one
            continue
        layers.append(nn.Conv2d(in_channels, step, kernel, padding=padding, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(step))
        layers.append(nn.ReLU(inplace=True))
        in_channels = step
    return nn.Sequential(*layers)


def fully_connected(sizes: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Builds linear layers with ReLU between them.

    Args:
        sizes: size of the input, of each hidden layer, and of the output.
        dropout: probability with which inputs of the first layer are dropped in training.

    Returns:
        The layers.
    """
    layers: list[nn.Module] = [nn.Dropout(dropout)]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])
