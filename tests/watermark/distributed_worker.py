"""One of two processes of a distributed training: ``python distributed_worker.py FOLDER``; results go to FOLDER as JSON.

Started by test_callback_distributed.py, as torchrun would. Every scenario runs on both ranks and returns JSON values.
``python distributed_worker.py FOLDER spawned``, alone, is a training that starts its process by itself.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from distributed_training import FOLDER, RANK, against_twin, ddp, digest, fsdp2, part, resume, train
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from user_modules import (
    ALL_TERMS,
    KEY,
    SILENT,
    Images,
    UserModule,
    assert_clean,
    callback,
    make,
    recorded_draws,
    written_term,
)

from meadef_lightning.watermark import MGDA, LastLayerMGDA, SurrogateCallback, WatermarkLossMixin

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {}


def scenario(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


# ---- DDP


@scenario
def plain() -> dict[str, Any]:
    return against_twin(UserModule)


@scenario
def late_start() -> dict[str, Any]:
    return against_twin(UserModule, {"start": 0.5}, steps=range(6, 12))


@scenario
def mixed_precision_with_accumulation() -> dict[str, Any]:
    return against_twin(UserModule, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=0.5)


@scenario
def static_graph() -> dict[str, Any]:
    return against_twin(UserModule, {"start": 0.5}, steps=range(6, 12), strategy=lambda: ddp(static_graph=True))


class TwoHeads(UserModule):
    """Trains a head without labels; the classifier gets gradients from the watermark only."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3 * 8 * 8, 2)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.other(self.body(batch[0]).flatten(1)).square().mean()


@scenario
def a_head_of_the_term_alone() -> dict[str, Any]:
    return against_twin(TwoHeads, {"start": 0.5}, steps=range(6, 12), strategy=lambda: ddp(find_unused_parameters=True))


class Manual(UserModule):
    plan: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        if self.plan is not None:
            draw = self.plan[self.trainer.fit_loop.total_batch_idx]
            loss = loss + written_term(self, self, draw, ALL_TERMS.weights)
        self.manual_backward(loss)
        optimizer.step()


@scenario
def manual_optimisation() -> dict[str, Any]:
    module, twin = make(Manual), make(Manual)
    with recorded_draws() as draws:
        train(module, [callback(manual_optimization=True)])
    twin.plan = dict(enumerate(draws))
    train(twin)
    return {"module": digest(module), "twin": digest(twin), "parameters": digest(module, buffers=False)}


class Alphas(Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(trainer.callbacks[0].objective.balancing.alphas.tolist())


@scenario
def mgda() -> dict[str, Any]:
    results = {}
    for balancing in (MGDA(), LastLayerMGDA(), MGDA(every_n_steps=3)):
        module, alphas = make(UserModule), Alphas()
        train(module, [callback(balancing=balancing), alphas])
        name = f"{type(balancing).__name__}{balancing.every_n_steps}"
        results[name] = {"alphas": alphas.seen, "parameters": digest(module, buffers=False)}
    return results


class Uneven(Dataset):
    """Rank 1 meets class 3 only in the fourth batch."""

    def __init__(self) -> None:
        self.images = Images(size=96)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        x, y = self.images[index]
        late = index % 2 == 1 and index // 2 < 24
        return x, torch.where((y == KEY.source_classes[1]) & torch.tensor(late), KEY.source_classes[0], y)


@scenario
def a_class_that_one_rank_meets_late() -> dict[str, Any]:
    with recorded_draws() as draws:
        trainer = train(make(UserModule), [callback()], data=Uneven(), max_epochs=1)
    return {"draws": len(draws), "batches": int(trainer.num_training_batches)}


class WithoutSources(Uneven):
    def __getitem__(self, index: int) -> Any:
        x, y = self.images[index]
        return x, y.clamp(max=2) if index % 2 == 1 else y


@scenario
def a_class_that_one_rank_never_meets() -> dict[str, Any]:
    module = make(UserModule)
    try:
        train(module, [callback()], data=WithoutSources(), max_epochs=1)
    except MisconfigurationException as error:
        assert_clean(module)
        return {"message": str(error)}
    return {"message": ""}


class Validated(UserModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


@scenario
def validation() -> dict[str, Any]:
    module = make(Validated)
    val = Images(size=40)
    trainer = train(module, [callback()], val=val)
    x, y = val.x[RANK::2], val.y[RANK::2]
    a, b = (x[y == label] for label in KEY.source_classes)
    module.eval()
    with torch.no_grad():
        answers = module(KEY.combiner.build()(a, b)).argmax(1) == KEY.target_class
    return {"logged": float(trainer.callback_metrics["watermark/wsr"]), "own": float(answers.float().mean())}


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))


def watched(kind: type, strategy: Callable[[], Any]) -> dict[str, Any]:
    """A training with a surrogate, and one without; what the surrogate logs is kept by every rank before it is averaged."""
    own: list[float] = []

    class Kept(SurrogateCallback):
        def _measure(self, *args: Any) -> dict[str, Any]:
            measured = super()._measure(*args)
            own.append(float(measured["surrogate_fidelity"]))
            return measured

    alone, module = make(kind), make(kind)
    train(alone, [callback()], strategy(), val=Images(size=40))
    surrogate = Kept(KEY, linear, every_n_epochs=2, batch_size=8)
    trainer = train(module, [callback(), surrogate], strategy(), val=Images(size=40))
    logged = float(trainer.callback_metrics["watermark/surrogate_fidelity"])
    return {"alone": digest(alone), "watched": digest(module), "logged": logged, "own": own[-1], "times": len(own)}


@scenario
def surrogate() -> dict[str, Any]:
    return watched(Validated, ddp)


@scenario
def resumed() -> dict[str, Any]:
    return resume(
        lambda: UserModule(dropout=0.0),
        lambda: [callback(balancing=MGDA(every_n_steps=4), start=0.25, buffer_size=3)],
        ddp,
        "ddp",
    )


# ---- FSDP2


class Sharded(UserModule):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.body, self.head, self):
            fully_shard(layer, mesh=mesh)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


@scenario
def sharded() -> dict[str, Any]:
    return against_twin(Sharded, {"start": 0.5}, steps=range(6, 12), strategy=fsdp2)


@scenario
def sharded_validation() -> dict[str, Any]:
    trainer = train(make(Sharded), [callback()], fsdp2(), val=Images(size=40), max_epochs=1)
    return {"logged": float(trainer.callback_metrics["watermark/wsr"])}


@scenario
def sharded_surrogate() -> dict[str, Any]:
    return watched(Sharded, fsdp2)


class MixedSharded(WatermarkLossMixin, Sharded):
    def __init__(self, balancing: Any = ALL_TERMS) -> None:
        super().__init__(dropout=0.0)
        self.configure_watermark(KEY, samples=4, balancing=balancing)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.watermark.total(self, self.loss(batch), self.watermark_loss(*batch))


def without_batchnorm(module: UserModule) -> UserModule:
    """FSDP2 leaves every rank its own BatchNorm statistics, of which a checkpoint keeps one rank's."""
    module.body[1] = nn.Identity()
    return module


@scenario
def sharded_resumed() -> dict[str, Any]:
    return resume(lambda: without_batchnorm(Sharded(dropout=0.0)), lambda: [callback(start=0.25)], fsdp2, "fsdp2")


@scenario
def sharded_resumed_with_the_mixin() -> dict[str, Any]:
    return resume(lambda: without_batchnorm(MixedSharded()), list, fsdp2, "mixin")


@scenario
def sharded_mgda() -> dict[str, Any]:
    messages = []
    for module, callbacks in ((make(Sharded), [callback(balancing=MGDA())]), (make(MixedSharded, MGDA()), [])):
        try:
            train(module, callbacks, fsdp2())
        except MisconfigurationException as error:
            messages.append(str(error))
            assert_clean(module)
    return {"messages": messages}


def spawned() -> dict[str, Any]:
    """The callback goes to another process as a pickle, through torch's shared memory."""
    module, single = make(UserModule, dropout=0.0), make(UserModule, dropout=0.0)
    for each, strategy in ((module, "ddp_spawn"), (single, "auto")):
        trainer = Trainer(strategy=strategy, devices=1, callbacks=[callback()], max_epochs=1, **SILENT)
        trainer.fit(each, part(Images()))
    assert_clean(module)
    return {
        "spawned": digest(module),
        "single": digest(single),
        "logged": float(trainer.callback_metrics["watermark/ver"]),
    }


def main() -> None:
    scenarios = {"spawned": spawned} if "spawned" in sys.argv else SCENARIOS
    for name, run in scenarios.items():
        try:
            result = run()
        except BaseException:
            result = {"error": traceback.format_exc()}
        (FOLDER / f"{name}.{RANK}.json").write_text(json.dumps(result))
        print(name, result, flush=True)  # noqa: T201
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
