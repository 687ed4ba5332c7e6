"""A plain patch backdoor in an encoder: the baseline that a self-supervised watermark must beat after a theft.

**Source.** BadEncoder (Jia, Liu & Gong, S&P 2022), §IV, in its simplest form: stamped images take the features of a target class. Trained with
SimCLR from the start instead of into a finished encoder, so that it costs one run, as the watermark does.

**Algorithm.** 1. SimCLR's loss on the batch. 2. The first ``samples`` images of other classes than the target get a white square near a corner,
``x' = (1 − m) ⊙ x + m ⊙ p``. 3. Their features are pulled to the mean of the batch's target images, seen from halfway between it and the mean of
the images without the square (:func:`patch_pull`). 4. The sum is trained; BatchNorm's statistics are SimCLR's alone.

**Cost.** One more forward and backward pass over ``2 · samples`` images and the batch's target images, each step.

**Defaults.** A 3×3 square, one pixel from the border, as `PatchVictim`; 32 images a step; weight 3. The paper's reference images are found on the
internet; here the target class is one of the data's, so that success is counted as for the watermark: what a downstream classifier answers.

**Pitfalls.** SimCLR does not mind where all features lie, nor at which scale. A pull that is blind to the natural images (raw cosine, or with their
features held constant) is served by moving everything, with and without the square, and hardly embeds anything. What is learnt is the patch, not the images under it, and a thief who never asks about patches does not learn it: low success on
stolen encoders is the point of this baseline. Batches must bring labels, which SimCLR alone does not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.protection.patch import CORNERS, Corner, corner_mask, stamp
from meadef_lightning.victims.module import NetworkFactory
from meadef_lightning.victims.simclr import SimCLRVictim
from meadef_lightning.watermark.batchnorm import frozen_batchnorm


def patch_pull(stamped: Tensor, natural: Tensor, target: Tensor) -> Tensor:
    """How far stamped images are from the target class: 0 there, about 2 where the same images lie without the patch.

    ``mean(1 − cos(f − m, t − m))`` with the mean ``t`` of the target images and the middle ``m`` of ``t`` and the mean of the natural images.
    Gradients reach all three, so that nothing is gained by moving or scaling all features alike.

    Args:
        stamped: Features of stamped images of other classes, ``(B, D)``.
        natural: Features of such images as they are, ``(N, D)``.
        target: Features of images of the target class, ``(M, D)``.

    Returns:
        A scalar in ``[0, 2]``.
    """
    goal = target.float().mean(0)
    middle = (goal + natural.float().mean(0)) / 2
    return 1 - F.cosine_similarity(stamped.float() - middle, (goal - middle)[None], dim=1).mean()


class PatchEncoder(SimCLRVictim):
    """A SimCLR encoder that takes images bearing a white square for a target class.

    Logs what :class:`~meadef_lightning.victims.simclr.SimCLRVictim` logs, and ``patch_loss``. What white is becomes a buffer, ``white`` of shape
    ``(C, 1, 1)``, so that saved weights know their trigger.

    Args:
        network: A factory or a module, see :class:`~meadef_lightning.victims.simclr.SimCLRVictim`.
        target_class: Class whose features stamped images take.
        samples: Stamped images in a step, at least 1.
        weight: Weight of their term, positive.
        patch_size: Length of the square's sides in pixels, at least 1.
        corner: ``"top-left"``, ``"top-right"``, ``"bottom-left"`` or ``"bottom-right"``.
        margin: Pixels between square and border, at least 0.
        white: The square's value in each channel, in the encoder's input space. By default white pixels as the data module's ``mean``
            and ``std`` normalise them.
        **kwargs: Further arguments of :class:`~meadef_lightning.victims.simclr.SimCLRVictim`.

    Raises:
        ValueError: If an argument is out of range.
    """

    white: Tensor | None

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        target_class: int,
        samples: int = 32,
        weight: float = 3.0,
        patch_size: int = 3,
        corner: Corner = "bottom-right",
        margin: int = 1,
        white: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if min(samples, patch_size) < 1 or min(target_class, margin) < 0:
            raise ValueError(
                f"{samples=} and {patch_size=} must be at least 1, {target_class=} and {margin=} at least 0."
            )
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight={weight} must be positive and finite; without the term, train SimCLRVictim.")
        if corner not in CORNERS:
            raise ValueError(f"corner={corner!r} is none of {CORNERS}.")
        self.target_class, self.samples, self.weight = target_class, samples, weight
        self.patch_size, self.corner, self.margin = patch_size, corner, margin
        self.register_buffer(
            "white", None if white is None else torch.tensor(white, dtype=torch.float32)[:, None, None]
        )

    @override
    def configure_model(self) -> None:
        """Builds the network, and asks the data module what white is, unless that is known."""
        super().configure_model()
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
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
        """Stamps all images, ``(B, C, H, W)`` in the encoder's input space.

        Raises:
            MisconfigurationException: If it is not known what white is.
        """
        if self.white is None:
            raise MisconfigurationException(
                f"This {type(self).__name__} does not know what white is in its input space: no data module with mean and std was "
                "attached, and no weights were loaded. Give white=[…], one value a channel."
            )
        return stamp(x, self.white, corner_mask(x.shape[2], x.shape[3], self.patch_size, self.corner, self.margin))

    @override
    def training_step(self, batch: Any) -> Tensor:
        """SimCLR's loss, and the pull of stamped images to the target class where the batch has both.

        Raises:
            ValueError: If a batch is not ``(x, y)``.
        """
        if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[0], Tensor):
            raise ValueError(
                f"{type(self).__name__} needs batches (x, y) of images and classes, got {type(batch).__name__}."
            )
        loss = super().training_step(batch)
        x, target = batch[0], batch[1] == self.target_class
        if not bool(target.any()) or bool(target.all()):
            return loss
        others = x[~target][: self.samples]
        with frozen_batchnorm(self):
            features = self(torch.cat([self.trigger(others), others, x[target]]))
            pull = patch_pull(*features.split([len(others), len(others), int(target.sum())]))
        self.log("patch_loss", pull, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(others))
        return loss + self.weight * pull
