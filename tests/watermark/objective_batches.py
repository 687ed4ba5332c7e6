"""Batches whose images tell their label and number, a small network, and an objective that has seen them."""

from __future__ import annotations

import torch
from torch import nn

from meadef_lightning.watermark import WatermarkKey, WatermarkObjective

KEY = WatermarkKey((4, 1), 2, 5, seed=11)  # the default way: b on the right half
SIZE = 8


def batch(n=40, classes=5, offset=0):
    """Images full of label + number/128, which float32 holds exactly."""
    y = torch.arange(n) % classes
    x = y + torch.arange(offset, offset + n) % 100 / 128
    return x[:, None, None, None].expand(-1, 1, SIZE, SIZE).clone(), y


def network(batchnorm=False, classes=5):
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(4) if batchnorm else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 4, 3), middle, nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, classes))


def ready(key=KEY, **options):
    objective = WatermarkObjective(key, **{"samples": 6, **options})
    objective.observe(*batch())
    return objective
