r"""MAZE: data-free model stealing by the divergence between probabilities, with a memory of what was asked.

**Source.** Kariyappa, Prakash & Qureshi, "MAZE: Data-Free Model Stealing Attack Using Zeroth-Order Gradient Estimation"
(CVPR 2021), §4 and Algorithm 1. The variant that knows some images (MAZE-PD) is not included.

**Algorithm.** In each iteration

1. ``generator_steps`` times, the generator takes a step that raises :math:`\mathrm{KL}(v(x) \,\|\, s(x))`, its gradient being
   estimated by forward differences along ``directions`` directions (`datafree`).
2. ``student_steps`` times, the generator makes fresh images, the student takes a step that lowers the divergence on them, and
   images and answers go to a memory.
3. ``replay_steps`` times, the student takes a step on a batch drawn from the memory, which costs no query: it is not to forget
   what the generator has left behind.

**Budget.** ``B · (g · (m + 1) + s)`` queries an iteration with ``batch_size`` B, ``generator_steps`` g, ``directions`` m and
``student_steps`` s: ``16 B`` by default. Training stops by itself where the budget ends, so give it many epochs and a ``budget``;
the paper's is 5 million for FashionMNIST.

**Defaults.** The paper's: ten directions, ε = 1e-3, one generator step to five of the student and ten of replay, learning rates of
0.1 (SGD, momentum 0.9) and 1e-3 along a cosine to 0; its batches hold 128 images (``batch_size`` of the data module). Three choices are
ours: the generator's optimiser is Adam, the student has a weight decay of 5e-4, and the memory is bounded: it holds ``replay_size``
images, at any moment a uniform sample of all that the student was trained on.

**Answers.** Soft ones. Top-k and rounded answers are taken with a warning, renormalised; what they leave out counts as 0. Classes
alone are refused: nothing changes in them along a forward difference.

**Pitfalls.** A memory of everything grows with the budget, to many gigabytes. Asking about a replayed image again would be a
query that a thief is billed for; here its answer is remembered. The memory is part of a full checkpoint, else a resumed run would
be another one. Ten of eleven queries of a generator step are spent on the estimate, and must be counted.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from typing_extensions import override

from meadef_lightning.extraction.datafree_student import DataFreeStudent
from meadef_lightning.victims.classifier import NetworkFactory


def divergence(logits: Tensor, answers: Tensor) -> Tensor:
    """Kullback–Leibler divergence of a student from a victim, ``(B,)``.

    Args:
        logits: ``(B, K)`` of the student.
        answers: ``(B, K)`` probabilities; renormalised, and a row of zeros diverges from nothing.

    Returns:
        ``KL(victim ‖ student)`` of each row.
    """
    victim = answers / answers.sum(dim=1, keepdim=True).clamp_min(torch.finfo(answers.dtype).tiny)
    return (torch.xlogy(victim, victim) - victim * logits.log_softmax(dim=1)).sum(dim=1)


class ReplayMemory:
    """A bounded uniform sample of all rows that were ever added. Draws from torch's global generator.

    Args:
        capacity: Most rows kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self._rows: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, x: Tensor, answers: Tensor) -> None:
        """Adds a batch.

        Once the memory is full, each new row is kept with probability ``capacity / seen`` and takes the place of a random old one:
        afterwards every row ever seen is kept with that probability.

        Args:
            x: ``(B, …)``.
            answers: ``(B, …)``.

        Raises:
            ValueError: If the batch is larger than the memory.
        """
        if len(x) > self.capacity:
            raise ValueError(f"A batch of {len(x)} does not fit a memory of {self.capacity}. Raise replay_size.")
        new = (x.detach().cpu(), answers.detach().cpu())
        start, room = len(self), self.capacity - len(self)
        self.seen += len(x)
        kept = torch.rand(max(0, len(x) - room)) < self.capacity / self.seen
        slots = torch.randperm(self.capacity)[: int(kept.sum())]
        if self._rows is None:
            x, answers = (part.new_empty((self.capacity, *part.shape[1:])) for part in new)
            self._rows = x, answers
        for rows, part in zip(self._rows, new, strict=True):
            rows[start : start + len(part[:room])] = part[:room]
            rows[slots] = part[room:][kept]

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws rows with replacement, ``(count, …)`` each."""
        x, answers = self.rows()
        chosen = torch.randint(len(self), (count,))
        return x[chosen], answers[chosen]

    def rows(self) -> tuple[Tensor, Tensor]:
        """What is kept.

        Raises:
            ValueError: If nothing was added yet.
        """
        if self._rows is None:
            raise ValueError("The memory is empty: add a batch first.")
        x, answers = self._rows
        return x[: len(self)], answers[: len(self)]

    def state_dict(self) -> dict[str, Any]:
        """Rows and count, for a checkpoint."""
        rows = [] if self._rows is None else [part.clone() for part in self.rows()]
        return {"seen": self.seen, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` returned, of a memory of the same capacity."""
        self.seen, self._rows = state["seen"], None
        if state["rows"]:
            x, answers = (part.new_empty((self.capacity, *part.shape[1:])) for part in state["rows"])
            self._rows = x, answers
            for rows, part in zip(self.rows(), state["rows"], strict=True):
                if len(part) != len(rows):
                    raise ValueError(
                        f"The checkpoint's memory holds {len(part)} rows of {self.seen}, which does not fit a capacity of "
                        f"{self.capacity}. Go on with the replay_size of the run that wrote it."
                    )
                rows.copy_(part)


class MAZEStudent(DataFreeStudent):
    """A student that steals without data, with a generator and a memory. Run it with a `DataFreeDataModule`.

    Args:
        network: The student's architecture; see `Student`.
        num_classes: Number of classes, for a factory; see `Student`.
        in_channels: Number of input channels, for a factory; see `Student`.
        latent: Length of the generator's latent vectors.
        width: Width of the generator.
        directions: Directions of a gradient estimate, ``m``.
        epsilon: Length of a forward difference.
        generator_steps: Steps of the generator in an iteration, ``g``.
        student_steps: Steps of the student on fresh images in an iteration, ``s``.
        replay_steps: Steps of the student on remembered images in an iteration; they cost nothing.
        replay_size: Images the memory holds, at least a batch.
        lr: Initial learning rate of the student.
        generator_lr: Initial learning rate of the generator.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        network: NetworkFactory | nn.Module,
        num_classes: int | None = None,
        in_channels: int | None = None,
        latent: int = 256,
        width: int = 64,
        directions: int = 10,
        epsilon: float = 1e-3,
        generator_steps: int = 1,
        student_steps: int = 5,
        replay_steps: int = 10,
        replay_size: int = 8192,
        lr: float = 0.1,
        generator_lr: float = 1e-3,
    ) -> None:
        super().__init__(
            network, num_classes, in_channels, latent, width, directions, epsilon, generator_steps, student_steps, lr,
            generator_lr,
        )  # fmt: skip
        if replay_steps < 0 or replay_size < 1:
            raise ValueError(
                f"replay_steps={replay_steps} must be at least 0, and replay_size={replay_size} at least 1."
            )
        self.replay_steps = replay_steps
        self.memory = ReplayMemory(replay_size)

    @override
    def disagreement(self, logits: Tensor, answers: Tensor) -> Tensor:
        """``KL(victim ‖ student)``, ``(B,)``."""
        return divergence(logits, answers)

    @override
    def ask_and_fit(self, x: Tensor) -> Tensor:
        answers = self.ask(x)
        if self.replay_steps:
            self.memory.add(x, answers)
        return self.fit_batch(x, answers)

    @override
    def train_student(self) -> Tensor:
        """Trains the student on fresh images, then on remembered ones; returns its last loss on fresh ones."""
        loss = super().train_student()
        for _ in range(self.replay_steps):
            x, answers = self.memory.sample(self.source.batch_size)
            self.fit_batch(x.to(self.device), answers.to(self.device))
        return loss

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD for the student, Adam for the generator, a cosine for both."""
        if self.replay_steps and self.memory.capacity < self.source.batch_size:
            raise MisconfigurationException(
                f"replay_size={self.memory.capacity} does not hold a batch of {self.source.batch_size}. Raise it."
            )
        student = torch.optim.SGD(self._student_parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        generator = torch.optim.Adam(self._generator.parameters(), lr=self.generator_lr)
        total = self.planned_iterations()
        return [student, generator], [CosineAnnealingLR(optimizer, total) for optimizer in (student, generator)]

    @override
    def extra_state(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    @override
    def load_extra_state(self, state: dict[str, Any]) -> None:
        if "memory" in state:
            self.memory.load_state_dict(state["memory"])
