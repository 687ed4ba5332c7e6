"""JSON over HTTP with a server that is not trusted: bounded in size and time, patient with what passes, clear about what does not."""

import itertools
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

import urllib3
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import Self, override

from meadef_lightning.oracle.deadline import timed_pool
from meadef_lightning.oracle.ledger import BudgetExceededError

KEY_VARIABLE: Final = "MEADEF_API_KEY"
LONGEST_WAIT: Final = 60.0
"""Most seconds before a request is repeated; a server that asks for more is not waited for."""

_CHUNK: Final = 1 << 16
_MOST_OF_AN_ERROR: Final = 1 << 14
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class OracleHTTPError(ConnectionError):
    """A served oracle cannot be asked, refuses, or answers with something that is no answer. The message says what to do.

    Args:
        message: URL, what happened, remedy.
        status: HTTP status, if there was one.

    Attributes:
        status: See the argument.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerBudgetExceededError(BudgetExceededError):
    """The server's budget for this API key does not cover a batch. Batches before it are paid for, answered and kept.

    Args:
        budget: Distinct inputs allowed.
        spent: Distinct inputs spent so far.
        asked: Distinct inputs of the refused batch that were not paid for yet.
        url: The server.
    """

    def __init__(self, budget: int, spent: int, asked: int, url: str) -> None:
        super().__init__(budget, spent, asked)
        self.url = url

    @override
    def __str__(self) -> str:
        return (
            f"{self.url} (status 402): the server's budget for this API key is {self.budget} distinct inputs: {self.spent} are "
            f"spent, {self.asked} new ones were asked, {max(0, self.budget - self.spent)} are left. What was answered so far is in "
            "the ledger. Ask for fewer inputs, or have the budget raised by whoever serves the model."
        )

    @override
    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.budget, self.spent, self.asked, self.url)


class _PassingError(Exception):
    """A failure that may pass if one waits."""

    def __init__(self, problem: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.status, self.wait = status, wait


class _Secret:
    """A string that shows itself only when it is asked to."""

    def __init__(self, value: str) -> None:
        self.value = value

    @override
    def __repr__(self) -> str:
        return "***"


class Channel:
    """Asks one server for JSON. A subclass says what is sent along, and what is an answer.

    Args:
        url: Address of the server, checked.
        secrets: What messages never show, even if the server repeats it.
        timeout: Seconds to wait for a connection, for the head of an answer, and for its body.
        retries: How often a request is repeated, at most.
        backoff: Seconds before the first repetition; doubled each time, and shortened at random by up to a half.

    Attributes:
        stranger: What to think of an answer that cannot be one.
        remedies: What to do about a status.

    Raises:
        ValueError: If a number is out of range.
    """

    stranger: ClassVar[str] = "This is no such server, or a hostile one."
    remedies: ClassVar[Mapping[int, str]] = {}

    def __init__(self, url: str, secrets: Sequence[str], timeout: float, retries: int, backoff: float) -> None:
        if retries < 0 or not 0 < timeout < float("inf") or not 0 <= backoff < float("inf"):
            raise ValueError(
                f"retries={retries} and backoff={backoff} must not be negative, timeout={timeout} must be positive and finite."
            )
        self.url = url
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._secrets = tuple(_Secret(secret) for secret in secrets)
        self._pool: urllib3.PoolManager | None = None

    def address(self, path: str) -> str:
        """Where a request goes."""
        return f"{self.url}/{path}"

    def method(self, body: bytes | None) -> str:
        """The HTTP method of a request."""
        return "GET" if body is None else "POST"

    def headers(self, body: bytes | None) -> dict[str, str]:
        """What is sent along with a request."""
        return {} if body is None else {"Content-Type": "application/json"}

    def complaint(self, value: Any, kind: str) -> tuple[str, str] | None:
        """What is wrong with an answer, and the remedy; None if nothing is.

        Args:
            value: The answer's JSON; None if it is no JSON.
            kind: The answer's media type.
        """
        if value is not None:
            return None
        return f"the answer ({kind[:60]!r}) is no JSON", "Check the address."

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # connections belong to one process

    def exchange(self, path: str, body: bytes | None, most: int) -> Any:
        """Send a request, again if need be.

        Args:
            path: Where to, below the URL.
            body: What to post; without it, the request is a GET.
            most: Bytes that the answer may have.

        Returns:
            The answer, JSON values.

        Raises:
            OracleHTTPError: If there is no such answer.
            ServerBudgetExceededError: If the server's budget for the API key is spent.
        """
        for attempt in itertools.count():
            try:
                return self.once(path, body, most)
            except _PassingError as error:
                pause = min(LONGEST_WAIT, self.backoff * 2.0**attempt) * random.SystemRandom().uniform(0.5, 1.0)
                wait = max(pause, error.wait)
                if attempt >= self.retries or wait > LONGEST_WAIT:
                    tried = f"tried {attempt + 1} times" if attempt else "tried once"
                    raise self.error(
                        path,
                        f"{error}, {tried}",
                        "Check that the server runs and how much it allows, and run again later: what was answered so far is in "
                        "the ledger.",
                        error.status,
                    ) from error.__cause__
            time.sleep(wait)
        raise RuntimeError("unreachable")

    def error(self, path: str, problem: str, remedy: str, status: int | None = None) -> OracleHTTPError:
        """The error for a request that failed for good."""
        where = self.address(path) + ("" if status is None else f" (status {status})")
        return OracleHTTPError(f"{where}: {problem}. {remedy}", status)

    def once(self, path: str, body: bytes | None, most: int) -> Any:
        """Sends a request, a single time; see :meth:`exchange`."""
        if self._pool is None:
            self._pool = timed_pool(self.timeout)
        try:
            response = self._pool.request(
                self.method(body),
                self.address(path),
                body=body,
                headers={**self.headers(body), "Accept-Encoding": "identity"},
                preload_content=False,
                redirect=False,
            )
            content = self._read(response, most if response.status == 200 else _MOST_OF_AN_ERROR)
        except urllib3.exceptions.SSLError as error:
            raise self.error(
                path, f"no secure connection ({error})", "Check the address; somebody may be listening."
            ) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _PassingError(f"no answer ({type(error).__name__}: {error})") from error
        if response.status != 200:
            raise self._failure(path, response.status, response.headers, _parsed(content))
        if len(content) > most:
            raise self.error(
                path,
                f"the answer is longer than the {most} bytes it may have",
                self.stranger,
            )
        value = _parsed(content)
        complaint = self.complaint(value, response.headers.get("Content-Type", ""))
        if complaint is not None:
            raise self.error(path, *complaint)
        return value

    def _read(self, response: urllib3.BaseHTTPResponse, most: int) -> bytes:
        """At most one chunk more than ``most`` bytes of a body, within the time it may take."""
        content, deadline = bytearray(), time.monotonic() + self.timeout
        complete = False
        try:
            while len(content) <= most:
                chunk = response.read1(_CHUNK, decode_content=False)
                if not chunk:
                    complete = True
                    break
                content += chunk
                if time.monotonic() > deadline:
                    raise _PassingError(f"the answer took longer than {self.timeout:g} seconds", response.status)
        finally:
            if complete:
                response.release_conn()
            else:
                response.close()
        return bytes(content)

    def _failure(self, path: str, status: int, headers: Mapping[str, str], value: Any) -> Exception:
        """The exception for a status other than 200."""
        detail = value.get("error") if isinstance(value, dict) else None
        detail = {"message": detail} if isinstance(detail, str) else detail if isinstance(detail, dict) else {}
        message = str(detail.get("message", ""))
        for secret in self._secrets:
            message = message.replace(secret.value, "***")
        said = (
            "".join(c if c.isprintable() else " " for c in message[:300]).rstrip(".") or "the server does not say why"
        )
        if status == 429 or status >= 500:
            wait = headers.get("Retry-After", "")
            asked = float(wait) if re.fullmatch("[0-9]{1,9}", wait) else 0.0
            if asked > LONGEST_WAIT:
                said = f"{said} (it asks to wait {asked:.0f} seconds)"
            return _PassingError(said, status, asked)
        if status == 402:
            numbers = [detail.get(name) for name in ("budget", "spent", "asked")]
            if all(type(number) is int and number >= 0 for number in numbers):
                return ServerBudgetExceededError(*numbers, url=self.url)  # type: ignore[arg-type, misc]
        remedy = self.remedies.get(status, "Check the address and the queries.")
        if 300 <= status < 400:
            said, remedy = (
                "it redirects, which is not followed, lest the API key goes astray",
                "Give the final address.",
            )
        return self.error(path, said, remedy, status)


class Transport(Channel):
    """Asks one of our servers, with an API key, for JSON objects.

    Args:
        url: Address of the server.
        api_key: API key; the environment variable MEADEF_API_KEY if None.
        timeout: See `Channel`, as the next two.
        retries: See `Channel`.
        backoff: See `Channel`.

    Raises:
        ValueError: If an argument is out of range, or there is no API key that can be sent; the message never shows it.
    """

    stranger = "This is no meadef oracle, or a hostile one."
    remedies: ClassVar = {
        401: f"Check the API key: environment variable {KEY_VARIABLE}, or api_key.",
        403: f"Check the API key: environment variable {KEY_VARIABLE}, or api_key.",
        404: "Check the address: there is no meadef oracle.",
        413: "Lower batch_size.",
    }

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int, backoff: float) -> None:
        api_key = os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key
        super().__init__(checked_url(url).rstrip("/"), [api_key], timeout, retries, backoff)
        if not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError(
                f"{self.url} needs an API key of visible ASCII characters, but it is {'not such' if api_key else 'missing'}. Set the "
                f"environment variable {KEY_VARIABLE}, or give api_key."
            )

    @override
    def headers(self, body: bytes | None) -> dict[str, str]:
        return {**super().headers(body), "Authorization": f"Bearer {self._secrets[0].value}"}

    @override
    def complaint(self, value: Any, kind: str) -> tuple[str, str] | None:
        if isinstance(value, dict) and kind.partition(";")[0].strip().lower() == "application/json":
            return None
        return f"the answer ({kind[:60]!r}) is no JSON object", "Check that the URL is a meadef oracle's."


def _parsed(content: bytes) -> Any:
    """JSON, or None."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def checked_url(url: str) -> str:
    """Check an address; it may hold no secret, since messages show it.

    Args:
        url: ``http[s]://host[:port][/path]``.

    Returns:
        The same.

    Raises:
        ValueError: If it has another form, or holds a user, a password, a query or a fragment; the message does not show it.
    """
    remedy = "It must be http[s]://host[:port][/path], of visible ASCII characters and without user, query or fragment."
    try:
        parts = urlsplit(url)
        plain = not (parts.username is not None or parts.password is not None or parts.query or parts.fragment)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = plain = False
    if not (valid and plain and re.fullmatch(r"[!-~]+", url)):
        raise ValueError(f"The URL of the oracle cannot be used. {remedy}")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        rank_zero_warn(f"{url} is not encrypted: everybody on the way can read the API key and the answers. Use https.")
    return url
