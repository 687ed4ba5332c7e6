"""The only door to a victim: policies decide what an answer gives away, a ledger counts and pays for it.

The victim lies in this process (`Oracle`) or behind a URL (`HTTPOracle`); `meadef serve` puts it there.
"""

from meadef_lightning.oracle.base import BlackBox
from meadef_lightning.oracle.http import HTTPOracle, ServedModel
from meadef_lightning.oracle.ledger import BudgetExceededError, QueryLedger, Totals, row_digests
from meadef_lightning.oracle.oracle import Oracle
from meadef_lightning.oracle.policies import (
    AnswerKind,
    Compose,
    Features,
    HardLabel,
    Policy,
    Rounded,
    Soft,
    Temperature,
    TopK,
)
from meadef_lightning.oracle.storage import LedgerError
from meadef_lightning.oracle.transport import OracleHTTPError, ServerBudgetExceededError

__all__ = [
    "AnswerKind",
    "BlackBox",
    "BudgetExceededError",
    "Compose",
    "Features",
    "HTTPOracle",
    "HardLabel",
    "LedgerError",
    "Oracle",
    "OracleHTTPError",
    "Policy",
    "QueryLedger",
    "Rounded",
    "ServedModel",
    "ServerBudgetExceededError",
    "Soft",
    "Temperature",
    "TopK",
    "Totals",
    "row_digests",
]
