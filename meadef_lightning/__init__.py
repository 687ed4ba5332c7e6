"""meadef_lightning: prove that a neural network was stolen through its API.

The rooms follow the story: `meadef_lightning.watermark` (what the owner embeds), `meadef_lightning.victims` and
`meadef_lightning.data` (what is trained on what), `meadef_lightning.oracle` (the API), `meadef_lightning.extraction` (the theft),
`meadef_lightning.removal` and `meadef_lightning.detection` (what a thief does next), `meadef_lightning.verification` (the verdict),
`meadef_lightning.protection` (other schemes, to compare with) and `meadef_lightning.experiment` (the whole chain from one YAML).
Start with `WatermarkCallback` in a Trainer of your own, or with the command ``meadef demo``. In every room one file is one method, and its
docstring is the method's page: source, algorithm, cost, defaults, pitfalls.
"""

from typing import TYPE_CHECKING, Any

from meadef_lightning.__about__ import __version__

if TYPE_CHECKING:
    from meadef_lightning.watermark import WatermarkCallback, WatermarkKey

__all__ = ["WatermarkCallback", "WatermarkKey", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the two names everybody needs when they are asked for, so that ``meadef --help`` need not load torch."""
    if name in ("WatermarkCallback", "WatermarkKey"):
        from meadef_lightning import watermark

        return getattr(watermark, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
