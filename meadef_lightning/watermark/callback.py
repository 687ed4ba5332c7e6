"""The callback that embeds a watermark into any LightningModule while somebody else's training goes on."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from meadef_lightning.watermark.balancing import Balancing
from meadef_lightning.watermark.batches import Key, pick
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.objective import WatermarkObjective, combine_in_turn, gather_states, restore_state
from meadef_lightning.watermark.pool import SourcePool

_MISSING = object()


class WatermarkCallback(Callback):
    """Embeds a key while an unmodified LightningModule trains: ``Trainer(callbacks=[WatermarkCallback(key)])``.

    The module's ``training_step`` is wrapped for the duration of ``fit``: the wrapper runs it, forwards a few combined samples
    through the module inside the same autocast, DDP and accumulation context, and adds the weighted terms to the loss that
    the step returned. Samples of the two source classes are collected from the batches as the loader yields them. Nothing
    is registered on the module, so its checkpoints load without this package.

    It logs ``watermark/{loss,ver,com,eva}`` in training and ``watermark/{wsr,wfpr}`` on validation data (first loader).

    Args:
        key: The key, or the path of its file.
        start: Share of the training (in ``[0, 1)``) after which embedding starts. Clean training first and a short phase with
            the watermark last costs the task least; 0 suits the fine-tuning of a model that is already trained.
        stop: Share of the training (in ``(start, 1]``) at which embedding stops.
        every_n_steps: Embed on every n-th batch only.
        samples: Watermark samples per step; see :class:`~meadef_lightning.watermark.objective.WatermarkObjective`, also for
            ``balancing``, ``temperature``, ``detach_sources``, ``freeze_batchnorm``, ``buffer_size`` and ``pool``.
        balancing: How the terms are weighed.
        temperature: Temperature of ``L_com``.
        detach_sources: Whether ``L_com`` moves only the outputs on watermark samples.
        freeze_batchnorm: Whether BatchNorm uses its running statistics on the extra samples.
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

    def __init__(
        self,
        key: WatermarkKey | str,
        start: float = 0.5,
        stop: float = 1.0,
        every_n_steps: int = 1,
        samples: int = 16,
        balancing: Balancing | None = None,
        temperature: float = 1.0,
        detach_sources: bool = True,
        freeze_batchnorm: bool = True,
        buffer_size: int = 128,
        pool: SourcePool | None = None,
        input_key: Key = 0,
        target_key: Key = 1,
        output_key: Key | None = None,
        manual_optimization: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= start < stop <= 1:
            raise MisconfigurationException(
                f"start={start} and stop={stop} are shares of the training and must satisfy 0 <= start < stop <= 1."
            )
        if every_n_steps < 1:
            raise MisconfigurationException(f"every_n_steps={every_n_steps} must be at least 1.")
        self.key = key if isinstance(key, WatermarkKey) else WatermarkKey.load(key)
        self.start, self.stop, self.every_n_steps = start, stop, every_n_steps
        self.input_key, self.target_key, self.output_key = input_key, target_key, output_key
        self.manual_optimization = manual_optimization
        self._options: dict[str, Any] = {
            "samples": samples,
            "balancing": balancing,
            "temperature": temperature,
            "detach_sources": detach_sources,
            "freeze_batchnorm": freeze_batchnorm,
            "buffer_size": buffer_size,
            "pool": pool,
        }
        self.objective = WatermarkObjective(self.key, **self._options)
        self._validation_pool = SourcePool(self.key.source_classes, buffer_size)
        self._patched: tuple[LightningModule, str, Any] | None = None
        self._restored: Mapping[str, Any] | None = None
        self._due = self._ready = self._overdue = False

    # ---- life of the wrapper

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the set-up and wraps ``training_step``, early enough for the learning-rate finder to see the term."""
        if stage != "fit":
            return
        if self.start > 0 and trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            raise MisconfigurationException(
                f"start={self.start} is a share of the training, but this Trainer has no end. Set max_epochs or max_steps, or start=0."
            )
        if not pl_module.automatic_optimization and not self.manual_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimises manually, so its training_step returns no loss to add to. Use "
                "WatermarkCallback(..., manual_optimization=True) to add the watermark to the first manual_backward of each "
                "batch, or add it yourself with WatermarkLossMixin."
            )
        if self.objective.balancing.needs_gradients and isinstance(
            trainer.strategy, (FSDPStrategy, ModelParallelStrategy)
        ):
            raise MisconfigurationException(
                f"{type(self.objective.balancing).__name__} needs whole gradients, which {type(trainer.strategy).__name__} shards. "
                "Use balancing=Fixed(...) with this strategy."
            )
        self.objective = WatermarkObjective(self.key, **self._options, rank=trainer.global_rank)
        self._due = self._ready = self._overdue = False
        self._wrap(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the state of an interrupted run, and wraps again if the module replaced its step in ``setup``."""
        self._wrap(pl_module)
        if self._restored is not None:
            restore_state(self.objective, self._restored, trainer.global_rank, trainer.world_size)
            self._restored = None

    def _wrap(self, pl_module: LightningModule) -> None:
        name = "training_step" if pl_module.automatic_optimization else "manual_backward"
        current = getattr(pl_module, name)
        if getattr(current, "_watermarked_by", None) is self:
            return
        self._unwrap()
        previous = pl_module.__dict__.get(name, _MISSING)
        original = inspect.unwrap(current)
        if name == "training_step" and "dataloader_iter" in inspect.signature(original).parameters:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.training_step takes a dataloader_iter, so no callback sees its batches. "
                "Take the batch instead, or add the watermark with WatermarkLossMixin."
            )
        make = self._wrapped_step if name == "training_step" else self._wrapped_backward
        # a bound method, not a closure: it follows the module through deepcopy, and pickles as the plain method
        wrapper = make(
            current if previous is not _MISSING else getattr(original, "__func__", original), previous is _MISSING
        )
        wrapper.__wrapped__ = getattr(original, "__func__", original)  # Lightning reads the signature from here
        wrapper._watermarked_by = self
        setattr(pl_module, name, types.MethodType(wrapper, pl_module))
        self._patched = (pl_module, name, previous)

    def _unwrap(self) -> None:
        if self._patched is None:
            return
        pl_module, name, previous = self._patched
        self._patched = None
        if getattr(pl_module.__dict__.get(name), "_watermarked_by", None) is not self:
            return  # somebody wrapped again or restored it; nothing of ours to take away
        if previous is _MISSING:
            delattr(pl_module, name)
        else:
            setattr(pl_module, name, previous)

    def _wrapped_step(self, step: Callable[..., Any], unbound: bool) -> Any:
        def training_step(module: LightningModule, *args: Any, **kwargs: Any) -> Any:
            output = step(module, *args, **kwargs) if unbound else step(*args, **kwargs)
            if output is None or not self._due:
                return output
            if isinstance(output, Mapping):
                if "loss" not in output:
                    raise MisconfigurationException(
                        f"training_step returned a mapping without 'loss', only {list(output)}; the watermark has nothing to add to."
                    )
                return {**output, "loss": self._total(module, output["loss"])}
            return self._total(module, output)

        return training_step

    def _wrapped_backward(self, backward: Callable[..., Any], unbound: bool) -> Any:
        def manual_backward(module: LightningModule, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._due:
                self._due = False  # once a batch
                loss = self._total(module, loss)
            return backward(module, loss, *args, **kwargs) if unbound else backward(loss, *args, **kwargs)

        return manual_backward

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
        progress = self._progress(trainer, batch_idx)
        if progress >= self.stop:
            return
        with torch.no_grad():
            if not self.objective.pool.fixed:
                self._observe(batch)
            if progress < self.start:
                return
            self._overdue = True
            if not self._ready:
                # all ranks start together, or sharded strategies would wait for one another
                self._ready = trainer.strategy.reduce_boolean_decision(self.objective.ready, all=True)
            if self._ready and batch_idx % self.every_n_steps == 0:
                self.objective.draw()
                self._due = True

    def _progress(self, trainer: Trainer, batch_idx: int) -> float:
        """Returns the share of the training that lies behind, in ``[0, 1]``."""
        shares = [0.0]
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = trainer.num_training_batches
            inside = batch_idx / batches if 0 < batches < float("inf") else 0.0
            shares.append((trainer.current_epoch + inside) / trainer.max_epochs)
        return max(shares)

    def _observe(self, batch: Any) -> None:
        try:
            self.objective.observe(pick(batch, self.input_key, "input_key"), pick(batch, self.target_key, "target_key"))
        except ValueError as error:
            raise MisconfigurationException(f"The watermark cannot use this batch. {error}") from error

    def _forward(self, module: LightningModule, x: Tensor) -> Tensor:
        logits: Tensor = pick(module(x), self.output_key, "output_key")
        return logits

    def _total(self, module: LightningModule, task_loss: Tensor) -> Tensor:
        try:
            terms = self.objective.terms(module, lambda x: self._forward(module, x))
        except ValueError as error:
            raise MisconfigurationException(f"The watermark cannot use this model's output. {error}") from error
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
        if self._overdue and not self._ready:
            message = (
                "The watermark was due in this epoch, but the batches held no sample of at least one of the key's source classes, so "
                "nothing could be embedded. Check that the training data has all classes the key was drawn for (and "
                "target_key), draw a key for the classes there are, or give a pool of source samples."
            )
            if not getattr(trainer, "fast_dev_run", False) and trainer.num_training_batches > 1:
                raise MisconfigurationException(message)
            rank_zero_warn(message)

    # ---- validation

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last epoch's validation samples."""
        self._validation_pool = SourcePool(self.key.source_classes, self._validation_pool.capacity)

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
        """Collects source samples of the first validation loader."""
        if dataloader_idx == 0 and not trainer.sanity_checking and not self.objective.pool.fixed:
            x, y = pick(batch, self.input_key, "input_key"), pick(batch, self.target_key, "target_key")
            self._validation_pool.update(x, y)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs ``watermark/wsr`` and ``watermark/wfpr`` on combinations of validation samples."""
        pool = self.objective.pool if self.objective.pool.fixed else self._validation_pool
        if trainer.sanity_checking or not trainer.strategy.reduce_boolean_decision(pool.ready, all=True):
            return
        samples = dict(zip(pool.classes, pool.take(pool.capacity), strict=True))
        a, b = (samples[label] for label in self.key.source_classes)
        count = max(len(a), len(b))
        index = torch.arange(count, device=a.device)
        a, b = a[index % len(a)], b[index % len(b)]
        with torch.no_grad():
            groups = [self.key.combiner.build()(a, b)]
            others = [spec.build() for spec in self.key.control_combiners()]
            if others:
                groups.append(combine_in_turn(others, a, b, 0, torch.Generator()))
            answers = self._forward(pl_module, torch.cat(groups)).argmax(-1) == self.key.target_class
        rates = [group.float().mean() for group in torch.split(answers, count)]
        for name, rate in zip(("wsr", "wfpr"), rates, strict=False):
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
