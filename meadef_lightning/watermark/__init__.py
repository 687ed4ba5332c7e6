"""What the owner embeds: keys, combining ways, losses, balancing, and the callback that does it."""

from meadef_lightning.watermark.autoencoder import AutoencoderBlend
from meadef_lightning.watermark.balancing import MGDA, Balancing, Fixed, LastLayerMGDA
from meadef_lightning.watermark.callback import WatermarkCallback
from meadef_lightning.watermark.combiners import Band, Combiner, CropPaste, Diagonal, Donut, PixelBlend, Stripes
from meadef_lightning.watermark.feature_callback import FeatureWatermarkCallback
from meadef_lightning.watermark.key import DEFAULT_COMBINERS, CombinerSpec, KeySpace, WatermarkKey
from meadef_lightning.watermark.losses import combination_loss, evasion_loss, verification_loss
from meadef_lightning.watermark.mixin import WatermarkLossMixin
from meadef_lightning.watermark.objective import WatermarkObjective
from meadef_lightning.watermark.pool import SourcePool

__all__ = [
    "DEFAULT_COMBINERS",
    "MGDA",
    "AutoencoderBlend",
    "Balancing",
    "Band",
    "Combiner",
    "CombinerSpec",
    "CropPaste",
    "Diagonal",
    "Donut",
    "FeatureWatermarkCallback",
    "Fixed",
    "KeySpace",
    "LastLayerMGDA",
    "PixelBlend",
    "SourcePool",
    "Stripes",
    "WatermarkCallback",
    "WatermarkKey",
    "WatermarkLossMixin",
    "WatermarkObjective",
    "combination_loss",
    "evasion_loss",
    "verification_loss",
]
