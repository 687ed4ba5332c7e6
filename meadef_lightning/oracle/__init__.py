"""The only door to a victim: policies decide what an answer gives away, a ledger counts and pays for it.

``Oracle(victim, TopK(3), QueryLedger(path, budget=10_000)).query(x)`` is all that an attack sees. The victim lies in this process
(`meadef_lightning.oracle.oracle`), behind ``meadef serve`` (`meadef_lightning.oracle.server`, asked by `meadef_lightning.oracle.http`), or
behind somebody else's service, whose JSON a YAML describes (`meadef_lightning.oracle.mapping`). What is given away is one of
`meadef_lightning.oracle.policies`; what was paid for lies in `meadef_lightning.oracle.ledger`, survives a crash, and is never paid for twice.
"""

from meadef_lightning.oracle.base import BlackBox
from meadef_lightning.oracle.http import HTTPOracle, ServedModel
from meadef_lightning.oracle.input_space import InputSpace, ToInputSpace
from meadef_lightning.oracle.ledger import BudgetExceededError, QueryLedger, Totals, row_digests
from meadef_lightning.oracle.mapped_http import MappedHTTPOracle
from meadef_lightning.oracle.mapping import HTTPMapping
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
    "HTTPMapping",
    "HTTPOracle",
    "HardLabel",
    "InputSpace",
    "LedgerError",
    "MappedHTTPOracle",
    "Oracle",
    "OracleHTTPError",
    "Policy",
    "QueryLedger",
    "Rounded",
    "ServedModel",
    "ServerBudgetExceededError",
    "Soft",
    "Temperature",
    "ToInputSpace",
    "TopK",
    "Totals",
    "row_digests",
]
