"""Input preprocessing: the stolen model stays as it is, but sees images only after noise, compression, smoothing or coarser colours.

**Source.** Gaussian noise calibrated to an accuracy budget: the MEA-Defender paper (IEEE S&P 2024), robustness against input processing (noise that
costs at most 3.5 points). Median smoothing and fewer bits: Xu et al., "Feature Squeezing" (NDSS 2018). JPEG: Guo et al., "Countering
Adversarial Images using Input Transformations" (ICLR 2018). As attacks on watermarks: Lukas et al., "SoK" (S&P 2022).

**Algorithm.** For each strength: 1. bring an image from the input space back to pixels in [0, 1]; 2. transform it; 3. normalise again, and ask the
model. The accuracy budget ends the path, so the strength that is taken home is the *calibrated* one: the last that does not cost too
much. A finer list calibrates more finely.

**Cost.** No training. Noise, smoothing and fewer bits are a fraction of a forward pass. JPEG and WEBP encode and decode image by image on the
CPU: no codec takes a batch.

**Defaults.** None for the strengths, which depend on the transform; each transform's page suggests some. For all of them 0 means that images stay
as they are (nearly, for codecs) and larger is stronger: JPEG and WEBP count from quality 100 downwards, `BitDepth` counts dropped bits.

**Pitfalls.** Noise in normalised space is another noise for every data set and channel. Noise drawn anew for every query would make a stolen
model answer the same image differently, which gives it away and makes measurements irreproducible: here an image's noise depends on
the seed and on the image alone, not on its batch. Codecs, and rounding, have no useful gradient. Grey images are compressed as grey by
JPEG; WEBP knows only colour, so they go through it and back. Strong preprocessing without tuning costs accuracy that a patient thief
would win back by training on preprocessed images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, device_of, growing
from meadef_lightning.removal.transforms import InputTransform


class Preprocessed(nn.Module):
    """A model behind a transform of its inputs.

    Strength, seed and range are part of the ``state_dict``, as one tensor: loading it restores the transform as it was.

    Args:
        model: Maps ``(B, C, H, W)`` to anything.
        transform: Works on pixels in [0, 1].
        low: What black is in the input space, ``(C, 1, 1)``; by default inputs are pixels in [0, 1].
        high: What white is.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, model: nn.Module, transform: InputTransform, low: Tensor | None = None, high: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model, self.transform = model, transform
        # not persistent: their shape is known only when a state is loaded, which get_extra_state carries whole
        self.register_buffer("low", torch.zeros(1, 1, 1) if low is None else low.clone(), persistent=False)
        self.register_buffer("high", torch.ones(1, 1, 1) if high is None else high.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms inputs and asks the model.

        Args:
            x: ``(B, C, H, W)`` in the input space; what is darker than black or brighter than white is clipped.

        Returns:
            What the model answers.
        """
        pixels = self.transform(((x - self.low) / (self.high - self.low)).clamp(0, 1))
        answer: Tensor = self.model(self.low + pixels * (self.high - self.low))
        return answer

    @override
    def get_extra_state(self) -> Tensor:
        """Returns strength, seed, low and high, float64 ``(2 + 2 · C,)`` on the CPU."""
        settings = torch.tensor([self.transform.strength, self.transform.seed], dtype=torch.float64)
        return torch.cat([settings, self.low.flatten().cpu().double(), self.high.flatten().cpu().double()])

    @override
    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        self.transform.strength, self.transform.seed = float(state[0]), int(state[1])
        low, high = state[2:].chunk(2)
        self.low, self.high = low.to(self.low)[:, None, None], high.to(self.high)[:, None, None]


class InputPreprocessing(Removal):
    """Puts the untouched model behind a stronger and stronger transform of its inputs.

    In YAML, the transform's other arguments come with its class::

        class_path: meadef_lightning.removal.InputPreprocessing
        init_args:
          transform: {class_path: meadef_lightning.removal.transforms.Smoothing, init_args: {kind: box}}
          strengths: [1, 2, 3]

    Args:
        transform: Makes the transform from a strength: a class of ``meadef_lightning.removal.transforms``.
        strengths: Handed to it one after the other; above 0 and growing.

    Raises:
        ValueError: If the strengths do not grow, or the transform refuses one.
    """

    def __init__(self, transform: Callable[[float], InputTransform], strengths: Sequence[float]) -> None:
        self.transform, self.strengths = transform, growing("strengths", strengths)
        made = [transform(strength) for strength in self.strengths]  # all, so that a bad one is refused now
        self.unit = made[0].unit

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        """Shows the model behind the transform at every strength; the seed is that of the noise."""
        kept = copy.deepcopy(model)
        for strength in self.strengths:
            transform = self.transform(strength)
            transform.seed = seed
            if not observe(strength, Preprocessed(kept, transform, data.low, data.high).to(device_of(kept)).eval()):
                return

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Puts the model itself behind the transform; loading a state sets its strength, seed and range."""
        return Preprocessed(model, self.transform(self.strengths[0]))
