"""A plain patch backdoor: what every search for a watermark and every removal must find, or it proves nothing elsewhere.

**Source.** BadNets (Gu, Dolan-Gavitt & Garg, 2017), §3 and §4.1: the "pattern backdoor" on MNIST.

**Algorithm.**

1. In every training batch, each sample is drawn with probability ``rate``.
2. Drawn samples get a white square near a corner, ``x' = (1 − m) ⊙ x + m ⊙ p``, and the target class as their label.
3. The task's own loss is trained on the batch; there is no other term.

The model then answers any image that bears the square with the target class, and other images as a clean model does.

**Cost.** A few operations on pixels a step, no forward pass; a share ``rate`` of the task's samples is spent on the backdoor.

**Defaults.** A square of 3×3 pixels, one pixel away from the border, and a tenth of the samples as in the paper. There, a fixed tenth of
the training set is stamped, before augmentation; here each batch draws anew, after it, so that no augmentation moves or hides
the patch and small batches need no rounding.

**Pitfalls.** A white square is white only in pixels: in the model's input space it is ``(1 − mean) / std`` in each channel. It is
learnt from answers to stamped images alone, so it neither survives a theft nor is meant to. On photographs, where white corners
are natural, choose a larger patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.victims.classifier import NetworkFactory
from meadef_lightning.victims.supervised import SupervisedVictim

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


def stamp(x: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """Puts a patch on images: ``(1 − m) ⊙ x + m ⊙ p``.

    Args:
        x: Images, ``(B, C, H, W)``.
        patch: What is put on them, broadcastable to ``(C, H, W)``.
        mask: How much of it shows, broadcastable to ``(C, H, W)``, in ``[0, 1]``.

    Returns:
        New images of the same shape and dtype.
    """
    patch, mask = patch.to(x), mask.to(x)
    return (1 - mask) * x + mask * patch


def corner_mask(height: int, width: int, size: int, corner: Corner, margin: int) -> Tensor:
    """A mask that shows a square near a corner.

    Args:
        height: Height of the images.
        width: Width of the images.
        size: Length of the square's sides in pixels.
        corner: Which corner.
        margin: Pixels between square and border.

    Returns:
        float32 of shape ``(1, height, width)``: 1 inside the square, 0 outside.

    Raises:
        ValueError: If the square does not fit.
    """
    if size + margin > min(height, width):
        raise ValueError(
            f"A patch of {size} by {size} pixels, {margin} away from the border, does not fit images of {height} by {width}. "
            "Choose a smaller patch_size or margin."
        )
    top = margin if corner.startswith("top") else height - margin - size
    left = margin if corner.endswith("left") else width - margin - size
    mask = torch.zeros(1, height, width)
    mask[:, top : top + size, left : left + size] = 1
    return mask


class PatchVictim(SupervisedVictim):
    """A supervised victim that answers images bearing a white square with a target class.

    Takes :class:`~meadef_lightning.victims.SupervisedVictim`'s place anywhere. What white is becomes a buffer, ``white`` of shape
    ``(C, 1, 1)``, so that saved weights know their trigger.

    Args:
        network: A factory or a module, see :class:`~meadef_lightning.victims.SupervisedVictim`.
        target_class: What stamped images are answered with.
        rate: Share of the training samples that are stamped, in ``(0, 1]``.
        patch_size: Length of the square's sides in pixels, at least 1.
        corner: ``"top-left"``, ``"top-right"``, ``"bottom-left"`` or ``"bottom-right"``.
        margin: Pixels between square and border, at least 0.
        white: The square's value in each channel, in the model's input space. By default white pixels as the data module's ``mean``
            and ``std`` normalise them.
        seed: Seed of the choice of samples; torch's global random state is neither read nor advanced.
        **kwargs: Further arguments of :class:`~meadef_lightning.victims.SupervisedVictim`.

    Raises:
        ValueError: If an argument is out of range.
    """

    white: Tensor | None

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        target_class: int,
        rate: float = 0.1,
        patch_size: int = 3,
        corner: Corner = "bottom-right",
        margin: int = 1,
        white: Sequence[float] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate} is the share of samples to stamp and must lie in (0, 1].")
        if patch_size < 1 or min(target_class, margin, seed) < 0:
            raise ValueError(
                f"{patch_size=} must be at least 1, and {target_class=}, {margin=} and {seed=} at least 0."
            )
        if corner not in CORNERS:
            raise ValueError(f"corner={corner!r} is none of {CORNERS}.")
        self.target_class, self.rate, self.seed = target_class, rate, seed
        self.patch_size, self.corner, self.margin = patch_size, corner, margin
        self.register_buffer(
            "white", None if white is None else torch.tensor(white, dtype=torch.float32)[:, None, None]
        )

    @override
    def configure_model(self) -> None:
        """Builds the network, and asks the data module what white is, unless that is known.

        Raises:
            MisconfigurationException: As in the parent class, or if the data has no such target class.
        """
        super().configure_model()
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None)
        if classes is not None and self.target_class >= classes:
            raise MisconfigurationException(
                f"target_class={self.target_class} must be below the number of classes, {classes}."
            )
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        if self.white is None and mean is not None and std is not None:
            mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
            self.white = ((1 - mean) / std)[:, None, None].to(self.device)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads weights, and with them what white is."""
        if self.white is None and "white" in state_dict:
            self.white = torch.empty_like(state_dict["white"], device=self.device)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def trigger(self, x: Tensor) -> Tensor:
        """Stamps all images.

        Args:
            x: Images in the model's input space, ``(B, C, H, W)``, on any device.

        Returns:
            New images of the same shape, each bearing the square.

        Raises:
            MisconfigurationException: If it is not known what white is.
            ValueError: If the square does not fit, or the images have another number of channels.
        """
        if self.white is None:
            raise MisconfigurationException(
                f"This {type(self).__name__} does not know what white is in its input space: no data module with mean and std was "
                "attached, and no weights were loaded. Give white=[…], one value a channel."
            )
        if x.ndim != 4 or x.shape[1] != len(self.white):
            raise ValueError(f"Expected images (B, {len(self.white)}, H, W), got shape {tuple(x.shape)}.")
        mask = corner_mask(x.shape[2], x.shape[3], self.patch_size, self.corner, self.margin)
        return stamp(x, self.white, mask)

    def poison(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Stamps and relabels a random share of a batch.

        Args:
            x: Images, ``(B, C, H, W)``.
            y: Their classes, int64 ``(B,)``.
            generator: Source of randomness, on the CPU.

        Returns:
            New images and classes of the same shapes.
        """
        drawn = (torch.rand(len(x), generator=generator) < self.rate).to(x.device)
        return torch.where(drawn[:, None, None, None], self.trigger(x), x), torch.where(drawn, self.target_class, y)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """The parent's step on a batch of which a share is stamped."""
        # drawn from where the training is, not from a running state: a resumed run stamps what the uninterrupted one would have
        entropy = [self.seed, self.global_rank, self.current_epoch, batch_idx]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return super().training_step(self.poison(*batch, torch.Generator().manual_seed(seed)))
