"""The field's other schemes, as baselines and positive controls beside the watermark."""

from meadef_lightning.protection.patch import PatchVictim, stamp

__all__ = ["PatchVictim", "stamp"]
