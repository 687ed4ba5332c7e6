"""One process of a SimCLR training on two, or on one with the joined batches; started by test_simclr.py."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from silent import SILENT
from torch import nn
from torch.utils.data import DataLoader, Dataset

from meadef_lightning.victims.networks import MLP
from meadef_lightning.victims.simclr import SimCLRVictim

STEPS, BATCH = 3, 8


class Pairs(Dataset):
    """Views made beforehand: ``((x0, x1), y)``; of every batch the rank's share."""

    def __init__(self, rank: int, world_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        views = torch.randn(2, STEPS * BATCH, 1, 8, 8, generator=generator)
        views[1] = views[0] + 0.5 * views[1]
        self.views = views[:, rank::world_size]

    def __len__(self) -> int:
        return self.views.shape[1]

    def __getitem__(self, index: int) -> Any:
        return (self.views[0, index], self.views[1, index]), 0


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def train(rank: int, world_size: int, gather: bool) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    module = SimCLRVictim(
        MLP(6, 1, hidden=[12], grid=8),
        feature_dim=6,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        projection_head=nn.Linear(6, 4),  # no BatchNorm, whose statistics would differ between the processes
        gather_distributed=gather,
        temperature=0.2,
    )
    losses = Losses()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)) if world_size > 1 else "auto"
    trainer = Trainer(
        strategy=strategy,
        devices=world_size,
        max_epochs=1,
        callbacks=[losses],
        use_distributed_sampler=False,
        **SILENT,
    )
    trainer.fit(module, DataLoader(Pairs(rank, world_size), batch_size=BATCH // world_size))
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return {"losses": losses.seen, "weights": weights.tolist()}


if __name__ == "__main__":
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    results = {str(gather): train(rank, world_size, gather) for gather in (True, False)}
    (Path(sys.argv[1]) / f"{world_size}.{rank}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
