"""Image classifiers: the paper's networks, and other architectures for thieves.

All take ``(num_classes, in_channels)`` first, accept any height and width from 8 pixels, and return logits
(B, num_classes). The input of the last linear layer is a network's feature vector: see ``penultimate``. What they are made of is in
`meadef_lightning.victims.layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from meadef_lightning.last_linear import last_linear_run
from meadef_lightning.victims.layers import ConvClassifier, check_images, conv_stack, fully_connected


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
    last = last_linear_run(network, network, x)
    if last is None:
        raise ValueError(
            f"{type(network).__name__} ran no nn.Linear, so it has no penultimate features. Let it end in an "
            "nn.Linear, or pass the part of it that returns the features."
        )
    return last[1]


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
