"""One of two processes that embed the watermark into an encoder; started by test_feature_trainers.py as torchrun would."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from ssl_modules import BYOL, SILENT, Shapes, SimCLR, callback, differences, make, recorded_draws, steady, with_term
from torch.utils.data import DataLoader, DistributedSampler

RANK = int(os.environ["RANK"])


def train(module: Any, callbacks: Any, **flags: Any) -> None:
    data = Shapes(160)
    trainer = pl.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
        devices=2,
        use_distributed_sampler=False,
        callbacks=callbacks,
        max_epochs=3,
        **{**SILENT, **flags},
    )
    pl.seed_everything(1 + RANK, verbose=False)
    trainer.fit(module, DataLoader(data, 20, sampler=DistributedSampler(data, 2, RANK, shuffle=False)))


def against_twin(kind: type, **flags: Any) -> dict[str, Any]:
    """4 batches a process and epoch, of which embedding begins with the fifth."""
    kind = steady(kind)
    module, twin, plain = make(kind), make(with_term(kind, 4)), make(kind)
    with recorded_draws() as draws:
        train(module, [callback(start=1 / 3, batchnorm="running")], **flags)
    twin.plan = draws
    train(twin, [], **flags)
    train(plain, [], **flags)
    return {
        "from twin": differences(module, twin),
        "from plain": differences(module, plain),
        "weights": [float(parameter.double().sum()) for parameter in module.parameters()],
        "draws": [float(draw["groups"]["watermark"].double().sum()) for draw in draws],
    }


if __name__ == "__main__":
    results = {
        "BYOL": against_twin(BYOL),
        "bf16": against_twin(SimCLR, precision="bf16-mixed", accumulate_grad_batches=2),
    }
    (Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
