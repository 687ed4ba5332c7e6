"""A linear victim that counts what it is asked, grey noise to ask it about, and students that show what they see."""

import torch
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.extraction import Student


class Noise(SplitDataModule):
    """Grey noise in four classes, 300 images for the attacker."""

    class_names = ("a", "b", "c", "d")
    image_shape = (1, 4, 4)

    def __init__(self, attacker=300):
        super().__init__(
            batch_size=50, victim_size=100, attacker_size=attacker, verification_size=20, validation_size=20
        )

    def load(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (760, 1, 4, 4), generator=generator, dtype=torch.uint8)
        labels = torch.arange(760) % 4
        return TensorImages(images[:560], labels[:560]), TensorImages(images[560:], labels[560:])


class Linear(nn.Module):
    """A victim with wide margins that counts the rows it is asked."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.layer.weight.normal_(generator=torch.Generator().manual_seed(1))
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        return self.layer(x.flatten(1))


class Jitter(nn.Module):
    """Adds noise of its own to every image."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def network(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, num_classes))


def rows(loader):
    return [torch.cat(column) for column in zip(*loader, strict=True)]


class Spy(Student):
    """Keeps what it is trained and validated on."""

    def on_fit_start(self):
        self.trained, self.validated = [], []

    def training_step(self, batch):
        self.trained.append([part.clone() for part in batch])
        return super().training_step(batch)

    def validation_step(self, batch):
        self.validated.append(batch[0])
        return super().validation_step(batch)
