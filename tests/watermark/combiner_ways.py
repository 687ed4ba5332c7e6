"""The combining ways that are tested alike, and batches of which every value says where it comes from."""

import numpy as np
import torch

from meadef_lightning.watermark import (
    DEFAULT_COMBINERS,
    Band,
    CropPaste,
    Diagonal,
    Donut,
    PixelBlend,
    Stripes,
)

OWN_WAYS = [
    CropPaste(),
    CropPaste((0.1, 0.2), (0.3, 0.4), (0.6, 0.0), 90),
    PixelBlend(),
    PixelBlend(0.2),
    Stripes(),
    Band(),
    Diagonal(),
    Donut(),
]
WAYS = [*(spec.build() for spec in DEFAULT_COMBINERS), *OWN_WAYS]
SIGNAL_WAYS = [CropPaste(), CropPaste(rotation=180), PixelBlend(), Stripes(), Band(axis=-1)]


def numbered(*shape, dtype=torch.float32):
    """Two batches of which every value says where it comes from."""
    a = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64).reshape(shape)
    return a.to(dtype), (-a).to(dtype)
