"""The watermark for people who write their own ``training_step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from meadef_lightning.watermark.balancing import check_gradients
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.objective import WatermarkObjective, gather_states, restore_state

_STATE = "meadef_watermark"


class WatermarkLossMixin(LightningModule):
    """Gives a LightningModule the same loss terms, from the same functions, that the callback adds from outside.

    Use it where the callback cannot know which loss to add to (several optimisers, GANs), or where the terms are wanted one
    by one. Call :meth:`configure_watermark` in ``__init__`` and :meth:`watermark_loss` in ``training_step``. Do not use the callback
    beside it, or the watermark is embedded twice. The key is a secret: keep it out of ``save_hyperparameters``, which writes into
    checkpoints and loggers.

    The callback's defaults are not all the mixin's, which has no schedule: give ``tilt=0.5`` for the recommended recipe, and once the model
    is trained keep BatchNorm as it is during the whole step (``with frozen_batchnorm(self):`` around both forwards, from
    :mod:`meadef_lightning.watermark.batchnorm`).

    Example::

        class MyModule(WatermarkLossMixin):
            def __init__(self, key):
                super().__init__()
                self.save_hyperparameters(ignore="key")
                self.net = ...
                self.configure_watermark(key, samples=16)

            def training_step(self, batch, batch_idx):
                x, y = batch
                loss = F.cross_entropy(self(x), y)
                return self.watermark.total(self, loss, self.watermark_loss(x, y))
    """

    watermark: WatermarkObjective
    _watermark_ready = False
    _watermark_batch = -1
    _watermark_restored: dict[str, Any] | None = None

    def configure_watermark(self, key: WatermarkKey, **options: Any) -> None:
        """Prepares the objective.

        Args:
            key: The key to embed.
            **options: Arguments of :class:`~meadef_lightning.watermark.objective.WatermarkObjective`.
        """
        self._watermark_options = {"key": key, **options}
        self.watermark = WatermarkObjective(**self._watermark_options)

    def on_train_start(self) -> None:
        """Gives every process its own random numbers, and an interrupted run its state back.

        Raises:
            MisconfigurationException: If the balancing cannot take its gradients under this strategy or compilation.
        """
        super().on_train_start()
        check_gradients(self.watermark.balancing, self.trainer.strategy, self)
        self.watermark = WatermarkObjective(**self._watermark_options, rank=self.global_rank)
        self._watermark_ready, self._watermark_batch = False, -1
        if self._watermark_restored is not None:
            restore_state(self.watermark, self._watermark_restored, self.global_rank, self.trainer.world_size)
            self._watermark_restored = None

    def watermark_loss(
        self, x: Tensor, y: Tensor, forward: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Collects the batch's source samples and returns the terms of newly drawn combinations.

        They are drawn once a batch: an optimiser that evaluates a step several times (LBFGS) sees one function.

        Args:
            x: Samples, shape ``(B, C, *spatial)``, in the model's input space.
            y: Labels, int64, shape ``(B,)``.
            forward: Maps samples to logits of shape ``(B, K)``; the module itself if not given.

        Returns:
            ``{"ver": …, "com": …, "eva": …}``, scalars, terms of weight 0 left out; empty until both source classes have been
            seen on every process. ``self.watermark.total(self, loss, terms)`` weighs and adds them.

        Raises:
            ValueError: If batch or output do not have the needed form.
        """
        batch = self.trainer.fit_loop.total_batch_idx
        if batch != self._watermark_batch:
            self._watermark_batch = batch
            self.watermark.pool.to(x.device, x.dtype)
            self.watermark.observe(x, y)
            if not self._watermark_ready:
                decide = self.trainer.strategy.reduce_boolean_decision
                self._watermark_ready = decide(self.watermark.ready, all=True)
            if self._watermark_ready:
                self.watermark.refresh(self, forward or self)
                self.watermark.draw()
        return self.watermark.terms(self, forward or self) if self._watermark_ready else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the objective's state to full checkpoints."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = gather_states(self.watermark, self.trainer.world_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the objective's state until the processes know their ranks."""
        super().on_load_checkpoint(checkpoint)
        self._watermark_restored = checkpoint.get(_STATE)
