"""What victims, thieves' networks and encoders share: a network built for the data at hand, and its optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

_ENDLESS = "The one-cycle schedule needs an end: set the trainer's max_epochs or max_steps, or give an lr_scheduler."

NetworkFactory = Callable[[int, int], nn.Module]
"""Makes a network from the numbers of outputs (classes or features) and of input channels."""


def one_cycle_factor(step: int, total: int, warmup: float = 0.2, start: float = 0.04) -> float:
    """Factor on the learning rate: up along a cosine for the first part of the run, then down to 0.

    Smith & Topin, "Super-Convergence" (2018). Steps past the end stay at 0, so that a run can be resumed with more epochs.

    Args:
        step: Optimiser steps taken.
        total: Optimiser steps of the run, at least 1.
        warmup: Part of the run before the peak, below 1.
        start: Factor at step 0.

    Returns:
        A factor from 0 to 1.
    """
    peak = warmup * total
    if step < peak:
        return start + (1 - start) * (1 - math.cos(math.pi * step / peak)) / 2
    return (1 + math.cos(math.pi * min(1.0, (step - peak) / (total - peak)))) / 2


class NetworkModule(LightningModule):
    """Base of classifiers and encoders: builds its network from sizes that the user or the data module names, and its optimiser.

    Subclasses take the sizes as arguments of the same names, so that checkpoints keep them.

    Attributes:
        sizes: The sizes that a factory is called with, in this order; for each the data module's attribute it is read from.
        objects: Arguments, of subclasses too, that checkpoints do not keep: everything that is no plain value.

    Args:
        network: A factory that is called with the sizes, or a module that is ready.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes a scheduler, stepped every epoch, from the optimiser. By default the learning rate makes one cycle
            over the run (:func:`one_cycle_factor`), its peak being the optimiser's.
    """

    sizes: ClassVar[Mapping[str, str]] = {}
    objects: ClassVar[tuple[str, ...]] = ("network", "optimizer", "lr_scheduler", "watermark")

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        # plain values only, of subclasses too: checkpoints load with weights_only, and never hold a watermark's key
        self.save_hyperparameters(ignore=list(self.objects))
        self.network: nn.Module | None = network if isinstance(network, nn.Module) else None
        # never a module: it would be registered, and so saved, a second time
        self._factory: NetworkFactory | None = None if isinstance(network, nn.Module) else network
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler

    @property
    def has_factory(self) -> bool:
        """Whether the network is made by a factory, which can make another one, and was not given ready."""
        return self._factory is not None

    def data_sizes(self) -> dict[str, Any]:
        """Returns the sizes that the Trainer's data module tells, ``None`` for those it does not."""
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        told = {name: getattr(data, source, None) for name, source in self.sizes.items()}
        return {name: size if size is None or isinstance(size, int) else size[0] for name, size in told.items()}

    def build(self, known: Mapping[str, int | None]) -> None:
        """Builds the network where a factory was given; does nothing the second time. Sizes that the user gave go first.

        Args:
            known: Sizes of the data, as far as they are known.

        Raises:
            MisconfigurationException: If a size is not known, or the factory does not take them.
        """
        if self.network is not None or self._factory is None:
            return
        sizes = {name: known.get(name) if self.hparams.get(name) is None else self.hparams[name] for name in self.sizes}
        for name, source in self.sizes.items():
            if sizes[name] is None:
                raise MisconfigurationException(
                    f"The network needs {name}, which was not given, and no data module with {source} is attached. Give "
                    f"{type(self).__name__} {name}=…, or run it with a data module."
                )
        self.hparams.update(sizes)  # so that a checkpoint can be loaded without the data module
        try:
            self.network = self._factory(*(int(size or 0) for size in sizes.values()))
        except TypeError as error:
            raise MisconfigurationException(
                f"The network of this {type(self).__name__} cannot be made ({error}): it was called with the positional arguments "
                f"{' and '.join(f'{name}={size}' for name, size in sizes.items())}. A class_path must name something "
                "that takes these two first; in Python, a module that is ready can be given instead."
            ) from error

    def ready_network(self) -> nn.Module:
        """Returns the network.

        Raises:
            MisconfigurationException: If it was not built yet.
        """
        if self.network is None:
            raise MisconfigurationException(
                f"This {type(self).__name__} has no network yet. Call configure_model() first, or give it a module instead of a factory."
            )
        return self.network

    def shard(self) -> None:
        """Spreads the network's weights over the processes if Lightning's ``ModelParallelStrategy`` (FSDP2) trains, once.

        The network is one unit: gradients and optimiser state are spread, its weights are put together while it computes. FSDP2 leaves
        BatchNorm's statistics to each process, and checkpoints hold rank zero's: with such layers a resumed run is not bit-identical.

        Raises:
            MisconfigurationException: If there are weights besides the network's, which would go apart unseen.
        """
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.ready_network(), FSDPModule):
            return
        besides = [name for name, _ in self.named_parameters() if not name.startswith("network.")]
        if besides:
            raise MisconfigurationException(
                f"FSDP2 spreads the weights of one network, and this {type(self).__name__} has others besides ({', '.join(besides[:3])}). "
                "Use strategy=ddp."
            )
        # FSDP2 cannot spread weights in channels-last memory
        network = self.ready_network().to(memory_format=torch.contiguous_format)
        fully_shard(network, mesh=self.device_mesh["data_parallel"])

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds optimiser and scheduler."""
        optimizer = self._optimizer(self.parameters())
        if self._lr_scheduler is not None:
            scheduler = self._lr_scheduler(optimizer)
            if isinstance(scheduler, ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise MisconfigurationException(_ENDLESS)
        cycle = LambdaLR(optimizer, self._one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def _one_cycle(self, step: int) -> float:
        # The length of the run is asked for after the first step only: asking builds the data loader, and one that is built
        # before a checkpoint is restored starts the interrupted epoch again.
        total = self.trainer.estimated_stepping_batches if step else 1
        if not 1 <= total < math.inf:
            raise MisconfigurationException(_ENDLESS)
        return one_cycle_factor(step, int(total))
