"""Samples of the source classes, collected from the training stream or given by the owner."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def other_classes() -> ValueError:
    """The error for a checkpoint whose samples are those of another key's classes. It names no class, which would be secret."""
    return ValueError(
        "The checkpoint holds samples of other classes than this key's: it was written while another key was embedded. Resume with "
        "that key's callback; to embed this key into a trained model, load its weights alone, without ckpt_path."
    )


class SourcePool:
    """A ring buffer per class, on the batch's device, filled and read without waiting for the device.

    A batch is written in one indexed copy: every sample gets its slot in its class's ring, and samples of other classes go to
    a spare last slot that is never read. Memory is ``(classes·capacity + 1)`` samples, e.g. 0.8 MB for two classes of
    128 Fashion-MNIST images and 154 MB for 224×224 colour images.

    Args:
        classes: The labels to collect.
        capacity: Slots per class.
    """

    def __init__(self, classes: Sequence[int], capacity: int = 128) -> None:
        if capacity < 1:
            raise ValueError(f"The pool needs at least one slot per class, got capacity={capacity}.")
        self.classes = tuple(classes)
        self.capacity = capacity
        self.fixed = False
        self._samples: Tensor | None = None
        self._written = torch.zeros(len(self.classes), dtype=torch.int64)
        self._seen = 0
        self._ready = False

    @classmethod
    def from_samples(cls, samples: Mapping[int, Tensor]) -> SourcePool:
        """Makes a pool from the owner's own samples; batches then need no labels.

        Args:
            samples: For each class label its samples, shape ``(N, C, *spatial)``, all of one shape and dtype.

        Raises:
            ValueError: If a class has no samples, or shapes or dtypes differ.
        """
        tensors = list(samples.values())
        if any(len(tensor) == 0 for tensor in tensors):
            raise ValueError(
                "A class of the given pool has no samples; give at least one each (a few dozen are sensible)."
            )
        if len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) != 1:
            raise ValueError(
                f"All samples of a pool share one shape and dtype, got {[(tuple(t.shape), t.dtype) for t in tensors]}."
            )
        pool = cls(tuple(samples), capacity=max(len(tensor) for tensor in tensors))
        for label, tensor in samples.items():
            pool.update(tensor, torch.full((len(tensor),), label, device=tensor.device))
        pool.fixed = True
        return pool

    def update(self, x: Tensor, y: Tensor) -> None:
        """Stores the batch's samples of the wanted classes, the oldest giving way.

        Args:
            x: Samples, shape ``(B, C, *spatial)``.
            y: Labels, int64, shape ``(B,)``.
        """
        if self.fixed:
            return
        self._seen += len(x)
        spare = len(self.classes) * self.capacity
        if self._samples is None or self._samples.shape[1:] != x.shape[1:]:
            self._samples = x.new_zeros((spare + 1, *x.shape[1:]))
            self._written.zero_()
            self._seen = len(x)
            self._ready = False
        self._samples = self._samples.to(x.device, x.dtype)
        self._written = self._written.to(x.device)
        slot = torch.full_like(y, spare, dtype=torch.int64)  # labels may come as uint8
        for row, label in enumerate(self.classes):
            mine = y == label
            nth = self._written[row] + mine.cumsum(0) - 1
            # of more samples than slots in one batch only the last ones are written, so that no slot is written twice
            mine &= mine.sum() - mine.cumsum(0) < self.capacity
            slot = torch.where(mine, row * self.capacity + nth % self.capacity, slot)
            self._written[row] += (y == label).sum()
        self._samples[slot] = x.detach()

    @property
    def ready(self) -> bool:
        """Whether every class has a sample; asks the device only until it has."""
        if not self._ready and self._samples is not None:
            self._ready = bool((self._written > 0).all())
        return self._ready

    def share(self, num_classes: int) -> Tensor | float:
        """Returns which share of all samples that came by was of these classes; of given samples, that of balanced classes."""
        if self.fixed or not self._seen:
            return len(self.classes) / num_classes
        return self._written.sum() / self._seen

    def draw(self, count: int, generator: torch.Generator, classes: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """Draws ``count`` samples of each class with replacement.

        Args:
            count: Samples per class.
            generator: A CPU generator, whatever the pool's device, so that a run continues alike on other hardware.
            classes: The classes whose samples are copied; all by default. What is drawn does not depend on it.

        Returns:
            One tensor ``(count, C, *spatial)`` for each of ``classes``, in their order.

        Raises:
            RuntimeError: If the pool is not :attr:`ready`.
        """
        if self._samples is None or not self.ready:
            raise RuntimeError("The pool is still empty for one of its classes; check `ready` before drawing.")
        # a set dtype, since precision "bf16-true" changes the default one inside training_step
        uniform = torch.rand((len(self.classes), count), generator=generator, dtype=torch.float32).to(
            self._samples.device, non_blocking=True
        )
        filled = self._written.clamp(max=self.capacity)[:, None]
        row = torch.arange(len(self.classes), device=filled.device)[:, None] * self.capacity
        index = row + torch.minimum((uniform * filled).long(), filled - 1)
        wanted = self.classes if classes is None else classes
        return tuple(self._samples[index[self.classes.index(label)]] for label in wanted)

    def take(self, count: int) -> tuple[Tensor, ...]:
        """Returns up to ``count`` stored samples of each class, without drawing (waits for the device)."""
        if self._samples is None:
            return ()
        filled = [min(int(n), self.capacity, count) for n in self._written]
        return tuple(self._samples[r * self.capacity : r * self.capacity + n] for r, n in enumerate(filled))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves and casts the stored samples; given samples wait on the CPU until a model asks for them."""
        if self._samples is not None:
            self._samples, self._written = self._samples.to(device, dtype), self._written.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the content as CPU tensors; empty for an unused or a given pool."""
        if self._samples is None or self.fixed:
            return {}
        return {
            "samples": self._samples.to("cpu", copy=True),
            "written": self._written.to("cpu", copy=True),
            "seen": self._seen,
            "classes": self._class_digest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state belongs to a pool of other classes, or of another size.
        """
        if not state or self.fixed:
            return
        if state.get("classes", self._class_digest()) != self._class_digest():  # old checkpoints do not say
            raise other_classes()
        if len(state["samples"]) != len(self.classes) * self.capacity + 1:
            raise ValueError(
                f"The checkpoint's pool does not have {self.capacity} slots for each of {len(self.classes)} classes; "
                "resume with the buffer_size that the run was started with."
            )
        self._samples, self._written = state["samples"].clone(), state["written"].clone()
        self._seen = int(state["seen"])
        self._ready = False

    def _class_digest(self) -> str:
        """SHA-256 over the classes in their order; it hides them from the eye only, as the samples beside it do not."""
        return hashlib.sha256(repr(self.classes).encode()).hexdigest()
