"""Random shifts, mirror images and squares of noise, another for each image of a batch, in one operation.

The transforms of torchvision draw one set of parameters per call, so on a batch they shift every image alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override


def shift_flip(x: Tensor, dy: Tensor, dx: Tensor, mirror: Tensor) -> Tensor:
    """Shifts each image by its own number of pixels, then mirrors the chosen ones left to right.

    Uncovered pixels become 0, in normalised images the mean of the data.

    Args:
        x: images (B, C, H, W), any type and device.
        dy: downward shift of each image, int64 (B,); negative for upward.
        dx: shift to the right of each image, int64 (B,); negative for left.
        mirror: which images to mirror, bool (B,).

    Returns:
        Images of the same shape and type.
    """
    batch, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device) - dy[:, None]  # (B, H): the source row of each target row
    target = torch.arange(width, device=x.device).expand(batch, width)
    cols = torch.where(mirror[:, None], width - 1 - target, target) - dx[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None, :]
    index = source.view(batch, 1, height * width).expand(batch, channels, height * width)
    moved = x.reshape(batch, channels, height * width).gather(2, index).view_as(x)
    return torch.where(inside[:, None], moved, torch.zeros((), dtype=x.dtype, device=x.device))


class RandomShiftFlip(nn.Module):
    """Shifts every image of a batch at random and mirrors every second one on average.

    With ``shift=4`` this is the usual "pad by 4 and crop at random, flip at random" of CIFAR training. Randomness
    comes from torch's global generator of the images' device, as dropout's does; ``eval()`` switches it off.

    Args:
        shift: largest shift in pixels, in each direction, 0 or more.
        flip: whether to mirror images left to right with probability one half. Not for digits or traffic signs.

    Raises:
        ValueError: ``shift`` is negative.
    """

    def __init__(self, shift: int = 2, flip: bool = False) -> None:
        super().__init__()
        if shift < 0:
            raise ValueError(f"shift must be 0 or more pixels, got {shift}.")
        self.shift = shift
        self.flip = flip

    @override
    def extra_repr(self) -> str:
        return f"shift={self.shift}, flip={self.flip}"

    def forward(self, x: Tensor) -> Tensor:
        """Augments a batch.

        Args:
            x: images (B, C, H, W).

        Returns:
            Images of the same shape and type.
        """
        if not self.training:
            return x
        dy, dx = torch.randint(-self.shift, self.shift + 1, (2, len(x)), device=x.device)
        mirror = torch.rand(len(x), device=x.device) < (0.5 if self.flip else 0.0)
        return shift_flip(x, dy, dx, mirror)


def noise_squares(x: Tensor, top: Tensor, left: Tensor, size: int, noise: Tensor) -> Tensor:
    """Replaces a square of each image by noise.

    Args:
        x: images (B, C, H, W).
        top: first row of each square, int64 (B,).
        left: first column of each square, int64 (B,).
        size: height and width of the squares.
        noise: what is put there, of the shape of ``x``.

    Returns:
        Images of the same shape and type.
    """
    rows = torch.arange(x.shape[2], device=x.device) - top[:, None]
    cols = torch.arange(x.shape[3], device=x.device) - left[:, None]
    inside = ((rows >= 0) & (rows < size))[:, None, :, None] & ((cols >= 0) & (cols < size))[:, None, None, :]
    return torch.where(inside, noise, x)


class RandomNoiseSquare(nn.Module):
    """Covers a square at a random place of every image with uniform noise (Cutout, DeVries & Taylor 2017, with noise for grey).

    A network trained with it does not change its mind over a few pixels, as small ones on small images do otherwise: then any patch
    works as a universal trigger, and searches for planted ones see nothing but these. The noise is uniform between the smallest and the
    largest value of the batch. Randomness and ``eval()`` are as in :class:`RandomShiftFlip`.

    Args:
        size: height and width of the square in pixels.

    Raises:
        ValueError: ``size`` is below 1, or (in ``forward``) larger than the images.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}.")
        self.size = size

    @override
    def extra_repr(self) -> str:
        return f"size={self.size}"

    def forward(self, x: Tensor) -> Tensor:
        """Augments a batch (B, C, H, W)."""
        if not self.training:
            return x
        height, width = x.shape[2:]
        if self.size > min(height, width):
            raise ValueError(f"size={self.size} is larger than the images, {height}x{width}.")
        top = torch.randint(height - self.size + 1, (len(x),), device=x.device)
        left = torch.randint(width - self.size + 1, (len(x),), device=x.device)
        low, high = x.aminmax()
        return noise_squares(x, top, left, self.size, low + (high - low) * torch.rand_like(x))


class Chain(nn.Sequential):
    """Augmentations one after the other, as a list that a YAML file can give.

    Args:
        steps: the augmentations, in order.
    """

    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__(*steps)
