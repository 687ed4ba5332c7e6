"""Two random views of every image of a batch, for self-supervised training on small images.

**Source.** SimCLR (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, §3 and App. A):
crop and resize, mirror, distort colours, drop colours, blur.

**Algorithm**, each image with its own random numbers: (1) a box of random area and aspect, shifted, perhaps rotated and
mirrored, is resampled to the image's size, one bilinear ``grid_sample`` for the batch; (2) colours are changed by one 3×3
matrix per image (hue, saturation, greyscale); (3) contrast and brightness by one factor and one offset; (4) blur by two
Gaussian band matrices; (5) Gaussian noise.

**Cost.** A few milliseconds for 256 images of 16×16 on one core; no Python loop over images. Transforms of torchvision draw one set of
parameters per call, so on a batch they crop every image alike.

**Defaults** suit grey digits and Fashion-MNIST: no colours, no mirror. For CIFAR-10 give ``flip=True, scale=[0.2, 1.0], brightness=0.8,
contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0``; for Fashion-MNIST add ``flip=True``. Blur is off in SimCLR's own CIFAR
experiments.

**Pitfalls.** Images come normalised: brightness is an offset in standard deviations, not a factor on pixels, and nothing is
clamped. Views that keep too much of the image teach nothing; views that keep too little make all digits alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

# the luminance of an RGB colour and two colour axes (the YIQ space), in which hue is an angle and saturation a length
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def resample(x: Tensor, size: Tensor, centre: Tensor, angle: Tensor, mirror: Tensor) -> Tensor:
    """Cuts a box out of each image and resamples it to the image's size, bilinearly; beyond the border, the border goes on.

    Args:
        x: Images ``(B, C, H, W)``.
        size: Height and width of each box as a share of the image's, ``(B, 2)``.
        centre: Row and column of each box's centre, ``(B, 2)``, from -1 to 1 over the image.
        angle: Rotation of each box in radians, ``(B,)``.
        mirror: Which images to mirror left to right, bool ``(B,)``.

    Returns:
        Images of the same shape and type.
    """
    height, width = size.unbind(1)
    width = torch.where(mirror, -width, width)
    cos, sin, aspect = angle.cos(), angle.sin(), x.shape[2] / x.shape[3]
    rows = torch.stack(
        [
            torch.stack([cos * width, -sin * height * aspect, centre[:, 1]], dim=1),
            torch.stack([sin * width / aspect, cos * height, centre[:, 0]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def colour_matrices(hue: Tensor, saturation: Tensor) -> Tensor:
    """Matrices that turn RGB colours by an angle about the grey axis and scale their saturation, luminance unchanged.

    Args:
        hue: Angles in radians, ``(B,)``.
        saturation: Factors, ``(B,)``; 0 leaves grey, 1 changes nothing.

    Returns:
        ``(B, 3, 3)`` float32.
    """
    yiq = torch.tensor(_YIQ, device=hue.device)
    turn = torch.zeros(len(hue), 3, 3, device=hue.device)
    turn[:, 0, 0] = 1.0
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 2, 1] = saturation * hue.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrices: Tensor = torch.linalg.inv(yiq) @ turn @ yiq
    return matrices


def blur_images(x: Tensor, sigma: Tensor) -> Tensor:
    """Blurs each image by its own Gaussian, whose weights are renormalised at the border.

    Args:
        x: Images ``(B, C, H, W)``.
        sigma: Standard deviations in pixels, ``(B,)``; 0 leaves an image as it is.

    Returns:
        Images of the same shape and type.
    """
    rows, columns = (
        torch.softmax(-0.5 * (distance / sigma.clamp_min(1e-3)[:, None, None]) ** 2, dim=-1).to(x.dtype)[:, None]
        for distance in (
            torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device) for n in x.shape[2:]
        )
    )
    return rows @ x @ columns.transpose(-1, -2)


class RandomView(nn.Module):
    """One random view of each image.

    Randomness comes from torch's global generator of the images' device, as dropout's does; ``eval()`` switches it off.

    Args:
        scale: Smallest and largest area of the box, as a share of the image's, within ``(0, 1]``.
        ratio: Smallest and largest aspect of the box, width by height relative to the image's.
        shift: How far a box may reach beyond the image, in shares of its size.
        rotation: Largest rotation, in degrees.
        flip: Whether to mirror images left to right with probability one half. Not for digits or traffic signs.
        brightness: Largest offset, in standard deviations of the normalised pixels.
        contrast: Largest change of the contrast, from 0 to below 1.
        saturation: Largest change of the saturation, from 0 to 1; colour images only.
        hue: Largest change of the hue, in turns of the colour circle (0.5 is all colours); colour images only.
        jitter: Probability that an image's brightness, contrast, saturation and hue change at all.
        grayscale: Probability that an image loses its colours.
        blur: Largest standard deviation of a Gaussian blur, in pixels; every second image is blurred.
        noise: Largest standard deviation of added Gaussian noise.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        scale: Sequence[float] = (0.4, 1.0),
        ratio: Sequence[float] = (0.75, 4 / 3),
        shift: float = 0.05,
        rotation: float = 10.0,
        flip: bool = False,
        brightness: float = 0.3,
        contrast: float = 0.4,
        saturation: float = 0.0,
        hue: float = 0.0,
        jitter: float = 0.8,
        grayscale: float = 0.0,
        blur: float = 0.7,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale} must be a smallest and a largest share of the area, within (0, 1].")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio={ratio} must be a smallest and a largest aspect, both positive.")
        shares = {"contrast": contrast, "saturation": saturation, "hue": hue, "jitter": jitter, "grayscale": grayscale}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1].")
        amounts = {"shift": shift, "rotation": rotation, "brightness": brightness, "blur": blur, "noise": noise}
        for name, value in amounts.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number of at least 0.")
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.shift, self.rotation, self.flip = shift, rotation, flip
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.jitter, self.grayscale, self.blur, self.noise = jitter, grayscale, blur, noise

    @override
    def extra_repr(self) -> str:
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Draws a view of each image.

        Args:
            x: Images ``(B, C, H, W)``, normalised, floating point.

        Returns:
            Images of the same shape and type; the images themselves in eval mode.

        Raises:
            ValueError: The images have another form, or colours are to be changed that they do not have.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"Views are made of floating-point images (B, C, H, W), got {x.dtype} {tuple(x.shape)}.")
        coloured = self.saturation > 0 or self.hue > 0 or self.grayscale > 0
        if coloured and x.shape[1] != 3:
            raise ValueError(
                f"saturation, hue and grayscale need images of 3 channels, got {x.shape[1]}. Set all three to 0."
            )
        if not self.training:
            return x
        count = len(x)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            # float32 by name: precision "bf16-true" changes the default type inside training_step
            return low + (high - low) * torch.rand(count, *shape, device=x.device, dtype=torch.float32)

        area = uniform(self.scale[0], self.scale[1])
        aspect = uniform(math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        size = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=1).clamp(max=1)
        centre = (1 - size + 2 * self.shift) * uniform(-1, 1, 2)
        angle = uniform(-1, 1) * math.radians(self.rotation)
        x = resample(x, size, centre, angle, uniform(0, 1) < (0.5 if self.flip else 0.0))
        changed = (uniform(0, 1) < self.jitter).float()
        if coloured:
            saturation = (1 + self.saturation * uniform(-1, 1) * changed) * (uniform(0, 1) >= self.grayscale)
            matrices = colour_matrices(2 * math.pi * self.hue * uniform(-1, 1) * changed, saturation)
            x = torch.einsum("bij,bjhw->bihw", matrices.to(x.dtype), x)
        if self.contrast > 0 or self.brightness > 0:
            factor = (1 + self.contrast * uniform(-1, 1) * changed).to(x.dtype)[:, None, None, None]
            offset = (self.brightness * uniform(-1, 1) * changed).to(x.dtype)[:, None, None, None]
            x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, factor) + offset
        if self.blur > 0:
            x = blur_images(x, self.blur * uniform(0, 1) * (uniform(0, 1) < 0.5))
        if self.noise > 0:
            x = x + torch.randn_like(x) * (self.noise * uniform(0, 1)).to(x.dtype)[:, None, None, None]
        return x


class TwoViews(nn.Module):
    """Two views of each image, drawn independently.

    Args:
        view: Draws one view of each image of a batch; :class:`RandomView` for grey images by default.
    """

    def __init__(self, view: nn.Module | None = None) -> None:
        super().__init__()
        self.view = RandomView() if view is None else view

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the views: two tensors like ``x``, ``(B, C, H, W)``."""
        # one call each: a transform that draws once per call would make both views alike
        return self.view(x), self.view(x)
