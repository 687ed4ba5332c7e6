"""What can be done to images before a model sees them: noise, codecs, smoothing, fewer bits.

Each is a function on pixels in [0, 1] first, and a module of one number, its strength, second: 0 leaves images as they are and larger is
stronger. What they are used for, their sources, cost and pitfalls: see ``meadef_lightning.removal.preprocessing``.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

Kernel = Literal["box", "gaussian", "median"]

PATTERNS = 128
"""Noise patterns that a seed draws; an image's content says which of them it gets."""


def add_gaussian_noise(pixels: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Adds Gaussian noise that depends on the image and the seed only.

    The seed draws a bank of `PATTERNS` patterns; a checksum of an image's 8-bit pixels picks one. Thus equal images get equal noise
    whatever else is in the batch, on every device, and without a loop over images.

    Args:
        pixels: ``(B, C, H, W)`` in [0, 1].
        sigma: Standard deviation.
        seed: Seed of the patterns.

    Returns:
        The same shape and dtype, clipped to [0, 1].
    """
    shape = pixels.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(PATTERNS, *shape, generator=generator).to(pixels)
    weights = torch.randint(2**31, shape, generator=generator).to(pixels.device)
    checksums = ((pixels * 255).round().long() * weights).flatten(1).sum(dim=1)
    return (pixels + sigma * bank[checksums % PATTERNS]).clamp(0, 1)


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Compresses images as JPEG and decompresses them.

    Args:
        pixels: ``(B, C, H, W)`` in [0, 1], with 1 or 3 channels.
        quality: 1 to 100.

    Returns:
        The same shape, dtype and device, in steps of 1/255.

    Raises:
        ValueError: If there are other than 1 or 3 channels.
    """
    return _through_files(pixels, "JPEG", quality)


def webp(pixels: Tensor, quality: int) -> Tensor:
    """Compresses images as lossy WEBP and decompresses them.

    Args:
        pixels: ``(B, C, H, W)`` in [0, 1], with 1 or 3 channels.
        quality: 0 to 100.

    Returns:
        The same shape, dtype and device, in steps of 1/255.

    Raises:
        ValueError: If there are other than 1 or 3 channels.
    """
    return _through_files(pixels, "WEBP", quality)


def _through_files(pixels: Tensor, form: str, quality: int) -> Tensor:
    """Writes and reads images with Pillow, one by one, since no codec takes a batch."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(
            f"{form} takes images (B, C, H, W) with 1 or 3 channels, got shape {tuple(pixels.shape)}. Use Smoothing, BitDepth or GaussianNoise."
        )
    images = []
    for image in (pixels * 255).round().to(torch.uint8).cpu():
        original, file = to_pil_image(image), io.BytesIO()
        original.save(file, form, quality=quality)
        images.append(pil_to_tensor(Image.open(file).convert(original.mode)))
    return torch.stack(images).to(pixels.device, pixels.dtype) / 255


def smooth(pixels: Tensor, radius: int, kind: Kernel = "median") -> Tensor:
    """Replaces every pixel by a mean or the median of those around it.

    Args:
        pixels: ``(B, C, H, W)``.
        radius: The window has ``2 · radius + 1`` pixels each way; beyond the border the image is continued by its outermost pixels
            (for ``"gaussian"`` mirrored).
        kind: ``"box"``: plain mean; ``"gaussian"``: weighted, with torchvision's deviation for this window, ``0.3 · radius + 0.5``;
            ``"median"``.

    Returns:
        The same shape, dtype and range.

    Raises:
        ValueError: If ``kind`` is unknown, or the radius is as large as the image.
    """
    if not 0 <= radius < min(pixels.shape[2:]):
        raise ValueError(f"radius={radius} must be 0 or more and below height and width, {tuple(pixels.shape[2:])}.")
    width = 2 * radius + 1
    if kind == "gaussian":
        from torchvision.transforms.v2.functional import gaussian_blur

        blurred: Tensor = gaussian_blur(pixels, [width, width])
        return blurred
    padded = F.pad(pixels, (radius,) * 4, mode="replicate")
    if kind == "box":
        averaged: Tensor = F.avg_pool2d(padded, width, stride=1)
        return averaged
    if kind == "median":
        middle: Tensor = padded.unfold(2, width, 1).unfold(3, width, 1).flatten(4).median(dim=4).values
        return middle
    raise ValueError(f'kind="{kind}" must be "box", "gaussian" or "median".')


def reduce_bits(pixels: Tensor, bits: int) -> Tensor:
    """Rounds pixels to ``2^bits`` levels from 0 to 1, both included.

    Args:
        pixels: Any shape, in [0, 1].
        bits: 1 or more.
    """
    levels: int = 2**bits - 1
    return (pixels * levels).round() / levels


class InputTransform(nn.Module, ABC):
    """What is done to images before a model sees them.

    Args:
        strength: How much of it; 0 leaves images as they are.

    Attributes:
        unit: What the strength counts.
        seed: Seed of everything random.
    """

    unit: str = "strength"

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = float(strength)
        self.seed = 0

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """Transforms images.

        Args:
            pixels: ``(B, C, H, W)`` in [0, 1].

        Returns:
            The same shape, dtype, device and range.
        """


def _whole(name: str, value: float, low: int, high: int) -> float:
    if value != int(value) or not low <= value <= high:
        raise ValueError(f"{name}={value} must be a whole number from {low} to {high}.")
    return value


class GaussianNoise(InputTransform):
    """Noise, see `add_gaussian_noise`. Try 0.01 (an imperceptible one), 0.02, 0.05, 0.1, 0.2, 0.3.

    Args:
        sigma: Standard deviation, of pixels from 0 to 1.

    Raises:
        ValueError: If it is negative.
    """

    unit = "standard deviation of the noise, pixels from 0 to 1"

    def __init__(self, sigma: float) -> None:
        if sigma < 0:
            raise ValueError(f"sigma={sigma} is a standard deviation and must be 0 or more.")
        super().__init__(sigma)

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        """Adds the noise."""
        return add_gaussian_noise(pixels, self.strength, self.seed)


class JPEG(InputTransform):
    """JPEG, see `jpeg`. Try 10, 25, 50, 75, 90.

    Args:
        loss: 100 minus the quality, 0 to 99.

    Raises:
        ValueError: If it is out of range.
    """

    unit = "100 minus JPEG quality"

    def __init__(self, loss: float) -> None:
        super().__init__(_whole("loss", loss, 0, 99))

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        """Compresses and decompresses."""
        return jpeg(pixels, 100 - int(self.strength))


class WEBP(InputTransform):
    """WEBP, see `webp`. Try 10, 25, 50, 75, 90.

    Args:
        loss: 100 minus the quality, 0 to 100.

    Raises:
        ValueError: If it is out of range.
    """

    unit = "100 minus WEBP quality"

    def __init__(self, loss: float) -> None:
        super().__init__(_whole("loss", loss, 0, 100))

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        """Compresses and decompresses."""
        return webp(pixels, 100 - int(self.strength))


class Smoothing(InputTransform):
    """Smoothing, see `smooth`. Try 1, 2, 3: windows of 3, 5 and 7 pixels.

    Args:
        radius: Pixels on each side.
        kind: ``"box"``, ``"gaussian"`` or ``"median"``.

    Raises:
        ValueError: If one is out of range.
    """

    unit = "radius of the smoothing window in pixels"

    def __init__(self, radius: float, kind: Kernel = "median") -> None:
        super().__init__(_whole("radius", radius, 0, 1000))
        if kind not in ("box", "gaussian", "median"):
            raise ValueError(f'kind="{kind}" must be "box", "gaussian" or "median".')
        self.kind: Kernel = kind

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        """Smooths."""
        return smooth(pixels, int(self.strength), self.kind)


class BitDepth(InputTransform):
    """Fewer bits for a pixel, see `reduce_bits`. Try 3 to 7.

    Args:
        dropped: Bits of 8 that are dropped, 0 to 7.

    Raises:
        ValueError: If it is out of range.
    """

    unit = "bits dropped of 8"

    def __init__(self, dropped: float) -> None:
        super().__init__(_whole("dropped", dropped, 0, 7))

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        """Rounds."""
        return reduce_bits(pixels, 8 - int(self.strength))
