"""The field's other schemes, as baselines and positive controls beside the watermark.

`meadef_lightning.protection.patch` is a victim with a plain patch backdoor, which removals and detectors were made for: if they fail
there, their failure at the watermark says nothing. `meadef_lightning.protection.patch_encoder` is the same for self-supervised
encoders, and `meadef_lightning.protection.sslguard` the scheme of that name. Each is a LightningModule, which a plain Trainer fits.
"""

from meadef_lightning.protection.patch import PatchVictim, stamp
from meadef_lightning.protection.patch_encoder import PatchEncoder
from meadef_lightning.protection.sslguard import SSLGuard

__all__ = ["PatchEncoder", "PatchVictim", "SSLGuard", "stamp"]
