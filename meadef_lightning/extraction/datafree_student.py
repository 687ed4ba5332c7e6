"""The game of the data-free thefts: a generator looks for images on which student and victim disagree, the student agrees."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from meadef_lightning.extraction.datafree import (
    DataFreeDataModule,
    ImageGenerator,
    forward_differences,
    full_precision,
    unit_directions,
)
from meadef_lightning.extraction.pools import pixel_range
from meadef_lightning.extraction.student import Student
from meadef_lightning.modes import evaluation_mode
from meadef_lightning.random_state import kept_random_state
from meadef_lightning.victims.classifier import NetworkFactory

_STATE = "data_free"  # key of the checkpoint


def iteration_seed(seed: int, iteration: int) -> int:
    """Seed of what one iteration draws; hashed, so that neighbouring seeds share no iteration."""
    digest = hashlib.sha256(f"data-free/{seed}/{iteration}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class DataFreeStudent(Student):
    """Base of the data-free students: an attack says what disagreement is, and may train on more than fresh answers.

    Needs a `DataFreeDataModule`. The generator exists while the student is trained and in full checkpoints, which any run goes on
    from; the ``state_dict`` of a checkpoint holds the student alone, so that it loads like any other student's.

    Logged in each iteration: ``train_loss``, the disagreement on the student's last images; ``generator_loss``, minus the
    disagreement on the generator's; ``queries``, paid so far; ``iterations``.

    Args:
        network: The student's architecture; see `Student`.
        num_classes: Number of classes, for a factory; see `Student`.
        in_channels: Number of input channels, for a factory; see `Student`.
        latent: Length of the generator's latent vectors.
        width: Width of the generator.
        directions: Directions of a gradient estimate.
        epsilon: Length of a forward difference.
        generator_steps: Steps of the generator in an iteration.
        student_steps: Steps of the student on fresh images in an iteration.
        lr: Initial learning rate of the student.
        generator_lr: Initial learning rate of the generator.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        num_classes: int | None,
        in_channels: int | None,
        latent: int,
        width: int,
        directions: int,
        epsilon: float,
        generator_steps: int,
        student_steps: int,
        lr: float,
        generator_lr: float,
    ) -> None:
        super().__init__(network, num_classes, in_channels)
        counts = {
            "latent": latent,
            "width": width,
            "directions": directions,
            "generator_steps": generator_steps,
            "student_steps": student_steps,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")
        for name, number in {"epsilon": epsilon, "lr": lr, "generator_lr": generator_lr}.items():
            if not 0 < number < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {number!r}.")
        self.latent, self.width = latent, width
        self.directions, self.epsilon = directions, epsilon
        self.generator_steps, self.student_steps = generator_steps, student_steps
        self.lr, self.generator_lr = lr, generator_lr
        self.automatic_optimization = False
        self.generator: ImageGenerator | None = None
        self.iterations = 0

    @abstractmethod
    def disagreement(self, logits: Tensor, answers: Tensor) -> Tensor:
        """What the student minimises and the generator maximises, ``(B,)``, from logits and answers ``(B, K)``."""

    def queries_per_iteration(self, batch_size: int) -> int:
        """What an iteration costs, ``B · (g · (m + 1) + s)``."""
        return batch_size * (self.generator_steps * (self.directions + 1) + self.student_steps)

    @property
    def source(self) -> DataFreeDataModule:
        """The data module with the oracle.

        Raises:
            MisconfigurationException: If there is none.
        """
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        if not isinstance(data, DataFreeDataModule):
            raise MisconfigurationException(
                f"{type(self).__name__} asks the oracle of a DataFreeDataModule, but is run with {type(data).__name__}. Run "
                "Trainer(...).fit(student, datamodule=DataFreeDataModule(oracle, data))."
            )
        return data

    @override
    def configure_model(self) -> None:
        """Builds the network, and for training the generator."""
        super().configure_model()
        if self.generator is None and self._trainer is not None and self._trainer.state.fn == "fit":
            data = self.source
            self.generator = ImageGenerator(data.image_shape, *pixel_range(data.data), self.latent, self.width)

    def planned_iterations(self) -> int:
        """Iterations for which learning rates are scheduled: those of the epochs, or those the budget pays for.

        Raises:
            MisconfigurationException: If the budget does not cover one.
        """
        budget, cost = self.source.oracle.ledger.budget, self.queries_per_iteration(self.source.batch_size)
        planned = cast("int", self.trainer.max_epochs) * self.source.iterations_per_epoch
        if budget is None:
            return planned
        if budget < cost:
            raise MisconfigurationException(
                f"One iteration costs {cost} queries, and the budget is {budget}. Raise it, or lower batch_size or student_steps."
            )
        return min(planned, budget // cost)

    @override
    def training_step(self, batch: int) -> None:  # type: ignore[override]
        """One iteration, or the end of the training where the budget does not cover it."""
        with kept_random_state(self.device):
            torch.manual_seed(iteration_seed(self.source.seed, self.iterations))
            found = self._train_generator()
            if found is None:
                return self._stop()
            loss = self.train_student()
        for scheduler in cast("list[LRScheduler]", self.lr_schedulers()):
            scheduler.step()
        self.iterations += 1
        values: dict[str, Tensor | float] = {
            "train_loss": loss,
            "generator_loss": -found,
            "queries": float(self.source.queries_spent),
            "iterations": float(self.iterations),
        }
        self.log_dict(cast("Any", values), prog_bar=True, batch_size=self.source.batch_size)
        return None

    def train_student(self) -> Tensor:
        """Trains the student on fresh images; returns its last loss."""
        loss = torch.zeros(())
        for _ in range(self.student_steps):
            with torch.no_grad(), full_precision(self.device):
                generator = self._generator
                x = generator.images(generator(self._latents()))
            loss = self.ask_and_fit(x)
        return loss

    def ask_and_fit(self, x: Tensor) -> Tensor:
        """One step of the student on fresh images; returns its loss."""
        return self.fit_batch(x, self.ask(x))

    def fit_batch(self, x: Tensor, answers: Tensor) -> Tensor:
        """One step of the student on answered images; returns its loss."""
        optimizer = self._optimizers()[0]
        loss = self.disagreement(self(x).float(), answers).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def ask(self, x: Tensor) -> Tensor:
        """The oracle's answers, ``(B, K)``; warns once if they are not whole distributions."""
        answers = self.source.oracle.query(x)
        if self.iterations == 0 and not self._warned:
            sums = answers.sum(dim=1)
            self._warned = bool((answers == 0).any() | ((sums - 1).abs() > 1e-4).any())
            if self._warned:
                rank_zero_warn(
                    f"The answers are truncated or rounded, and {type(self).__name__} learns from approximations of the victim's "
                    "probabilities: differences between neighbouring queries, which teach the generator, may vanish."
                )
        return answers

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the generator apart from the student's weights, and only where training can go on from."""
        weights = checkpoint["state_dict"]
        generator = {name: weights.pop(name) for name in list(weights) if name.startswith("generator.")}
        if "optimizer_states" in checkpoint:
            checkpoint[_STATE] = {"generator": generator, "iterations": self.iterations, **self.extra_state()}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the generator back, if there is one."""
        if self.generator is None:
            return
        own = {f"generator.{name}": value for name, value in self.generator.state_dict().items()}
        state = checkpoint.get(_STATE, {"generator": own, "iterations": 0})
        checkpoint["state_dict"].update(state["generator"])
        self.iterations = state["iterations"]
        self.load_extra_state(state)

    def extra_state(self) -> dict[str, Any]:
        """What else a run needs to go on: tensors and plain values."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes what `extra_state` returned."""

    _warned = False

    @property
    def _generator(self) -> ImageGenerator:
        return cast("ImageGenerator", self.generator)

    def _optimizers(self) -> list[LightningOptimizer]:
        return cast("list[LightningOptimizer]", self.optimizers())

    def _student_parameters(self) -> Iterator[nn.Parameter]:
        return cast("nn.Module", self.network).parameters()

    def _latents(self) -> Tensor:
        return torch.randn(self.source.batch_size, self.latent, device=self.device)

    def _train_generator(self) -> Tensor | None:
        """Moves the generator towards disagreement; returns the last one, or None if the iteration cannot be paid for."""
        source, optimizer = self.source, self._optimizers()[1]
        values = torch.zeros(1, 1)
        for step in range(self.generator_steps):
            with full_precision(self.device):
                x = self._generator(self._latents())
                directions = unit_directions(self.directions, x)
                points = torch.cat([x[None], x + self.epsilon * directions]).detach()
                images = self._generator.images(points).flatten(0, 1)
                if step == 0 and not source.affordable(images, self.queries_per_iteration(source.batch_size)):
                    return None
                values = self._on(images).view(len(points), -1)
            optimizer.zero_grad()
            # the student minimises the mean over the batch, of which each image has its share
            gradient = forward_differences(values, directions, self.epsilon) / len(x)
            self.manual_backward(x, gradient=-gradient)
            optimizer.step()
        return values[0].mean()

    @torch.no_grad()
    def _on(self, images: Tensor) -> Tensor:
        """Disagreement on images. In eval mode: batch statistics would let each image depend on all the moved ones."""
        with evaluation_mode(cast("nn.Module", self.network)):
            return self.disagreement(self(images), self.ask(images))

    def _stop(self) -> None:
        if not self.trainer.should_stop:
            ledger = self.source.oracle.ledger
            rank_zero_info(
                f"The budget of {ledger.budget} queries ends the theft after {self.iterations} iterations: {ledger.remaining} are "
                f"left, and the next iteration costs {self.queries_per_iteration(self.source.batch_size)}."
            )
        self.trainer.should_stop = True
