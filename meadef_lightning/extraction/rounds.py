"""Thefts that learn from the answers what to ask next: rounds of asking and of training an interim student."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meadef_lightning.data.loading import EpochShuffle
from meadef_lightning.extraction.base import ExtractionDataModule, TensorBatches, as_is
from meadef_lightning.extraction.student import Student
from meadef_lightning.quiet import quiet
from meadef_lightning.random_state import kept_random_state


class RoundsDataModule(ExtractionDataModule):
    """Base of the thefts in rounds: :meth:`collect` asks, trains an interim student on all answers so far, and asks again.

    Every interim student has the architecture, loss and optimiser of the student that the Trainer trains in the end, and
    starts from fresh weights; or from those of the module that the user gave, where that was ready and no factory. After each
    round or draw the attack's state is written beside the ledger's file (if it has one), so that an interrupted theft goes on
    from there.
    """

    _chooser: str | None = None  # architecture of the interim students so far; none was trained yet, or none is needed

    @property
    def student(self) -> Student:
        """The student this data module is to train.

        Raises:
            MisconfigurationException: If there is no Trainer, or it trains something else.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, Student):
            raise MisconfigurationException(
                f"{type(self).__name__} trains interim students like the one it is attached to, but there is "
                f"{'no Trainer' if module is None else f'a {type(module).__name__}'}. Run Trainer(...).fit(Student(...), datamodule=...)."
            )
        return module

    def interim(self, x: Tensor, answers: Tensor, epochs: int, seed: int) -> Student:
        """Trains a fresh student on answers.

        Args:
            x: Queries, ``(N, C, H, W)`` on the CPU.
            answers: The victim's answers to them.
            epochs: Passes over them.
            seed: Seed of its weights and of the order.

        Returns:
            The trained student in eval mode, on the Trainer's device.
        """
        outer = cast("Trainer", self.trainer)
        device = outer.strategy.root_device
        rows = TensorBatches(x, answers)
        loader = DataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=EpochShuffle(rows, seed),
            collate_fn=as_is,
            drop_last=len(rows) > self.batch_size,
            generator=torch.Generator(),
        )
        with quiet(), kept_random_state(device):
            torch.manual_seed(seed)
            student = fresh_copy(self.student)
            student.build_network(self.num_classes, self.image_shape[0])
            self._chooser = architecture(student.ready_network())
            trainer = Trainer(
                accelerator=device.type,
                devices=1 if device.index is None else [device.index],
                precision=cast("Any", outer.precision),
                max_epochs=epochs,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
            )
            trainer.fit(student, train_dataloaders=loader)
        return student.to(device, torch.float32).eval()  # whatever precision the Trainer left its weights in

    def round_seed(self, number: int) -> int:
        """A seed for what the attack draws in one round: different for each, the same after a restart, in ``[0, 2³²)``."""
        return zlib.crc32(f"{self.seed}/{number}".encode())

    def save_round(self, state: dict[str, Any]) -> None:
        """Keeps the state of a finished round, atomically, beside the ledger's file; without one nothing is kept.

        Args:
            state: Tensors and numbers; readable with ``weights_only=True``.
        """
        path = self._rounds_file
        if path is not None:
            new = path.with_name(f".{path.name}.new")
            torch.save({**self._origin(), "student": self._chooser, "state": state}, new)
            new.replace(path)

    def load_round(self) -> dict[str, Any] | None:
        """Returns the state of the last finished round of this very attack on this very ledger, or ``None``.

        Raises:
            MisconfigurationException: If interim students of another architecture chose what was asked in it.
        """
        path = self._rounds_file
        if path is None or not path.exists():
            return None
        content = torch.load(path, weights_only=True)
        # versions that called the file otherwise noted no ledger, and such a file may be another ledger's
        if any(content.get(name) != value for name, value in self._origin().items()):
            return None
        self._chooser = content.get("student")
        if self._chooser is not None and self._chooser != self._student_architecture():
            raise MisconfigurationException(
                f"{path} holds rounds whose queries were chosen with students of another architecture than the one that is trained now. "
                f"Go on with that one; or delete {path}, and the rounds begin anew with this one (answers that were paid for stay in "
                f"{self.oracle.ledger.path}); or give QueryLedger another path."
            )
        return cast("dict[str, Any]", content["state"])

    def _student_architecture(self) -> str:
        with kept_random_state():
            student = fresh_copy(self.student)
            student.build_network(self.num_classes, self.image_shape[0])
        return architecture(student.ready_network())

    @property
    def _rounds_file(self) -> Path | None:
        path = self.oracle.ledger.path
        # added to the whole name: in "thief.1" and "thief.2", what follows the dot is no suffix
        return None if path is None else path.with_name(f"{path.name}.rounds.pt")

    def _origin(self) -> dict[str, str]:
        """Whose rounds these are: those of another ledger, victim or attack are not continued."""
        ledger, victim = self.oracle.ledger.identity, self.oracle.fingerprint()
        return {"ledger": ledger, "victim": victim, "attack": self._identity()}

    def _identity(self) -> str:
        """The attack and its plain settings: a state of other settings is not continued."""
        values = sorted((k, v) for k, v in vars(self).items() if isinstance(v, (int, float, str, bool, tuple)))
        return f"{type(self).__qualname__} {self.pool.name} {[item for item in values if not item[0].startswith('_')]}"


def architecture(network: nn.Module) -> str:
    """SHA-256 over the types of a network's modules and the shapes of its parameters and buffers, by name; 64 hexadecimal digits."""
    modules = [f"{name} {type(module).__qualname__}" for name, module in network.named_modules()]
    tensors = [f"{name} {tuple(value.shape)}" for name, value in network.state_dict().items()]
    return hashlib.sha256("\n".join(modules + tensors).encode()).hexdigest()


def fresh_copy(student: Student) -> Student:
    """Copies a student that is attached to a Trainer, without the Trainer and the mesh of its processes.

    A network that a factory made is left out, to be made anew: the student may have been trained before. One that the user gave stays.
    """
    network, student.network = student.network, None if student.has_factory else student.network
    try:
        with _detached(student):
            return deepcopy(student)
    finally:
        student.network = network


@contextmanager
def _detached(student: Student) -> Iterator[None]:
    trainer, student._trainer = student._trainer, None
    mesh, student._device_mesh = student._device_mesh, None
    try:
        yield
    finally:
        student._trainer, student._device_mesh = trainer, mesh
