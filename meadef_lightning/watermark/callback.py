"""The callback that embeds a watermark into any LightningModule while somebody else's training goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from meadef_lightning.watermark.balancing import Balancing, check_gradients
from meadef_lightning.watermark.batches import Key
from meadef_lightning.watermark.batchnorm import BatchNormFreezer, BatchNormMode
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.measuring import Measuring, place, refusing
from meadef_lightning.watermark.objective import WatermarkObjective, gather_states, restore_state
from meadef_lightning.watermark.pool import SourcePool
from meadef_lightning.watermark.schedule import Schedule
from meadef_lightning.watermark.wrapping import MethodWrapper, visible_signature


class WatermarkCallback(Measuring):
    """Embeds a key while an unmodified LightningModule trains: ``Trainer(callbacks=[WatermarkCallback(key)])``.

    The module's ``training_step`` is wrapped for the duration of ``fit``: the wrapper runs it, forwards a few combined samples
    through the module inside the same autocast, DDP and accumulation context, and adds the weighted terms to the loss that
    the step returned. Samples of the two source classes are collected from the batches as the loader yields them. Nothing
    is registered on the module, so its checkpoints load without this package. The learning-rate and the batch-size finder
    see the terms in every step, whatever the schedule.

    It logs ``watermark/{loss,ver,com,eva,tilt}`` in training and ``watermark/{wsr,wfpr}`` on validation data (first loader). Several keys go
    into one model by as many callbacks, each under a name of its own (:meth:`named`).

    Args:
        key: The key, or the path of its file.
        start: Share of the training (in ``[0, 1)``) after which embedding starts. Clean training first and a short phase with
            the watermark last costs the task least; earlier than the default, there are fewer false positives and class labels carry
            less; 0 suits the fine-tuning of a model that is already trained.
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
            smoothing (0.1 measured; without it Fashion-MNIST pays 1.6 points instead of 1.1); without smoothing take 0.25.
        tilt_from: Share of each source class's samples, those of least influence, that are left as they are, in ``[0, 0.99)``. Less
            than the default helps where a thief has few images: on digits 0.3 carries hard labels.
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
    needed = "the key's source classes"

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
        tilt: float = 0.5,
        tilt_from: float = 0.5,
        buffer_size: int = 128,
        pool: SourcePool | None = None,
        input_key: Key = 0,
        target_key: Key = 1,
        output_key: Key | None = None,
        manual_optimization: bool = False,
    ) -> None:
        key = key if isinstance(key, WatermarkKey) else WatermarkKey.load(key)
        super().__init__(key, input_key, target_key, output_key, buffer_size)
        self.schedule = Schedule(start, stop, every_n_steps)
        self.manual_optimization = manual_optimization
        self._options: dict[str, Any] = {
            "samples": samples,
            "balancing": balancing,
            "temperature": temperature,
            "detach_sources": detach_sources,
            "batchnorm": batchnorm,
            "tilt": tilt,
            "tilt_from": tilt_from,
            "buffer_size": buffer_size,
            "pool": pool,
        }
        self.objective = self._objective()
        self._trainer: Trainer | None = None
        self._world_size = 1
        self._wrapper = MethodWrapper()
        self._batchnorm = BatchNormFreezer()
        self._restored: Mapping[str, Any] | None = None
        self._due = self._ready = self._waiting = False

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the Trainer out of copies."""
        return {**self.__dict__, "_trainer": None}

    def _objective(self, rank: int = 0) -> WatermarkObjective:
        return WatermarkObjective(self.key, **self._options, rank=rank)

    # ---- life of the wrapper

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the set-up and wraps ``training_step``, early enough for the learning-rate finder to see the term."""
        self._world_size = trainer.world_size
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
        self._batchnorm = BatchNormFreezer()
        self._due = self._ready = self._waiting = self._told = False
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
        self._batchnorm.unfreeze()
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
                # until the batch is done: backward passes, and what they recompute, included
                self._batchnorm.freeze(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gives BatchNorm layers their mode back, so that nobody else finds the module changed."""
        self._batchnorm.unfreeze()

    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any, embed: bool = True) -> None:
        self._due = False
        with torch.no_grad():
            if self.objective.pool.fixed:
                place(self.objective.pool, module)
            else:
                with refusing("this batch"):
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
                with refusing("this key on these samples"):
                    self.objective.refresh(module, lambda x: self._forward(module, x))
                    self.objective.draw()
                self._due = True

    def _total(self, module: LightningModule, task_loss: Tensor) -> Tensor:
        with refusing(f"this module; its forward must map samples to {self.answers}"):
            terms = self.objective.terms(module, lambda x: self._forward(module, x))
        total = self.objective.total(module, task_loss, terms)
        logged = {"loss": total - task_loss, **terms}
        module.log_dict(
            {f"{self.name}/{name}": value.detach() for name, value in logged.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=self.objective.samples,
        )
        return total

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to go on if an epoch in which the watermark was due brought no sample of a class that it needs."""
        self._batchnorm.unfreeze()  # a batch that the module skips, and the epoch with it, has no end
        if self._waiting:
            message = (
                f"The watermark was due in this epoch, but the batches held no sample of at least one of {self.needed}, so nothing could "
                "be embedded. Check that the training data has all classes the key was drawn for (and "
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

    # ---- resuming

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns every process's objective state; Lightning calls this on all of them."""
        return gather_states(self.objective, self._world_size)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the processes know their ranks."""
        self._restored = state_dict
