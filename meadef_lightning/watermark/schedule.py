"""When in a training the watermark is embedded."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


@dataclass(frozen=True)
class Schedule:
    """A window of the training, in shares of its length, and a stride.

    Args:
        start: Share of the training in ``[0, 1)`` after which embedding starts.
        stop: Share of the training in ``(start, 1]`` at which it stops.
        every_n_steps: Stride: every n-th batch, counted over the whole training.

    Raises:
        MisconfigurationException: If a value is out of range.
    """

    start: float = 0.5
    stop: float = 1.0
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise MisconfigurationException(
                f"start={self.start} and stop={self.stop} are shares of the training and must satisfy 0 <= start < stop <= 1."
            )
        if self.every_n_steps < 1:
            raise MisconfigurationException(f"every_n_steps={self.every_n_steps} must be at least 1.")

    def check_end(self, trainer: Trainer) -> None:
        """Refuses a training without an end, of which there are no shares.

        Raises:
            MisconfigurationException: If the window is not the whole training, and that has no end.
        """
        if (self.start > 0 or self.stop < 1) and trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            raise MisconfigurationException(
                f"start={self.start} and stop={self.stop} are shares of the training, but this Trainer has no end. Set max_epochs "
                "or max_steps, or start=0 and stop=1."
            )

    def check_length(self, trainer: Trainer) -> None:
        """Refuses a window that begins inside an epoch of unknown length; call it when the data is there.

        Raises:
            MisconfigurationException: If the window begins inside the last epoch, so that it would never be reached.
        """
        epochs = trainer.max_epochs or -1
        if trainer.num_training_batches == float("inf") and trainer.max_steps == -1 and self.start > 1 - 1 / epochs:
            raise MisconfigurationException(
                f"start={self.start} lies inside the last of max_epochs={epochs} epochs, and the training data has no length to "
                "tell when it is reached. Set max_steps, or start the watermark earlier."
            )

    def progress(self, trainer: Trainer, batch_idx: int) -> float:
        """Returns the share of the training that lies behind before this batch, in ``[0, 1]``.

        Where both ``max_steps`` and ``max_epochs`` are set, the one that ends the training first counts. Data without a length
        is taken as standing at the beginning of its epoch.
        """
        shares = [0.0]
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = trainer.num_training_batches
            inside = batch_idx / batches if 0 < batches < float("inf") else 0.0
            shares.append((trainer.current_epoch + inside) / trainer.max_epochs)
        return max(shares)

    def begun(self, trainer: Trainer, batch_idx: int) -> bool:
        """Returns whether the window has opened before this batch."""
        return self.progress(trainer, batch_idx) >= self.start

    def over(self, trainer: Trainer, batch_idx: int) -> bool:
        """Returns whether the window has closed before this batch."""
        return self.progress(trainer, batch_idx) >= self.stop

    def due(self, trainer: Trainer, batch_idx: int) -> bool:
        """Returns whether the watermark is embedded on this batch."""
        turn = trainer.fit_loop.total_batch_idx % self.every_n_steps == 0
        return turn and self.start <= self.progress(trainer, batch_idx) < self.stop
