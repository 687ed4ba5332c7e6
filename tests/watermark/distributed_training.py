"""Trainings on two processes, for distributed_worker.py: their strategies, data, and what is compared of them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from user_modules import SILENT, Images, assert_clean, callback, make, recorded_draws, with_term

RANK = int(os.environ.get("RANK", "0"))
FOLDER = Path(sys.argv[1])


def ddp(**kwargs: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **kwargs)


def fsdp2(**kwargs: Any) -> ModelParallelStrategy:
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return ModelParallelStrategy(**sizes, process_group_backend="gloo", timeout=timedelta(seconds=60), **kwargs)


def train(
    module: LightningModule,
    callbacks: Any = (),
    strategy: Any = None,
    data: Dataset | None = None,
    val: Dataset | None = None,
    **flags: Any,
) -> Trainer:
    ckpt_path = flags.pop("ckpt_path", None)
    flags = {**SILENT, "devices": 2, "max_epochs": 4, "use_distributed_sampler": False, **flags}
    trainer = Trainer(strategy=strategy or ddp(), callbacks=list(callbacks), **flags)
    seed_everything(1 + RANK, verbose=False)
    trainer.fit(module, part(data or Images()), None if val is None else part(val), ckpt_path=ckpt_path)
    return trainer


def part(images: Dataset) -> DataLoader:
    """Every second image, in order."""
    return DataLoader(images, 8, sampler=DistributedSampler(images, 2, RANK, shuffle=False))


def digest(module: nn.Module, buffers: bool = True) -> str:
    """SHA-256 of all parameters and of the buffers, which are this rank's."""
    total = hashlib.sha256()
    for tensor in (module.state_dict() if buffers else dict(module.named_parameters())).values():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(whole.detach().double().numpy().tobytes())
    return total.hexdigest()


def against_twin(
    kind: type,
    options: dict[str, Any] | None = None,
    steps: Any = None,
    strategy: Callable[[], Any] = ddp,
    **flags: Any,
) -> dict[str, Any]:
    module, twin, plain = make(kind), make(with_term(kind)), make(kind)
    with recorded_draws() as draws:
        train(module, [callback(**(options or {}))], strategy(), **flags)
    twin.plan = dict(zip(range(len(draws)) if steps is None else steps, draws, strict=True))
    train(twin, [], strategy(), **flags)
    train(plain, [], strategy(), **flags)
    assert_clean(module)
    return {
        "module": digest(module),
        "twin": digest(twin),
        "plain": digest(plain),
        "parameters": digest(module, buffers=False),
        "draws": len(draws),
        "first_draw": float(draws[0]["watermark"].double().sum()),
    }


class Stop(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(FOLDER / f"{self.name}.ckpt")
            trainer.should_stop = True

    def __init__(self, name: str) -> None:
        self.name = name


def resume(
    kind: Callable[[], Any], callbacks: Callable[[], list[Any]], strategy: Callable[[], Any], name: str
) -> dict[str, Any]:
    whole, first, second = (make(kind) for _ in range(3))
    train(whole, callbacks(), strategy())
    train(first, [*callbacks(), Stop(name)], strategy())
    train(second, callbacks(), strategy(), ckpt_path=str(FOLDER / f"{name}.ckpt"))
    return {"whole": digest(whole), "resumed": digest(second), "half": digest(first)}
