"""What attacks and verification see of a victim, wherever it runs: `BlackBox.query`, and what it cost."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from meadef_lightning.oracle.ledger import QueryLedger, row_digests
from meadef_lightning.oracle.policies import AnswerKind


class BlackBox(ABC):
    """Base of the doors to a victim. A subclass says how new rows are answered, everything that is paid for is shared.

    Args:
        ledger: Counts, budget and cache; by default without a limit, in memory. It is tied to one victim and policy.
        batch_size: Most inputs asked at once, and the unit that is paid for and stored as a whole.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(self, ledger: QueryLedger | None = None, batch_size: int = 512) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.ledger = QueryLedger() if ledger is None else ledger
        self.batch_size = batch_size

    @property
    @abstractmethod
    def labels(self) -> AnswerKind:
        """Kind of the answers: ``"soft"``, ``"topk"``, ``"hard"`` or ``"feature"``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A name of victim and policy that is another one as soon as their answers may be."""

    @abstractmethod
    def _answer(self, x: Tensor) -> Tensor:
        """Answer rows that are new to the ledger: float32 ``(n, K)`` or int64 ``(n,)``, checked to be finite."""

    def query(self, x: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
        """Ask the victim.

        Rows that were asked before, here or earlier, are answered from the ledger. The budget is checked for the whole query
        before anything is asked; then each batch is stored as soon as it is answered, so that a query that is interrupted
        continues where it stopped when it is asked again.

        Args:
            x: ``(B, C, H, W)`` floating point, finite, at least one row, in the victim's input space.
            progress: Called after each batch with the number of rows answered, to drive a progress bar.

        Returns:
            On the device of ``x``: ``(B, K)`` float32 probabilities, ``(B, D)`` float32 features, or ``(B,)`` int64 classes for
            hard labels.

        Raises:
            ValueError: If ``x`` has another form, or the victim's answers are not ``(B, K)`` and finite.
            BudgetExceededError: If the budget does not cover the query; nothing of it was forwarded then, unless another process
                spends from the same ledger at the same time.
            LedgerError: If the ledger belongs to another victim or policy, or cannot be used.
        """
        _check_input(x)
        self.ledger.bind(self.fingerprint())
        rows = x.detach().cpu()
        digests = row_digests(rows)
        if self.ledger.budget is not None:
            self.ledger.check(digests)
        answers = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]

            def forward(indices: list[int], batch: Tensor = batch) -> Tensor:
                return self._answer(batch[indices])

            answers.append(self.ledger.settle(digests[start : start + self.batch_size], forward))
            if progress is not None:
                progress(len(batch))
        return torch.cat(answers).to(x.device)


def _check_input(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"A query must be floating point of shape (B, C, H, W) without an empty dimension, got {x.dtype} of shape "
            f"{tuple(x.shape)}. Use x.unsqueeze(0) for one image, and the victim's normalisation instead of bytes."
        )
    broken = len(x) - int(x.isfinite().flatten(1).all(dim=1).sum())
    if broken:
        raise ValueError(f"{broken} of {len(x)} queries hold NaN or infinity. Nothing was asked; remove them first.")
