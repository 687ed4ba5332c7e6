"""The callback that embeds a watermark into any LightningModule while somebody else's training goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from meadef_lightning.watermark.balancing import Balancing
from meadef_lightning.watermark.batches import Key, pick
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.objective import (
    BatchNormMode,
    WatermarkObjective,
    check_gradients,
    combine_in_turn,
    gather_states,
    restore_state,
)
from meadef_lightning.watermark.pool import SourcePool
from meadef_lightning.watermark.schedule import Schedule
from meadef_lightning.watermark.wrapping import MethodWrapper, visible_signature


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise MisconfigurationException(f"The watermark cannot use {what}. {error}") from error


class WatermarkCallback(Callback):
    """Embeds a key while an unmodified LightningModule trains: ``Trainer(callbacks=[WatermarkCallback(key)])``.

    The module's ``training_step`` is wrapped for the duration of ``fit``: the wrapper runs it, forwards a few combined samples
    through the module inside the same autocast, DDP and accumulation context, and adds the weighted terms to the loss that
    the step returned. Samples of the two source classes are collected from the batches as the loader yields them. Nothing
    is registered on the module, so its checkpoints load without this package. The learning-rate and the batch-size finder
    see the terms in every step, whatever the schedule.

    It logs ``watermark/{loss,ver,com,eva}`` in training and ``watermark/{wsr,wfpr}`` on validation data (first loader).

    Args:
        key: The key, or the path of its file.
        start: Share of the training (in ``[0, 1)``) after which embedding starts. Clean training first and a short phase with
            the watermark last costs the task least; 0 suits the fine-tuning of a model that is already trained.
        stop: Share of the training (in ``(start, 1]``) at which embedding stops.
        every_n_steps: Embed on every n-th batch only, counted over the whole training.
        samples: Watermark samples per step; see :class:`~meadef_lightning.watermark.objective.WatermarkObjective`, also for
            ``balancing``, ``temperature``, ``detach_sources``, ``batchnorm``, ``buffer_size`` and ``pool``.
        balancing: How the terms are weighed.
        temperature: Temperature of ``L_com``.
        detach_sources: Whether ``L_com`` moves only the outputs on watermark samples.
        batchnorm: What BatchNorm layers do once embedding has started. ``"frozen"``: they keep and use their running statistics, for
            the task's samples too, so that task and watermark are learnt under the very normalisation that the finished model has.
            ``"running"``: for the watermark's samples only, which suits a model that is not trained yet; on Fashion-MNIST
            it cost three times as much accuracy, and less survived a theft. ``"batch"``: batch statistics everywhere, as in
            the reference training; nothing survived.
        tilt: Most probability that natural samples of the source classes give to the target, in ``[0, 1)``: those most that teach
            a thief's network about the watermark (:mod:`meadef_lightning.watermark.tilt`). This is what survives a theft, and
            what costs accuracy; 0 leaves natural answers as they are. The default is meant for a task trained with label
            smoothing (0.1 measured), which makes it several times cheaper; without smoothing take 0.25.
        buffer_size: Source samples kept per class (they go into full checkpoints, so that a run resumes bit for bit;
            publish weights only).
        pool: The owner's own source samples, for training without labels.
        input_key: Where a batch keeps its samples: index, key, attribute name or function.
        target_key: Where a batch keeps its labels.
        output_key: Where the module's output keeps its logits; ``None`` if the output is the logits.
        manual_optimization: For modules with ``automatic_optimization = False``: add the terms to the first
            ``manual_backward`` of every batch. Leave it off for models with several losses of different meaning (GANs).

    Raises:
        MisconfigurationException: At ``setup``, if the schedule, the optimisation mode or the strategy does not allow it, with
            what to do instead; in training, if the batches or outputs do not have the needed form.
    """

    answers = "logits"

    def __init__(
        self,
        key: WatermarkKey | str,
        start: float = 0.65,
        stop: float = 1.0,
        every_n_steps: int = 1,
        samples: int = 8,
        balancing: Balancing | None = None,
        temperature: float = 1.0,
        detach_sources: bool = True,
        batchnorm: BatchNormMode = "frozen",
        tilt: float = 0.6,
        buffer_size: int = 128,
        pool: SourcePool | None = None,
        input_key: Key = 0,
        target_key: Key = 1,
        output_key: Key | None = None,
        manual_optimization: bool = False,
    ) -> None:
        super().__init__()
        self.key = key if isinstance(key, WatermarkKey) else WatermarkKey.load(key)
        self.schedule = Schedule(start, stop, every_n_steps)
        self.input_key, self.target_key, self.output_key = input_key, target_key, output_key
        self.manual_optimization = manual_optimization
        self._options: dict[str, Any] = {
            "samples": samples,
            "balancing": balancing,
            "temperature": temperature,
            "detach_sources": detach_sources,
            "batchnorm": batchnorm,
            "tilt": tilt,
            "buffer_size": buffer_size,
            "pool": pool,
        }
        self.objective = self._objective()
        self._validation_pool = SourcePool(self.key.source_classes, buffer_size)
        self._trainer: Trainer | None = None
        self._wrapper = MethodWrapper()
        self._frozen: list[_BatchNorm] = []
        self._restored: Mapping[str, Any] | None = None
        self._due = self._ready = self._waiting = self._measuring = self._statistics_checked = False

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the Trainer out of copies."""
        return {**self.__dict__, "_trainer": None, "_frozen": []}

    def _objective(self, rank: int = 0) -> WatermarkObjective:
        return WatermarkObjective(self.key, **self._options, rank=rank)

    # ---- life of the wrapper

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the set-up and wraps ``training_step``, early enough for the learning-rate finder to see the term."""
        if stage != "fit":
            return
        self.schedule.check_end(trainer)
        check_gradients(self.objective.balancing, trainer.strategy, pl_module)
        self._begin(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew after a finder, restores an interrupted run, and wraps again if the module replaced its step in ``setup``."""
        self.schedule.check_length(trainer)
        self._begin(trainer, pl_module)
        if self._restored is not None:
            restore_state(self.objective, self._restored, trainer.global_rank, trainer.world_size)
            self._restored = None

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.objective = self._objective(trainer.global_rank)
        self._due = self._ready = self._waiting = self._statistics_checked = False
        self._wrap(pl_module)
        self._trainer = trainer

    def _wrap(self, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization and not self.manual_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimises manually, so its training_step returns no loss to add to. Use "
                "WatermarkCallback(..., manual_optimization=True) to add the watermark to the first manual_backward of each "
                "batch, or add it yourself with WatermarkLossMixin."
            )
        if not pl_module.automatic_optimization:
            self._wrapper.apply(pl_module, "manual_backward", self._around_backward)
            return
        if "dataloader_iter" in inspect.signature(visible_signature(pl_module.training_step)).parameters:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.training_step takes a dataloader_iter, so no callback sees its batches. "
                "Take the batch instead, or add the watermark with WatermarkLossMixin."
            )
        self._wrapper.apply(pl_module, "training_step", self._around_step)

    def _unwrap(self) -> None:
        self._trainer, self._due = None, False
        self._unfreeze()
        self._wrapper.undo()

    def _around_step(self, step: Callable[..., Any], module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        trainer = self._training(module)
        if trainer is not None and self not in getattr(trainer, "callbacks", []):
            self._prepare(trainer, module, args[0])  # a finder has set all callbacks aside
        # due for the outermost wrapper only, should somebody have wrapped between two of ours
        due, self._due = self._due and trainer is not None, False
        try:
            output = step(module, *args, **kwargs)
        finally:
            self._due = due
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not due or not isinstance(loss, Tensor):
            return output  # not now, a skipped batch, or something for Lightning to refuse
        total = self._total(module, loss)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _freeze(self, module: nn.Module) -> None:
        """Takes BatchNorm out of training until the batch is done, backward passes (and what they recompute) included."""
        self._frozen = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training]
        # asked once, since it waits for the device
        if not self._statistics_checked and any(
            layer.num_batches_tracked == 0 for layer in self._frozen if layer.num_batches_tracked is not None
        ):
            raise MisconfigurationException(
                "The watermark keeps BatchNorm's running statistics as they are, but these layers have none yet: the model is not "
                'trained. Start the watermark later (start=0.65), or set batchnorm="running".'
            )
        self._statistics_checked = True
        for layer in self._frozen:
            layer.training = False

    def _unfreeze(self) -> None:
        for layer in self._frozen:
            layer.training = True
        self._frozen = []

    def _around_backward(
        self, backward: Callable[..., Any], module: LightningModule, loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._due and self._training(module) is not None:
            self._due = False  # once a batch
            loss = self._total(module, loss)
        return backward(module, loss, *args, **kwargs)

    def _training(self, module: LightningModule) -> Trainer | None:
        """Returns the Trainer that is training ``module`` now: ``None`` in validation, for a copy, and in somebody else's fit."""
        trainer = self._trainer
        return trainer if trainer is not None and trainer.training and trainer.lightning_module is module else None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the module its own step back."""
        if stage == "fit":
            self._unwrap()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the module its own step back after an error or Ctrl-C, when Lightning calls no ``teardown``."""
        self._unwrap()

    # ---- one step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collects source samples and draws the step's combinations, once a batch however often the step is evaluated."""
        self._due = False
        if not self.schedule.over(trainer, batch_idx):
            self._prepare(trainer, pl_module, batch, embed=self.schedule.due(trainer, batch_idx))
            if self.objective.batchnorm == "frozen" and self.schedule.begun(trainer, batch_idx):
                self._freeze(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gives BatchNorm layers their mode back, so that nobody else finds the module changed."""
        self._unfreeze()

    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any, embed: bool = True) -> None:
        self._due = False
        with torch.no_grad():
            if self.objective.pool.fixed:
                self._place(self.objective.pool, module)
            else:
                with _refusing("this batch"):
                    self.objective.observe(*self._parts(batch))
            if not embed:
                return
            if not self._ready:
                # all ranks start together, or sharded strategies would wait for one another
                self._ready = trainer.strategy.reduce_boolean_decision(self.objective.ready, all=True)
                self._waiting = not self._ready
            if self._ready:
                if not self.objective.ready:
                    raise MisconfigurationException(
                        "The samples changed their shape, and the new one has come without a source class so far. Resize them "
                        "to one shape, or give a pool of source samples."
                    )
                with _refusing("this key on these samples"):
                    self.objective.refresh(module, lambda x: self._forward(module, x))
                    self.objective.draw()
                self._due = True

    def _parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return pick(batch, self.input_key, "input_key"), pick(batch, self.target_key, "target_key")

    def _place(self, pool: SourcePool, module: LightningModule) -> None:
        pool.to(module.device, cast("torch.dtype", module.dtype))

    def _forward(self, module: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = pick(module(x), self.output_key, "output_key")
        return logits

    def _total(self, module: LightningModule, task_loss: Tensor) -> Tensor:
        with _refusing(f"this module; its forward must map samples to {self.answers}"):
            terms = self.objective.terms(module, lambda x: self._forward(module, x))
        total = self.objective.total(module, task_loss, terms)
        logged = {"loss": total - task_loss, **terms}
        module.log_dict(
            {f"watermark/{name}": value.detach() for name, value in logged.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=self.objective.samples,
        )
        return total

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to go on if an epoch in which the watermark was due brought no sample of a source class."""
        if self._waiting:
            message = (
                "The watermark was due in this epoch, but the batches held no sample of at least one of the key's source classes, "
                "so nothing could be embedded. Check that the training data has all classes the key was drawn for (and "
                "target_key), draw a key for the classes there are, or give a pool of source samples."
            )
            if not getattr(trainer, "fast_dev_run", False) and trainer.num_training_batches > 1:
                raise MisconfigurationException(message)
            rank_zero_warn(message)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if the training ended, by early stopping for instance, before the watermark's turn came."""
        if self.objective.steps == 0 and not self._waiting and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"The training ended without a single watermarked step (start={self.schedule.start}, every_n_steps={self.schedule.every_n_steps}): "
                "this model carries no watermark. Train on with start=0, or start earlier."
            )

    # ---- validation

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last epoch's validation samples."""
        self._validation_pool = SourcePool(self.key.source_classes, self._validation_pool.capacity)
        self._measuring = not trainer.sanity_checking and not self.objective.pool.fixed

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects source samples of the first validation loader; a warning, no error, if it has none like the training's."""
        if dataloader_idx > 0 or not self._measuring:
            return
        try:
            x, y = self._parts(batch)
            if batch_idx == 0:
                self.objective.check(x, y)
        except ValueError as error:
            self._measuring = False
            rank_zero_warn(f"watermark/wsr is not measured, since it cannot use the validation batches. {error}")
        else:
            self._validation_pool.update(x, y)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs ``watermark/wsr`` and ``watermark/wfpr`` on combinations of validation samples."""
        pool = self.objective.pool if self.objective.pool.fixed else self._validation_pool
        if trainer.sanity_checking or not trainer.strategy.reduce_boolean_decision(pool.ready, all=True):
            return
        self._place(pool, pl_module)
        samples = dict(zip(pool.classes, pool.take(pool.capacity), strict=True))
        a, b = (samples[label] for label in self.key.source_classes)
        count = max(len(a), len(b))
        index = torch.arange(count, device=a.device)
        a, b = a[index % len(a)], b[index % len(b)]
        groups = [self.key.combiner.build()(a, b)]
        others = [spec.build() for spec in self.key.control_combiners()]
        if others:
            groups.append(combine_in_turn(others, a, b, 0, torch.Generator()))
        model = pl_module if trainer.model is None else trainer.model  # as the strategy wraps it
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            answers = self._forward(model, torch.cat(groups)).argmax(-1) == self.key.target_class
        for name, group in zip(("wsr", "wfpr"), torch.split(answers, count), strict=False):
            rate = group.float().mean()
            pl_module.log(f"watermark/{name}", rate, sync_dist=True, batch_size=count, prog_bar=name == "wsr")

    # ---- resuming

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns every process's objective state; Lightning calls this on all of them."""
        return gather_states(self.objective)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the processes know their ranks."""
        self._restored = state_dict
