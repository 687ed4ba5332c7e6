"""Images as somebody else's model wants them: other normalisation, size, or order of the channels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

_LUMA: Final = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), as image libraries take them."""


@dataclass(frozen=True)
class InputSpace:
    """What a model takes, declared. Images start as pixels in [0, 1] and go through the steps in the order of the arguments.

    Args:
        channels: Make them ``"grey"`` (one channel), ``"rgb"`` or ``"bgr"`` (three). By default they stay as they are.
        size: Resize them to this height and width (bilinear, antialiased).
        scale: What white is, e.g. 255 for models that take pixels as they lie in files.
        mean: Subtract this from each channel, after scaling; one value for each, or one for all.
        std: Divide each channel by this, likewise.
        channels_last: Give ``(B, H, W, C)`` instead of ``(B, C, H, W)``.

    Raises:
        ValueError: If a value is out of range.
    """

    channels: Literal["grey", "rgb", "bgr"] | None = None
    size: tuple[int, int] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (None, "grey", "rgb", "bgr"):
            raise ValueError(f"channels must be grey, rgb or bgr, got {self.channels!r}.")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be a height and a width of at least 1, got {self.size}.")
        values = [self.scale, *self.mean, *self.std]
        if not all(-float("inf") < value < float("inf") for value in values) or self.scale <= 0:
            raise ValueError(
                f"scale must be positive, and mean and std finite, got {self.scale}, {self.mean} and {self.std}."
            )
        if not self.mean or not self.std or min(self.std) <= 0:
            raise ValueError(
                f"mean and std need one value, or one a channel, and std must be positive, got {self.mean} and {self.std}."
            )

    @property
    def normalises(self) -> bool:
        """Whether values are shifted or scaled, or the channels are put last: then the result is no picture any more."""
        return (self.scale, set(self.mean), set(self.std), self.channels_last) != (1.0, {0.0}, {1.0}, False)


class ToInputSpace(nn.Module):
    """Takes images in a data module's normalised space and gives them in a model's own.

    Its state tells the data's normalisation and what was declared, so that a fingerprint of a model behind it covers both.

    Args:
        space: What the model takes.
        mean: Mean of each channel of the data, as in its normalisation.
        std: Standard deviation of each channel, likewise.
    """

    mean: Tensor
    std: Tensor
    declared: Tensor

    def __init__(self, space: InputSpace, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.space = space
        digest = hashlib.sha256(json.dumps(asdict(space), sort_keys=True).encode()).digest()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])
        self.register_buffer("declared", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Converts a batch.

        Args:
            x: ``(B, C, H, W)`` floating point, in the data's normalised space.

        Returns:
            ``(B, C', H', W')``, or ``(B, H', W', C')`` with ``channels_last``, of the same dtype; gradients pass through.

        Raises:
            ValueError: If the number of channels does not fit what was declared.
        """
        space = self.space
        pixels = _recoloured(x * self.std.to(x) + self.mean.to(x), space.channels)
        if space.size is not None and tuple(pixels.shape[2:]) != tuple(space.size):
            pixels = F.interpolate(pixels, size=space.size, mode="bilinear", antialias=True)
        for name, values in (("mean", space.mean), ("std", space.std)):
            if len(values) not in (1, pixels.shape[1]):
                raise ValueError(
                    f"The declared {name} has {len(values)} values, but images have {pixels.shape[1]} channels."
                )
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (space.mean, space.std))
        images = (pixels * space.scale - mean) / std
        return images.permute(0, 2, 3, 1) if space.channels_last else images


def _recoloured(pixels: Tensor, channels: str | None) -> Tensor:
    """Pixels with the declared channels."""
    count = pixels.shape[1]
    if channels is None:
        return pixels
    if count not in (1, 3):
        raise ValueError(
            f"Images with {count} channels cannot be made {channels}; only those with 1 or 3 can. Leave channels out."
        )
    if channels == "grey":
        return pixels if count == 1 else (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    coloured = pixels.expand(-1, 3, -1, -1)
    return coloured.flip(1) if channels == "bgr" else coloured
