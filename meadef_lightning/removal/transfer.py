"""Transfer learning: the thief turns the model to another task, with a new head and all layers tuned.

**Source.** MEA-Defender (S&P 2024), §V-E: from CIFAR-10 to STL-10, whose classes are nearly the same; there the victim kept 67.5 % of
its watermark at 77.5 % accuracy on the new task.

**Algorithm.** 1. Copy the model. 2. Give its last linear layer new weights. 3. Take the other task's images (the attacker split of
its data module) and bring them into the model's input space. 4. Minimise cross-entropy over all layers.

**Cost.** ``epochs`` passes over the other task's attacker split.

**Defaults.** The paper leaves epochs and learning rate open; here 20 epochs of Adam with 1e-3 and batches of 64.

**Pitfalls.** The watermark is asked with the *old* task's samples, and its target is a number that means another class now: where the two
tasks share no classes, the old watermark success says little, and a falling one proves no removal. Accuracy on the old task falls
as well; the thief's is :meth:`Transfer.gains`. Each data module normalises with its own mean and standard deviation: unless
undone, the model would meet the same picture in two places of its input space.
"""

from __future__ import annotations

import copy

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.splits import Split
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.removal.base import Observe, Removal, accuracy, train_path
from meadef_lightning.removal.finetuning import Tuner, adam, check_training
from meadef_lightning.removal.layers import last_linear, reset


def renormalise(x: Tensor, data: SplitDataModule, low: Tensor, high: Tensor) -> Tensor:
    """Brings normalised images of one data module into another input space.

    Args:
        x: ``(N, C, H, W)``, normalised by ``data``.
        data: Where they come from.
        low: What black is in the space that is wanted, ``(C, 1, 1)``.
        high: What white is there.

    Returns:
        Images of the same shape.
    """
    mean, std = (x.new_tensor(values)[:, None, None] for values in (data.mean, data.std))
    return low + (x * std + mean) * (high - low)


class Transfer(Removal):
    """Tunes the model for another task; see the module's documentation.

    The path has no accuracy on the old task to keep to, so it is walked to its end.

    Args:
        data: The other task: images of the same shape, and as many classes.
        epochs: Passes over its attacker split.
        batch_size: Images a step.
        optimizer: Makes the optimiser from all parameters.

    Raises:
        ValueError: If a number is out of range; in :meth:`scrub`, if shape or number of classes differ.
    """

    from_scratch = True

    def __init__(
        self, data: SplitDataModule, epochs: int = 20, batch_size: int = 64, optimizer: OptimizerCallable = adam
    ) -> None:
        check_training(epochs, batch_size)
        self.data, self.epochs, self.batch_size, self.optimizer = data, epochs, batch_size, optimizer

    @override
    def scrub(self, model: nn.Module, data: ThiefData, observe: Observe, seed: int = 0) -> None:
        x, y = self._images("attacker", data)
        tuned = copy.deepcopy(model).train().requires_grad_(True)
        reset(last_linear(tuned, x[:2]), seed)
        module = Tuner(tuned, self.optimizer)
        train_path(module, tuned, (x, y), observe, epochs=self.epochs, batch_size=self.batch_size, seed=seed)

    @override
    def gains(self, model: nn.Module, data: ThiefData) -> dict[str, float]:
        """Accuracy on the other task's test split."""
        return {"accuracy on the other task": accuracy(model, *self._images("test", data))}

    def _images(self, split: Split, data: ThiefData) -> tuple[Tensor, Tensor]:
        shape = tuple(data.x.shape[1:])
        if self.data.image_shape != shape or self.data.num_classes != data.num_classes:
            raise ValueError(
                f"The other task has {self.data.num_classes} classes and images of shape {self.data.image_shape}, but the model was made "
                f"for {data.num_classes} classes and {shape}. Give a data module with as many classes and images of this shape: set its "
                "image_size where it has one, or resize the files and load them with ImageFolderDataModule."
            )
        self.data.prepare_data()
        x, y = self.data.tensors(split)
        return renormalise(x, self.data, data.low, data.high), y
