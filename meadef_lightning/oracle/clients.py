"""Who may ask a served oracle, how much and how fast: API keys, a ledger and a token bucket for each client."""

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import nn

from meadef_lightning.oracle.ledger import QueryLedger
from meadef_lightning.oracle.oracle import Oracle
from meadef_lightning.oracle.policies import Policy
from meadef_lightning.watermark.batches import Key

SHORTEST_KEY: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_KEY: Final = re.compile(rf"[!-+\--~]{{{SHORTEST_KEY},512}}")


@dataclass(frozen=True)
class ServerLimits:
    """What each client of a server may ask.

    Args:
        budget: Most distinct inputs a client may ever ask. No limit if None.
        rows_per_request: Most rows in a request; it also bounds the size of a request's body.
        rows_per_second: Rows a client may ask per second, known ones included. After a pause one full request, or one second's
            worth if that is more, may come at once. No limit if None.
        waiting: Most requests that are read or wait for the model at once, of all clients together; it bounds the memory that
            requests take.
        body_seconds: Longest time that a client may take to send a request's body.

    Raises:
        ValueError: If a limit is out of range.
    """

    budget: int | None = None
    rows_per_request: int = 512
    rows_per_second: float | None = None
    waiting: int = 16
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"budget must be at least 0, got {self.budget}; None means no limit.")
        for name in ("rows_per_request", "waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("rows_per_second", "body_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}.")


class TokenBucket:
    """Lets a number of rows per second through, and more at once after a pause.

    Args:
        rate: Rows per second; everything goes through if None.
        capacity: Rows that may go through at once.
        clock: Seconds that never go back.
    """

    def __init__(self, rate: float | None, capacity: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.capacity = rate, capacity
        self._clock = clock
        self._tokens, self._since = capacity, clock()

    def take(self, rows: int) -> float:
        """Take tokens for some rows, if there are enough.

        Args:
            rows: At most ``capacity``.

        Returns:
            0 if they were taken, else the seconds until there will be enough; nothing is taken then.
        """
        if self.rate is None:
            return 0.0
        now = self._clock()
        self._tokens = min(self.capacity, self._tokens + (now - self._since) * self.rate)
        self._since = now
        if rows <= self._tokens:
            self._tokens -= rows
            return 0.0
        return (rows - self._tokens) / self.rate


class Client:
    """One holder of an API key, whose accounts are kept apart from all others'.

    Args:
        name: Names the ledger's file.
        oracle: The victim, through the client's own ledger.
        bucket: The client's rate limit.
    """

    def __init__(self, name: str, oracle: Oracle, bucket: TokenBucket) -> None:
        self.name, self.oracle, self.bucket = name, oracle, bucket
        oracle.ledger.bind(oracle.fingerprint())  # a ledger of another victim is found out before anything is served
        self.model = oracle.ledger.identity
        """What the client may know of the victim's identity: a random name, which stays as long as victim and ledger do."""


class Clients:
    """All clients of a server.

    Args:
        victim: See `Oracle`, as the next two.
        policy: What is given away.
        output_key: Where the logits are in the victim's output.
        api_keys: API key of each client, by the client's name.
        directory: Folder of the ledgers, ``NAME.sqlite``.
        limits: What each of them may ask.

    Raises:
        ValueError: If there are no keys, or a name or key cannot be used; the message never shows a key.
        LedgerError: If a ledger belongs to another victim or policy, or cannot be used.
    """

    def __init__(
        self,
        victim: nn.Module,
        policy: Policy | None,
        output_key: Key | None,
        api_keys: Mapping[str, str],
        directory: Path,
        limits: ServerLimits,
    ) -> None:
        check_api_keys(api_keys)
        rows = limits.rows_per_request
        self._clients: list[tuple[bytes, Client]] = []
        for name, key in api_keys.items():
            ledger = QueryLedger(directory / f"{name}.sqlite", limits.budget)
            # one request is one batch: it is paid for and stored as a whole, or not at all
            oracle = Oracle(victim, policy, ledger, batch_size=rows, output_key=output_key)
            bucket = TokenBucket(limits.rows_per_second, max(rows, limits.rows_per_second or 0))
            self._clients.append((_digest(key), Client(name, oracle, bucket)))

    def find(self, api_key: str) -> Client | None:
        """The client with this key, in a time that does not depend on how much of the key is right."""
        asked, found = _digest(api_key), None
        for digest, client in self._clients:
            if hmac.compare_digest(digest, asked):
                found = client
        return found

    def close(self) -> None:
        """Close all ledgers."""
        for _, client in self._clients:
            client.oracle.ledger.close()


def check_api_keys(api_keys: Mapping[str, str]) -> None:
    """Check names and keys of clients.

    Raises:
        ValueError: If there are none, or one cannot be used; the message never shows a key.
    """
    if not api_keys:
        raise ValueError("A server needs at least one API key: {name of the client: key}.")
    # by number and not by name, lest a key that stands in the wrong place is shown
    for number, (name, key) in enumerate(api_keys.items(), 1):
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"The name of client number {number} cannot name a ledger: use up to 64 letters, digits, '_', '-' and '.', and "
                "no dot or dash first."
            )
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"The API key of client number {number} must be {SHORTEST_KEY} to 512 visible ASCII characters without a comma. "
                "Make one with python -c 'import secrets; print(secrets.token_urlsafe(32))'."
            )
    if len({name.lower() for name in api_keys}) < len(api_keys) or len(set(api_keys.values())) < len(api_keys):
        raise ValueError(
            "Two clients share a name (upper and lower case count as one) or an API key; give each its own."
        )


def read_api_keys(text: str, source: str) -> dict[str, str]:
    """Read API keys from a file's content or an environment variable.

    Args:
        text: ``NAME:KEY`` pairs, one in a line or separated by commas; ``#`` begins a comment line.
        source: Where the text comes from, for messages.

    Returns:
        API key of each client, by name.

    Raises:
        ValueError: If the text has another form; the message never shows it.
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        for pair in [] if line.lstrip().startswith("#") else line.split(","):
            name, colon, key = (part.strip() for part in pair.partition(":"))
            if not (name or colon):
                continue
            if not (name and key) or name in keys:
                raise ValueError(
                    f"Line {number} of {source} is not of the form NAME:KEY, or repeats a name. Give each client one line."
                )
            keys[name] = key
    try:
        check_api_keys(keys)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
