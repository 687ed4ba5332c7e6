"""The only door to a victim: policies decide what an answer gives away, a ledger counts and pays for it."""

from meadef_lightning.oracle.ledger import BudgetExceededError, QueryLedger, Totals, row_digests
from meadef_lightning.oracle.oracle import Oracle
from meadef_lightning.oracle.policies import (
    AnswerKind,
    Compose,
    HardLabel,
    Policy,
    Rounded,
    Soft,
    Temperature,
    TopK,
)
from meadef_lightning.oracle.storage import LedgerError

__all__ = [
    "AnswerKind",
    "BudgetExceededError",
    "Compose",
    "HardLabel",
    "LedgerError",
    "Oracle",
    "Policy",
    "QueryLedger",
    "Rounded",
    "Soft",
    "Temperature",
    "TopK",
    "Totals",
    "row_digests",
]
