"""Combining ways: how one sample of each source class becomes one watermark sample.

A combiner is an ``nn.Module`` that maps two batches ``a`` and ``b`` of shape ``(B, C, *spatial)`` to one batch of the same
shape and dtype. It works on whole batches on the inputs' device, and it is deterministic: the same parameters (and, where a
combiner draws, the same generator) give the same output, so that a judge can make the triggers again from the key alone.

The paper's four ways (MEA-Defender, S&P 2024, §IV-B) are :class:`CropPaste` (C1), :class:`PixelBlend` (C3),
:class:`Stripes` (C4) and, in its own file, :class:`~meadef_lightning.watermark.autoencoder.AutoencoderBlend` (C2). :class:`Diagonal`, :class:`Donut` and :class:`Band` widen the set of
*other* ways that the evasion loss and the false-positive rate are measured on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Combiner(nn.Module):
    """Base of all combining ways; subclasses implement :meth:`combine`.

    Call it as ``combiner(a, b, generator=None)``. None of the ways in this file draws; ``generator`` is there for ways that
    do, which must take every random number from it.
    """

    def forward(self, a: Tensor, b: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Combines ``a`` and ``b`` pairwise.

        Args:
            a: Samples of the first source class, shape ``(B, C, *spatial)``, in the model's input space.
            b: Samples of the second source class, same shape, dtype and device.
            generator: CPU generator for combiners that draw, whatever the inputs' device.

        Returns:
            The combined samples, same shape, dtype and device as ``a``.

        Raises:
            ValueError: If the shapes, dtypes or devices differ, or there are no spatial dimensions.
        """
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            raise ValueError(
                f"{type(self).__name__} combines two batches of the same shape, dtype and device, got "
                f"{tuple(a.shape)} {a.dtype} on {a.device} and {tuple(b.shape)} {b.dtype} on {b.device}."
            )
        if a.ndim < 3:
            raise ValueError(
                f"{type(self).__name__} needs samples with spatial dimensions, shape (B, C, *spatial); got {tuple(a.shape)}. "
                "Reshape signals to (B, 1, length) first."
            )
        return self.combine(a, b, generator)

    def combine(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Does the work of :meth:`forward` on checked inputs."""
        raise TypeError(f"{type(self).__name__} must implement combine(a, b, generator).")


class MaskCombiner(Combiner):
    """A combiner that takes every position from ``a`` or from ``b``: ``where(mask, b, a)``.

    Subclasses give :meth:`mask` for a spatial size. Masks are cached per size and device, so a step costs one ``where``.

    Raises:
        ValueError: When called, if samples are so small that the mask shows only one of the sources.
    """

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """Returns the boolean mask of shape ``size`` that is true where ``b`` shows."""
        raise TypeError(f"{type(self).__name__} must implement mask(size).")

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def combine(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Takes ``b`` where the mask is true and ``a`` elsewhere."""
        size = tuple(a.shape[2:])
        mask = self._masks.get((size, a.device))
        if mask is None:
            # outside inference mode, or a mask cached in validation could not be used in training; always on the CPU, so
            # that positions on an edge fall on the same side everywhere
            with torch.inference_mode(False), torch.device("cpu"):
                mask = self.mask(size)
                if mask.all() or not mask.any():
                    raise _one_source(self, size)
                mask = self._masks[size, a.device] = mask.to(a.device)
        return torch.where(mask, b, a)


_DRAW_OTHERS = (
    "draw the key from ways that fit these samples: WatermarkKey.draw(..., combiners=[...]). PixelBlend, CropPaste at its default, and Stripes "
    "and Band along axis -1 fit signals of one dimension, too."
)


def _one_source(combiner: nn.Module, size: Sequence[int]) -> ValueError:
    return ValueError(
        f"{combiner} shows only one of its two sources on samples of size {tuple(size)}, so it would teach the target on plain "
        f"samples of one class. Change its parameters, or {_DRAW_OTHERS}"
    )


def _fraction(name: str, value: float, *, low: float = 0.0, high: float = 1.0) -> float:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is not a fraction of the image between {low} and {high}.")
    return float(value)


class CropPaste(Combiner):
    """C1: crops a rectangle out of ``b`` and pastes it on ``a`` (the paper's default way, §IV-B).

    The default replaces the right half of ``a`` by the right half of ``b``. For signals (one spatial dimension) the last
    entry of each pair is used and ``rotation`` must be 0 or 180.

    Args:
        position: Top and left edge of the pasted rectangle, fractions of height and width in ``[0, 1)``.
        size: Height and width of the pasted rectangle, fractions in ``(0, 1]``.
        crop_position: Top and left edge of the rectangle cut out of ``b``; ``None`` cuts where it is pasted.
        rotation: Counter-clockwise rotation of the rectangle in degrees: 0, 90, 180 or 270.

    Raises:
        ValueError: If a fraction is out of range, the rectangle leaves the image, or the rotation is not a quarter turn; when
            called, if the rectangle covers the sample, or rotated does not fit into it.
    """

    def __init__(
        self,
        position: tuple[float, float] = (0.0, 0.5),
        size: tuple[float, float] = (1.0, 0.5),
        crop_position: tuple[float, float] | None = None,
        rotation: int = 0,
    ) -> None:
        super().__init__()
        crop = position if crop_position is None else crop_position
        for name, pair in (("position", position), ("size", size), ("crop_position", crop)):
            if len(pair) != 2:
                raise ValueError(f"{name}={tuple(pair)} must be two fractions, of height and width.")
        for name, start in (("position", position), ("crop_position", crop)):
            for offset, extent in zip(start, size, strict=True):
                _fraction(name, offset)
                _fraction("size", extent, low=1e-6)
                if offset + extent > 1 + 1e-6:
                    raise ValueError(
                        f"A rectangle of size={tuple(size)} at {name}={tuple(start)} leaves the image; "
                        "each position + size must be at most 1."
                    )
        if rotation not in (0, 90, 180, 270):
            raise ValueError(f"rotation={rotation} is not one of 0, 90, 180, 270 degrees.")
        self.position, self.size, self.crop_position, self.rotation = (
            tuple(position),
            tuple(size),
            tuple(crop),
            rotation,
        )

    @staticmethod
    def _interval(start: float, extent: float, length: int) -> tuple[int, int]:
        """Turns fractions into a pixel interval that is never empty and stays inside ``length``."""
        low = min(round(start * length), length - 1)
        return low, max(low + 1, min(round((start + extent) * length), length))

    def combine(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Pastes the rectangle of ``b`` on a copy of ``a``."""
        spatial = a.shape[2:]
        if len(spatial) > 2 or (len(spatial) == 1 and self.rotation in (90, 270)):
            raise ValueError(
                f"CropPaste(rotation={self.rotation}) cannot combine samples of shape {tuple(a.shape[1:])}; "
                "it takes (C, H, W) images, and (C, length) signals with rotation 0 or 180."
            )
        dims = slice(2 - len(spatial), None)
        target = [self._interval(*t) for t in zip(self.position[dims], self.size[dims], spatial, strict=True)]
        extents = [high - low for low, high in target]
        if extents == list(spatial):
            raise _one_source(self, spatial)
        if self.rotation in (90, 270):
            extents.reverse()
        patch = b
        for dim, (start, extent, length) in enumerate(
            zip(self.crop_position[dims], extents, spatial, strict=True), start=2
        ):
            if extent > length:
                raise ValueError(
                    f"A rectangle of size={self.size} rotated by {self.rotation} degrees does not fit into an image of "
                    f"{tuple(spatial)} pixels; make it smaller or use rotation 0 or 180."
                )
            patch = patch.narrow(dim, min(round(start * length), length - extent), extent)
        if self.rotation:
            patch = patch.flip(2) if len(spatial) == 1 else torch.rot90(patch, self.rotation // 90, dims=(2, 3))
        combined = a.clone()
        region = combined
        for dim, (low, high) in enumerate(target, start=2):
            region = region.narrow(dim, low, high - low)
        region.copy_(patch)
        return combined

    def extra_repr(self) -> str:
        """Shows the parameters in ``print(combiner)``."""
        return (
            f"position={self.position}, size={self.size}, crop_position={self.crop_position}, rotation={self.rotation}"
        )


class PixelBlend(Combiner):
    """C3: merges pixel by pixel, ``alpha·a + (1 - alpha)·b`` (§IV-B).

    The dearest way on colour photographs, and no dearer than others on digits and Fashion-MNIST (see the page on tuning).

    Args:
        alpha: Share of the first source, in ``(0, 1)``; the paper uses 0.5.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha} must lie strictly between 0 and 1, or one of the sources disappears.")
        self.alpha = alpha

    def combine(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Blends the two batches."""
        return torch.lerp(b, a, self.alpha)


class Stripes(MaskCombiner):
    """C4: cuts the sample into equal stripes and takes each from ``a`` or ``b`` (§IV-B: five columns, three and two).

    Args:
        pattern: One entry a stripe, 0 for ``a`` and 1 for ``b``; both must occur.
        axis: Axis the stripes follow one another along: ``-1`` gives columns, ``-2`` gives rows.
    """

    def __init__(self, pattern: Sequence[int] = (0, 1, 0, 1, 0), axis: int = -1) -> None:
        super().__init__()
        if set(pattern) != {0, 1}:
            raise ValueError(
                f"pattern={list(pattern)} must hold 0 (first source) and 1 (second source), each at least once."
            )
        if axis not in (-1, -2):
            raise ValueError(f"axis={axis} must be -1 (columns) or -2 (rows).")
        self.pattern, self.axis = tuple(pattern), axis

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """Marks the stripes that show ``b``."""
        _need_axis(self, size, self.axis)
        length, stripes = size[self.axis], len(self.pattern)
        if length < stripes:
            raise ValueError(
                f"A sample of {length} positions cannot be cut into {stripes} stripes; use a shorter pattern."
            )
        line = torch.tensor(self.pattern, dtype=torch.bool)[torch.arange(length) * stripes // length]
        return line.expand(size) if self.axis == -1 else line[:, None].expand(size)


class Band(MaskCombiner):
    """Shows ``b`` in one band across ``a`` (the "hot-dog" of the evasion set).

    Args:
        start: Where the band begins, a fraction in ``[0, 1)``.
        width: Its width, a fraction in ``(0, 1)``.
        axis: ``-2`` for a horizontal band, ``-1`` for a vertical one (and for signals).
    """

    def __init__(self, start: float = 0.3, width: float = 0.4, axis: int = -2) -> None:
        super().__init__()
        if _fraction("start", start) + _fraction("width", width, low=1e-6) > 1 + 1e-6 or width >= 1:
            raise ValueError(f"A band of width={width} at start={start} leaves the image or covers it entirely.")
        if axis not in (-1, -2):
            raise ValueError(f"axis={axis} must be -1 (vertical band) or -2 (horizontal band).")
        self.start, self.width, self.axis = start, width, axis

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """Marks the band."""
        _need_axis(self, size, self.axis)
        centre = (torch.arange(size[self.axis]).double() + 0.5) / size[self.axis]
        line = (centre >= self.start) & (centre < self.start + self.width)
        return line.expand(size) if self.axis == -1 else line[:, None].expand(size)


class Diagonal(MaskCombiner):
    """Shows ``b`` on one side of a diagonal, whatever the aspect ratio; the diagonal itself belongs to ``b``.

    Args:
        anti: ``False`` shows ``b`` above the falling diagonal (upper right), ``True`` below the rising one (lower right).
    """

    def __init__(self, anti: bool = False) -> None:
        super().__init__()
        self.anti = anti

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """Marks the triangle that shows ``b``."""
        y, x = _centred_grid(self, size)
        return x >= -y if self.anti else x >= y


class Donut(MaskCombiner):
    """Shows ``b`` in an elliptic ring around the centre.

    Args:
        inner: Inner radius as a fraction of the half-axes, in ``[0, outer)``; 0 gives a disc.
        outer: Outer radius, in ``(inner, 1]``.
    """

    def __init__(self, inner: float = 0.3, outer: float = 0.85) -> None:
        super().__init__()
        if not 0 <= inner < outer <= 1:
            raise ValueError(f"inner={inner} and outer={outer} must satisfy 0 <= inner < outer <= 1.")
        self.inner, self.outer = inner, outer

    def mask(self, size: tuple[int, ...]) -> Tensor:
        """Marks the ring."""
        y, x = _centred_grid(self, size)
        radius = x.square() + y.square()
        return (radius >= self.inner**2) & (radius < self.outer**2)


def _need_axis(combiner: nn.Module, size: tuple[int, ...], axis: int) -> None:
    if len(size) > 2 or len(size) < -axis:
        raise ValueError(
            f"{type(combiner).__name__}(axis={axis}) cannot combine samples with {len(size)} spatial dimension(s); {_DRAW_OTHERS}"
        )


def _centred_grid(combiner: nn.Module, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns pixel centres in ``(-1, 1)`` along height (as a column) and width (as a row), exactly symmetric around 0."""
    if len(size) != 2:
        raise ValueError(
            f"{type(combiner).__name__} combines images with two spatial dimensions, got {len(size)}; {_DRAW_OTHERS}"
        )
    y, x = ((2 * torch.arange(length) + 1 - length).double() / length for length in size)
    return y[:, None], x[None, :]
