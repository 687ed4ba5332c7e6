"""What the owner embeds: keys, combining ways, losses, balancing, and the callback that does it."""

from meadef_lightning.watermark.autoencoder import AutoencoderBlend
from meadef_lightning.watermark.combiners import Band, Combiner, CropPaste, Diagonal, Donut, PixelBlend, Stripes
from meadef_lightning.watermark.key import DEFAULT_COMBINERS, CombinerSpec, KeySpace, WatermarkKey

__all__ = [
    "DEFAULT_COMBINERS",
    "AutoencoderBlend",
    "Band",
    "Combiner",
    "CombinerSpec",
    "CropPaste",
    "Diagonal",
    "Donut",
    "KeySpace",
    "PixelBlend",
    "Stripes",
    "WatermarkKey",
]
