"""meadef_lightning: prove that a neural network was stolen through its API.

The rooms follow the story: ``watermark`` (what the owner embeds), ``victims``, ``data``, ``oracle`` (the API), ``extraction`` (the
theft), ``verification`` (the verdict), and ``experiment`` (the whole chain from one YAML). The command is ``meadef``.
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
