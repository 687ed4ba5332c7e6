"""A small data module whose images tell their number, a module that remembers what it sees, and a quiet Trainer."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from meadef_lightning.data import SplitDataModule, TensorImages


class Squares(SplitDataModule):
    """200 + 20 images of 2×8×8 in four classes; pixel (0, 0) of channel 0 is the image's number."""

    class_names = ("a", "b", "c", "d")
    image_shape = (2, 8, 8)
    own_test = True
    opened = 0

    def part(self, numbers):
        images = torch.randint(0, 256, (len(numbers), 2, 8, 8), generator=torch.Generator().manual_seed(0))
        images[:, 0, 0, 0] = numbers
        return TensorImages(images.to(torch.uint8), numbers % 4)

    def load(self):
        self.opened += 1
        return self.part(torch.arange(200)), self.part(torch.arange(200, 220)) if self.own_test else None


class Recorder(LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.layer = nn.Linear(128, 4)
        self.seen = []
        self.fail_at = fail_at

    def forward(self, x):
        return self.layer(x.flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append(x)
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.validated = batch[0]

    def test_step(self, batch, batch_idx):
        self.tested = batch[0]

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(epochs=1, callbacks=(), **kwargs):
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def numbers(x, data):
    return ((x[:, 0, 0, 0] * data.std[0] + data.mean[0]) * 255).round().long().tolist()
