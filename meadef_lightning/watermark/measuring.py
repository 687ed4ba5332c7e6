"""What the callbacks measure while a key is embedded: how the model answers combinations of validation samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Self, override

from meadef_lightning.watermark.batches import Key, pick
from meadef_lightning.watermark.combinations import measured_groups
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.objective import WatermarkObjective
from meadef_lightning.watermark.pool import SourcePool


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns errors about samples and keys into misconfigurations, with what they are about."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise MisconfigurationException(f"The watermark cannot use {what}. {error}") from error


def place(pool: SourcePool, module: LightningModule) -> None:
    """Brings a pool to where a module lies, and to its precision."""
    pool.to(module.device, cast("torch.dtype", module.dtype))


class Measuring(Callback):
    """The half of the callbacks that changes nothing: it reads batches and answers, and logs rates in validation.

    Args:
        key: The key.
        input_key: Where a batch keeps its samples.
        target_key: Where a batch keeps its labels.
        output_key: Where the module's output keeps its logits.
        buffer_size: Validation samples kept per class.

    Attributes:
        name: What logged names begin with.
    """

    objective: WatermarkObjective
    name = "watermark"

    def __init__(
        self, key: WatermarkKey, input_key: Key, target_key: Key, output_key: Key | None, buffer_size: int
    ) -> None:
        super().__init__()
        self.key = key
        self.input_key, self.target_key, self.output_key = input_key, target_key, output_key
        self._validation_pool = SourcePool(self._measured_classes, buffer_size)
        self._measuring = self._told = False

    def named(self, name: str) -> Self:
        """Gives the callback a name, and returns it: ``callbacks=[WatermarkCallback(one), WatermarkCallback(other).named("other")]``.

        Args:
            name: What logged names begin with, and checkpoints keep its state under. Of several in one Trainer each needs another one.

        Raises:
            ValueError: If it is empty.
        """
        if not name:
            raise ValueError('The name of a callback must not be empty; the default is "watermark".')
        self.name = name
        return self

    @property
    @override
    def state_key(self) -> str:
        """Where a checkpoint keeps the state: by class and, unless it is the default, by name."""
        return super().state_key if self.name == "watermark" else self._generate_state_key(name=self.name)

    def _parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        return pick(batch, self.input_key, "input_key"), pick(batch, self.target_key, "target_key")

    def _forward(self, module: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = pick(module(x), self.output_key, "output_key")
        return logits

    @property
    def _measured_classes(self) -> tuple[int, ...]:
        """The classes whose samples are combined, or compared with combinations, in validation."""
        return self.key.source_classes

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last epoch's validation samples."""
        self._validation_pool = SourcePool(self._measured_classes, self._validation_pool.capacity)
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
        """Collects samples of the first validation loader; a warning, no error, if it has none like the training's."""
        if dataloader_idx > 0 or not self._measuring:
            return
        try:
            x, y = self._parts(batch)
            if batch_idx == 0:
                self.objective.check(x, y)
        except ValueError as error:
            self._measuring = False
            rank_zero_warn(f"{self.name}/wsr is not measured, since it cannot use the validation batches. {error}")
        else:
            self._validation_pool.update(x, y)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what is measured on combinations of validation samples, or of those of a given pool."""
        pool = self.objective.pool if self.objective.pool.fixed else self._validation_pool
        if trainer.sanity_checking:
            return
        if not trainer.strategy.reduce_boolean_decision(pool.ready, all=True):
            if self._measuring and not self._told:
                self._told = True
                rank_zero_info(
                    f"{self.name}/wsr is not measured: the validation batches hold no sample of at least one of the classes it needs."
                )
            return
        place(pool, pl_module)
        samples = dict(zip(pool.classes, pool.take(pool.capacity), strict=True))
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            with refusing("this key on the validation samples"):
                groups = measured_groups(self.key, *(samples[label] for label in self.key.source_classes))
            measured = self._measure(trainer, pl_module, groups, samples)
        count = len(groups["wsr"])
        for name, value in measured.items():
            pl_module.log(f"{self.name}/{name}", value, sync_dist=True, batch_size=count, prog_bar=name == "wsr")

    def _measure(
        self, trainer: Trainer, module: LightningModule, groups: Mapping[str, Tensor], samples: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Share of each group that is answered with the target class.

        Args:
            trainer: The Trainer.
            module: The module.
            groups: Combinations, by what is measured on them.
            samples: Natural samples by class.
        """
        model = module if trainer.model is None else trainer.model  # as the strategy wraps it
        hits = self._forward(model, torch.cat(list(groups.values()))).argmax(-1) == self.key.target_class
        parts = torch.split(hits, [len(group) for group in groups.values()])
        return {name: part.float().mean() for name, part in zip(groups, parts, strict=True)}
