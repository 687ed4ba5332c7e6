"""Random shifts and mirror images, another for each image of a batch, in one indexing operation.

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
