"""What the owner embeds: keys, combining ways, losses, balancing, and the callback that does it.

`meadef_lightning.watermark.key` draws a secret key, `meadef_lightning.watermark.combiners` are the ways of joining two images into one,
`meadef_lightning.watermark.losses` and `meadef_lightning.watermark.objective` the terms, `meadef_lightning.watermark.balancing` weighs them,
and `meadef_lightning.watermark.tilt` is what lets them survive a theft. Use them through `WatermarkCallback`
(`meadef_lightning.watermark.callback`), or ``FeatureWatermarkCallback`` for encoders; `WatermarkLossMixin` is for those who would rather
write ``training_step`` themselves. `meadef_lightning.watermark.surrogate` watches what a thief would take along. ``README.md`` in this directory shows what each knob costs.
"""

from meadef_lightning.watermark.autoencoder import AutoencoderBlend
from meadef_lightning.watermark.balancing import MGDA, Balancing, Fixed, LastLayerMGDA
from meadef_lightning.watermark.callback import WatermarkCallback
from meadef_lightning.watermark.combiner_spec import DEFAULT_COMBINERS, CombinerSpec, default_combiners
from meadef_lightning.watermark.combiners import Band, Combiner, CropPaste, Diagonal, Donut, PixelBlend, Stripes
from meadef_lightning.watermark.feature_callback import FeatureWatermarkCallback
from meadef_lightning.watermark.key import KeySpace, WatermarkKey
from meadef_lightning.watermark.losses import combination_loss, evasion_loss, verification_loss
from meadef_lightning.watermark.mixin import WatermarkLossMixin
from meadef_lightning.watermark.objective import WatermarkObjective
from meadef_lightning.watermark.pool import SourcePool
from meadef_lightning.watermark.surrogate import SurrogateCallback

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
    "SurrogateCallback",
    "WatermarkCallback",
    "WatermarkKey",
    "WatermarkLossMixin",
    "WatermarkObjective",
    "combination_loss",
    "default_combiners",
    "evasion_loss",
    "verification_loss",
]
