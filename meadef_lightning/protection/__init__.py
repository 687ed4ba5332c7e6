"""The field's other schemes, as baselines and positive controls beside the watermark."""

from meadef_lightning.protection.patch import PatchVictim, stamp
from meadef_lightning.protection.patch_encoder import PatchEncoder
from meadef_lightning.protection.sslguard import SSLGuard

__all__ = ["PatchEncoder", "PatchVictim", "SSLGuard", "stamp"]
