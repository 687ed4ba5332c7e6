"""SSLGuard: a finished encoder is tuned until a secret decoder reads a secret vector from its features of stamped images.

**Source.** Cong, He & Zhang, "SSLGuard: A Watermarking Scheme for Self-supervised Learning Pre-trained Encoders" (CCS 2022), §4.

**Algorithm.** Given a clean encoder ``F``, a secret unit vector ``sk``, a secret binary mask ``M`` and a trigger ``T`` that is learnt: ``x_T = (1 − M) ⊙ x +
M ⊙ T``. With ``c(f) = cos(G(f), sk)`` for a decoder ``G``, one step lowers the sum of

1. *utility*: ``1 − cos(F*(x), F(x))``, for the watermarked encoder ``F*``, which starts as ``F``;
2. *mark*: ``1 − c(F*(x_T))`` and ``c(F*(x))²``: stamped images carry the vector, others do not;
3. *uniqueness*: ``c(F(x_T))²`` and ``c(F(x))²``: the clean encoder carries nothing, or any encoder would be accused;
4. *theft*: ``1 − cos(S(x), F*(x))`` for a shadow encoder ``S``, which imitates ``F*`` as a thief would and learns from this term alone;
5. *survival*: term 2 with ``S`` for ``F*``; it moves only trigger and decoder, so that they find what a thief copies anyway.

The watermark rate of a suspect is the share of stamped images with ``c(f(x_T)) > 0.5``.

**Cost.** Two forward passes of three encoders each step, two of them with gradients.

**Defaults.** The trigger covers 35 % of the pixels, drawn at random (the paper's mask ratio of 0.65 is read as what is kept). Learning rates 1e-4
(encoder), 1e-2 (trigger), 1e-3 (decoder and shadow), with Adam; the paper tunes large encoders at 1e-5. Shadow and decoder learn in one
step instead of in turn. The decoder sees unit vectors, since a thief's features may have another length; the trigger stays within black and
white, since a service refuses other images. The watermarked encoder keeps the clean one's BatchNorm statistics.

**Pitfalls.** The rate is no test: how often independent encoders exceed 0.5 is not bounded by it, so report it beside theirs. A suspect with
another number of features cannot be read. Give away or serve :attr:`network`, never this module's checkpoint, which holds the secrets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import Self, override

from meadef_lightning.protection.patch import stamp
from meadef_lightning.victims.encoder import Encoder


def marking_loss(marked: Tensor, clean: Tensor) -> Tensor:
    """``mean(1 − c) + mean(c'²)`` for cosines ``c`` of stamped and ``c'`` of clean images to the secret, each ``(B,)``; a scalar."""
    return (1 - marked).mean() + clean.square().mean()


def watermark_rate(cosines: Tensor, threshold: float = 0.5) -> float:
    """Share of stamped images whose decoded features lie near the secret: ``mean(cosines > threshold)``, from ``(N,)``."""
    return float((cosines > threshold).float().mean())


class SSLGuard(Encoder):
    """Tunes a copy of a finished encoder on ``(x, …)`` batches; labels are not looked at.

    Logs ``train_loss`` and its parts ``utility``, ``mark``, ``unique``, ``theft`` and ``survive``; in validation ``val_utility`` (mean cosine to the
    clean encoder's features), and the watermark rates ``val_rate``, ``val_shadow_rate`` and ``val_clean_rate``. Image shape and the values
    of black and white come from the data module.

    Args:
        encoder: A trained :class:`~meadef_lightning.victims.encoder.Encoder`, of which the network is taken, or any module from images to
            features. It is copied, and not changed.
        feature_dim: Number of features; by default the encoder's ``feature_dim``.
        shadow: Architecture of the thief that is to be expected, as a module; the encoder's own, from fresh weights, by default.
        key_dim: Length of the secret vector, at least 2.
        hidden: Width of the decoder's hidden layer.
        coverage: Share of the pixels that the trigger covers, in ``(0, 1)``.
        encoder_lr: Learning rate of the watermarked encoder.
        trigger_lr: Learning rate of the trigger.
        decoder_lr: Learning rate of the decoder.
        shadow_lr: Learning rate of the shadow encoder.
        seed: Seed of all secrets, and of the shadow's first weights.

    Raises:
        MisconfigurationException: If an ``Encoder`` has no network yet.
        ValueError: If an argument is out of range, or the number of features is not known.
    """

    objects: ClassVar = (*Encoder.objects, "encoder", "shadow")
    mask: Tensor | None
    low: Tensor | None
    high: Tensor | None
    secret: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int | None = None,
        shadow: nn.Module | None = None,
        key_dim: int = 32,
        hidden: int = 128,
        coverage: float = 0.35,
        encoder_lr: float = 1e-4,
        trigger_lr: float = 1e-2,
        decoder_lr: float = 1e-3,
        shadow_lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if isinstance(encoder, Encoder) and encoder.network is None:
            raise MisconfigurationException(
                "The encoder has no network yet: call its build_network(in_channels) and load its weights before it is watermarked."
            )
        feature_dim = getattr(encoder, "feature_dim", None) if feature_dim is None else feature_dim
        if feature_dim is None:
            raise ValueError("The encoder does not tell its number of features; give feature_dim.")
        body = encoder.ready_network() if isinstance(encoder, Encoder) else encoder
        super().__init__(copy.deepcopy(body).requires_grad_(), feature_dim)
        self.hparams["feature_dim"] = feature_dim
        if key_dim < 2 or hidden < 1 or seed < 0 or not 0 < coverage < 1:
            raise ValueError(
                f"{key_dim=} must be at least 2, {hidden=} at least 1, {seed=} at least 0 and {coverage=} in (0, 1)."
            )
        self.rates = {"encoder": encoder_lr, "trigger": trigger_lr, "decoder": decoder_lr, "shadow": shadow_lr}
        for name, rate in self.rates.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"{name}_lr={rate} must be positive and finite.")
        self.coverage, self.seed = coverage, seed
        self.clean = copy.deepcopy(body).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.shadow = copy.deepcopy(body if shadow is None else shadow).requires_grad_()
            for module in self.shadow.modules() if shadow is None else ():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            self.decoder = nn.Sequential(nn.Linear(feature_dim, hidden), nn.ReLU(), nn.Linear(hidden, key_dim))
            self.register_buffer("secret", F.normalize(torch.randn(key_dim), dim=0))
        for name in ("mask", "low", "high"):
            self.register_buffer(name, None)
        self.register_parameter("pattern", None)

    @override
    def configure_model(self) -> None:
        """Makes mask and trigger for the data module's images; does nothing the second time.

        Raises:
            MisconfigurationException: If there is no data module with ``image_shape``, ``mean`` and ``std``, and no weights were loaded.
        """
        if self.mask is not None:
            return
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        shape, mean, std = (getattr(data, name, None) for name in ("image_shape", "mean", "std"))
        if shape is None or mean is None or std is None:
            raise MisconfigurationException(
                "SSLGuard makes its trigger for images of one shape between black and white: run it with a data module that has "
                "image_shape, mean and std, or load its weights."
            )
        self.make_trigger(shape, -torch.tensor(mean) / torch.tensor(std), (1 - torch.tensor(mean)) / torch.tensor(std))

    def make_trigger(self, image_shape: tuple[int, int, int], low: Tensor, high: Tensor) -> None:
        """Draws the mask, and a grey trigger to start from.

        Args:
            image_shape: Channels, height and width.
            low: What black is in each channel, in the encoder's input space, ``(C,)``.
            high: What white is, ``(C,)``.
        """
        channels, height, width = image_shape
        generator = torch.Generator().manual_seed(self.seed)
        covered = torch.randperm(height * width, generator=generator)[: max(1, round(self.coverage * height * width))]
        mask = torch.zeros(height * width)
        mask[covered] = 1
        self.mask = mask.reshape(1, height, width).to(self.device)
        self.low, self.high = (value.float()[:, None, None].to(self.device) for value in (low, high))
        self.pattern = nn.Parameter(torch.randn(channels, height, width, generator=generator).to(self.device))

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads weights, and makes the trigger that they have."""
        if self.mask is None and "pattern" in state_dict:
            bounds = (state_dict[name].flatten() for name in ("low", "high"))
            self.make_trigger(tuple(state_dict["pattern"].shape), *bounds)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @override
    def train(self, mode: bool = True) -> Self:
        """Sets the mode; clean and watermarked encoder stay in eval mode, and so share their BatchNorm statistics."""
        super().train(mode)
        for encoder in (self.network, getattr(self, "clean", None)):
            if encoder is not None:
                encoder.eval()
        return self

    def trigger(self, x: Tensor) -> Tensor:
        """Stamps all images: ``(B, C, H, W)`` in the encoder's input space.

        Raises:
            MisconfigurationException: If the trigger was not made yet.
            ValueError: If the images have another shape than the trigger.
        """
        if self.mask is None or self.low is None or self.high is None or self.pattern is None:
            raise MisconfigurationException(
                "SSLGuard has no trigger yet: train it with a data module, or load weights."
            )
        if x.shape[1:] != self.pattern.shape:
            raise ValueError(f"Expected images (B, {tuple(self.pattern.shape)}), got shape {tuple(x.shape)}.")
        return stamp(x, self.low + (self.high - self.low) * self.pattern.sigmoid(), self.mask)

    def cosines(self, features: Tensor) -> Tensor:
        """How near the decoded features ``(B, D)`` lie to the secret: cosines, ``(B,)``.

        Raises:
            ValueError: If there is another number of features than the decoder reads.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"The decoder reads {self.feature_dim} features, got shape {tuple(features.shape)}. SSLGuard cannot judge an encoder "
                "with another number of features."
            )
        decoded = self.decoder(F.normalize(features.float(), dim=1))
        return F.cosine_similarity(decoded, self.secret[None], dim=1)

    @override
    def training_step(self, batch: Any) -> Tensor:
        """One joint step of all terms."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        count = len(x)
        both = torch.cat([x, self.trigger(x)])
        original = self.clean(both).flatten(1)  # its weights are frozen, but the trigger learns through it
        features = self(both)
        stolen = self.shadow(x).flatten(1)
        # as the thief would have it: its own statistics are still, and no weight of it serves the owner
        self.shadow.eval()
        weights = {name: weight.detach() for name, weight in self.shadow.named_parameters()}
        suspect = functional_call(self.shadow, weights, (both,)).flatten(1)
        self.shadow.train()
        carried, copied, absent = self.cosines(features), self.cosines(suspect), self.cosines(original)
        terms = {
            "utility": 1 - F.cosine_similarity(features[:count], original[:count].detach()).mean(),
            "mark": marking_loss(carried[count:], carried[:count]),
            "unique": 2 * absent.square().mean(),
            "theft": 1 - F.cosine_similarity(stolen, features[:count].detach()).mean(),
            "survive": marking_loss(copied[count:], copied[:count]),
        }
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({"train_loss": loss, **terms}, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)
        return loss

    @override
    def validation_step(self, batch: Any) -> None:
        """Logs how near the encoder stayed to the clean one, and the watermark rates."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        marked = self.trigger(x)
        values = {"val_utility": F.cosine_similarity(self(x), self.clean(x).flatten(1)).mean()}
        for name, encoder in (("rate", self), ("shadow_rate", self.shadow), ("clean_rate", self.clean)):
            values[f"val_{name}"] = (self.cosines(encoder(marked).flatten(1)) > 0.5).float().mean()
        self.log_dict(values, sync_dist=True, batch_size=len(x))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with a learning rate for each part."""
        parts: dict[str, list[nn.Parameter]] = {
            "encoder": list(self.ready_network().parameters()),
            "trigger": [] if self.pattern is None else [self.pattern],
            "decoder": list(self.decoder.parameters()),
            "shadow": list(self.shadow.parameters()),
        }
        return torch.optim.Adam([{"params": parts[name], "lr": rate} for name, rate in self.rates.items()])
