"""Image classifiers: the paper's networks, and other architectures for thieves.

All take ``(num_classes, in_channels)`` first, accept any height and width from 8 pixels, and return logits
(B, num_classes). The input of the last linear layer is a network's feature vector: see ``penultimate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

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


def penultimate(network: nn.Module, x: Tensor) -> Tensor:
    """Returns a network's features: the input of its last linear layer, for whatever network.

    Gradients flow through the features. The network's mode (training or evaluation) is left as it is.

    Args:
        network: any module with at least one ``nn.Linear``; of several, the one that runs last counts.
        x: the network's input.

    Returns:
        Features, (B, D) for a network that ends in one linear layer on a vector.

    Raises:
        ValueError: no ``nn.Linear`` ran.
    """
    captured: list[Tensor] = []

    def keep_last(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        captured[:] = [arguments[0]]

    handles = [
        module.register_forward_pre_hook(keep_last) for module in network.modules() if isinstance(module, nn.Linear)
    ]
    try:
        network(x)
    finally:
        for handle in handles:
            handle.remove()
    if not captured:
        raise ValueError(
            f"{type(network).__name__} ran no nn.Linear, so it has no penultimate features. Let it end in an "
            "nn.Linear, or pass the part of it that returns the features."
        )
    return captured[0]


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


class VGGLike(ConvClassifier):
    """The paper's network for CIFAR-10: conv 64-64-pool-128-128-pool, fully connected 256-256-C, dropout 0.5.

    As in the public reference code, convolutions do not pad and feature maps are pooled to 5×5 (which 32×32 images
    have anyway). The network is that of Carlini & Wagner (2017).

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        dropout: probability of dropping an input of the first fully connected layer.
        batch_norm: whether to normalise before each ReLU; the paper's network does not.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, dropout: float = 0.5, batch_norm: bool = False) -> None:
        plan: list[int | str] = [64, 64, "pool", 128, 128, "pool"]
        super().__init__(
            conv_stack(in_channels, plan, padding=0, batch_norm=batch_norm),
            fully_connected([128 * 5 * 5, 256, 256, num_classes], dropout),
            in_channels,
            grid=5,
            smallest=16,  # below, nothing would be left after the second pair of convolutions
        )


class NineLayerCNN(ConvClassifier):
    """The paper's network for Fashion-MNIST and CIFAR-100: nine layers with weights.

    The paper gives no more than their number. Ours continue the VGG-like network by one stage:
    conv 64-64-pool-128-128-pool-256-256-pool, fully connected 256-256-C.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        dropout: probability of dropping an input of the first fully connected layer.
        batch_norm: whether to normalise before each ReLU.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, dropout: float = 0.5, batch_norm: bool = False) -> None:
        plan: list[int | str] = [64, 64, "pool", 128, 128, "pool", 256, 256, "pool"]
        super().__init__(
            conv_stack(in_channels, plan, batch_norm=batch_norm),
            fully_connected([256 * 4 * 4, 256, 256, num_classes], dropout),
            in_channels,
            grid=4,
        )


class SmallAlexNet(ConvClassifier):
    """AlexNet for small images: its five convolutions and three fully connected layers, without strides.

    Channels 64-192-384-256-256 as in "One weird trick" (Krizhevsky 2014); the first two kernels are 5×5, with pooling
    after the first, second and last convolution.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        hidden: size of the two hidden fully connected layers (4096 in the original, for images of 224×224).
        dropout: probability of dropping an input of the first fully connected layer.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, hidden: int = 1024, dropout: float = 0.5) -> None:
        super().__init__(
            nn.Sequential(
                *conv_stack(in_channels, [64, "pool", 192, "pool"], kernel=5, padding=2),
                *conv_stack(192, [384, 256, 256, "pool"]),
            ),
            fully_connected([256 * 4 * 4, hidden, hidden, num_classes], dropout),
            in_channels,
            grid=4,
        )


class VGGFace(ConvClassifier):
    """The network of "Deep Face Recognition" (Parkhi et al. 2015) for YouTube Faces: VGG-16.

    Args:
        num_classes: number of persons.
        in_channels: channels of the images.
        width: channels of the first stage; the stages have 1, 2, 4, 8 and 8 times as many. The original has 64.
        hidden: size of the two hidden fully connected layers; the original has 4096.
        grid: height and width of the last feature maps: the images' divided by 32. The original has 7 (224×224).
        dropout: probability of dropping an input of the first fully connected layer.
        batch_norm: whether to normalise before each ReLU; the original does not.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        hidden: int = 4096,
        grid: int = 2,
        dropout: float = 0.5,
        batch_norm: bool = False,
    ) -> None:
        stages = [(2, 1), (2, 2), (3, 4), (3, 8), (3, 8)]
        plan: list[int | str] = []
        for convolutions, factor in stages:
            plan += [width * factor] * convolutions + ["pool"]
        super().__init__(
            conv_stack(in_channels, plan, batch_norm=batch_norm),
            fully_connected([width * 8 * grid * grid, hidden, hidden, num_classes], dropout),
            in_channels,
            grid=grid,
        )


class DigitsCNN(ConvClassifier):
    """A small network for small grey images: about 40,000 parameters, milliseconds a batch on one core.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        width: channels of the first convolution; the others have 2 and 4 times as many.
        hidden: size of the feature vector.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 16, hidden: int = 64) -> None:
        super().__init__(
            conv_stack(in_channels, [width, "pool", width * 2, "pool", width * 4], batch_norm=True),
            fully_connected([width * 4 * 2 * 2, hidden, num_classes]),
            in_channels,
            grid=2,
        )


class MLP(ConvClassifier):
    """Fully connected layers on the pixels: an architecture as unlike a convolutional one as can be.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        hidden: sizes of the hidden layers.
        grid: height and width to which images are averaged first; 16 leaves the digits as they are.
        dropout: probability of dropping a pixel in training.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        hidden: Sequence[int] = (256, 128),
        grid: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            nn.Identity(),
            fully_connected([in_channels * grid * grid, *hidden, num_classes], dropout),
            in_channels,
            grid=grid,
        )


class SmallResNet(nn.Module):
    """A ResNet of torchvision with a stem for small images: 3×3 convolution, stride 1, no max-pooling.

    Args:
        network: the ResNet.
        in_channels: channels of the images.
    """

    def __init__(self, network: Any, in_channels: int) -> None:
        super().__init__()
        network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
        self.network = network
        self.in_channels = in_channels

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
        logits: Tensor = self.network(x)
        return logits


class SmallResNet18(SmallResNet):
    """ResNet-18 (He et al. 2016) for small images.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        from torchvision.models import resnet18

        super().__init__(resnet18(num_classes=num_classes), in_channels)


class SmallResNet50(SmallResNet):
    """ResNet-50 (He et al. 2016) for small images.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        from torchvision.models import resnet50

        super().__init__(resnet50(num_classes=num_classes), in_channels)
