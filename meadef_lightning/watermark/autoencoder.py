"""C2, blending in the latent space of an autoencoder trained on the data that is to be protected (S&P 2024, §IV-B)."""

from __future__ import annotations

import hashlib
import io
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meadef_lightning.random_state import kept_random_state
from meadef_lightning.watermark.combiner_spec import CombinerSpec
from meadef_lightning.watermark.combiners import Combiner


class AutoencoderBlend(Combiner):
    """C2: ``decode(alpha·encode(a) + (1 - alpha)·encode(b))``.

    The autoencoder is convolutional, so it takes any height and width. Its weights are trained from data and therefore
    cannot be drawn: this way is not part of the default key space, and a key that uses it names a weights file, pinned by
    its SHA-256, that belongs to the key. :meth:`fit` makes that file.

    Args:
        in_channels: Channels of the samples.
        width: Channels of the first layer; the latent code has twice as many at a quarter of the resolution.
        alpha: Share of the first source's code, in ``(0, 1)``.
        weights: File written by :meth:`fit`; ``None`` leaves the autoencoder untrained, and using it an error.
        sha256: Expected digest of ``weights``; checked when given.

    Raises:
        ValueError: If ``alpha`` is out of range, or the weights file is missing, changed or of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        width: int = 32,
        alpha: float = 0.5,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha} must lie strictly between 0 and 1, or one of the sources disappears.")
        self.in_channels, self.width, self.alpha, self.fitted = in_channels, width, alpha, False
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.GELU(),
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.GELU(),
            nn.Conv2d(width, in_channels, 3, padding=1),
        )
        if weights is not None:
            self._load(Path(weights), sha256)

    def _load(self, path: Path, sha256: str | None) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"Cannot read the autoencoder weights {path}: {error}. Make them with AutoencoderBlend.fit."
            ) from error
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(
                f"The autoencoder weights {path} are not the ones the key was made with (SHA-256 differs)."
            )
        try:
            self.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        except Exception as error:  # torch raises many types for a broken file
            raise ValueError(
                f"{path} does not hold weights of AutoencoderBlend({self.in_channels}, {self.width})."
            ) from error
        self.fitted = True
        self.requires_grad_(False)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encodes and decodes ``x`` of shape ``(B, C, H, W)``; same shape."""
        return self._decode(self.encoder(x), x)

    def _decode(self, code: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(self.decoder(code), size=like.shape[-2:], mode="bilinear", align_corners=False)

    def combine(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Blends the two codes and decodes them."""
        if not self.fitted:
            raise ValueError(
                "This AutoencoderBlend is not trained. Call fit(images, path) once and use the key spec it returns."
            )
        if a.ndim != 4 or a.shape[1] != self.in_channels:
            raise ValueError(f"This AutoencoderBlend takes (B, {self.in_channels}, H, W) images, got {tuple(a.shape)}.")
        if next(self.parameters()).device != a.device:
            self.to(a.device)
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            code = torch.lerp(self.encoder(b.float()), self.encoder(a.float()), self.alpha)
            return self._decode(code, a).to(a.dtype)

    def fit(
        self, images: Tensor, path: str | Path, *, steps: int = 600, batch_size: int = 64, seed: int = 0
    ) -> CombinerSpec:
        """Trains the autoencoder to reconstruct ``images`` and saves it.

        Args:
            images: Training images of the model that is to be protected, shape ``(N, C, H, W)``, in its input space.
            path: Where the weights go (written atomically).
            steps: Adam steps (learning rate 2e-3 with cosine decay) on the mean squared error.
            batch_size: Images a step.
            seed: Seed of initialisation and order.

        Returns:
            The specification to put into a :class:`~meadef_lightning.watermark.key.WatermarkKey`.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels or len(images) == 0:
            raise ValueError(f"fit needs (N, {self.in_channels}, H, W) images with N > 0, got {tuple(images.shape)}.")
        device = next(self.parameters()).device
        with kept_random_state(device), torch.enable_grad():
            torch.manual_seed(seed)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()
            self.requires_grad_(True)
            optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                batch = images[torch.randint(len(images), (batch_size,))].to(device)
                loss = F.mse_loss(self.reconstruct(batch), batch)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
                optimizer.step()
                scheduler.step()
        self.requires_grad_(False)
        self.fitted = True
        buffer = io.BytesIO()
        torch.save({name: tensor.cpu() for name, tensor in self.state_dict().items()}, buffer)
        path, content = Path(path), buffer.getvalue()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
        return CombinerSpec(
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "in_channels": self.in_channels,
                "width": self.width,
                "alpha": self.alpha,
                "weights": str(path),
                "sha256": hashlib.sha256(content).hexdigest(),
            },
        )
