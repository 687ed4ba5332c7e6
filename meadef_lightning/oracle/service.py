"""What a served oracle does with a request: reads it no further than it may be long, checks it, asks the victim, or refuses.

Needs the packages of the extra ``serve``; `server` says so where they are missing.
"""

import asyncio
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from meadef_lightning.oracle.clients import Client, Clients, ServerLimits
from meadef_lightning.oracle.ledger import BudgetExceededError
from meadef_lightning.oracle.schema import Query
from meadef_lightning.oracle.storage import LedgerError
from meadef_lightning.oracle.wire import message_bytes, pack, unpack

_log = logging.getLogger(__name__)
_UNREAD: Final = frozenset(
    {401, 408, 413, 415, 503}
)  # answered before the body was read: the connection is of no more use


class RefusedError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        code: What programs know it by.
        message: What people read; it tells nothing of the victim.
        wait: Seconds after which the client may try again.
        numbers: What else the answer says.
    """

    def __init__(self, status: int, code: str, message: str, wait: float | None = None, **numbers: int | None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.wait, self.numbers = status, code, message, wait, numbers

    def response(self) -> JSONResponse:
        """The response that says so."""
        headers = {"Connection": "close"} if self.status in _UNREAD else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.wait is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.wait)))
        return JSONResponse(
            {"error": {"code": self.code, "message": self.message, **self.numbers}}, self.status, headers
        )


class Service:
    """The victim's clients, and the one thread that asks it.

    Args:
        clients: Who may ask.
        limits: How much.
        image_shape: Channels, height and width of a query.
        num_classes: Width of the victim's answers.
        value_range: Lowest and highest value in a query, or None.
    """

    def __init__(
        self,
        clients: Clients,
        limits: ServerLimits,
        image_shape: tuple[int, int, int],
        num_classes: int,
        value_range: tuple[float, float] | None,
    ) -> None:
        self.clients, self.limits = clients, limits
        self.image_shape, self.num_classes, self.value_range = image_shape, num_classes, value_range
        self.body_bytes = message_bytes(limits.rows_per_request * math.prod(image_shape), torch.float32)
        self.waiting = 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="oracle")

    def parse(self, body: bytes) -> Tensor:
        """The images in a request's body; raises `RefusedError` where there are none. Runs in any thread."""
        try:
            query = Query.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise RefusedError(422, "bad_query", f"{where}: {first['msg']}") from None
        rows, *shape = query.shape
        if tuple(shape) != self.image_shape or not 1 <= rows <= self.limits.rows_per_request:
            raise RefusedError(
                422,
                "bad_shape",
                f"shape is {query.shape}, expected 1 to {self.limits.rows_per_request} rows of {list(self.image_shape)}.",
            )
        try:
            x = unpack(query.shape, query.data, torch.float32)
        except ValueError as error:
            raise RefusedError(422, "bad_data", str(error)) from None
        low, high = x.aminmax()
        if not (low.isfinite() and high.isfinite()):  # aminmax hands NaN on
            raise RefusedError(422, "not_finite", "The values hold NaN or infinity.")
        if self.value_range is not None and not self.value_range[0] <= low <= high <= self.value_range[1]:
            raise RefusedError(
                422,
                "out_of_range",
                f"The values lie in [{low:.4g}, {high:.4g}], allowed is [{self.value_range[0]:.4g}, {self.value_range[1]:.4g}]: "
                "normalise the images as in the model's training.",
            )
        return x

    def answer(self, client: Client, x: Tensor) -> dict[str, Any]:
        """Ask the victim; raises `RefusedError`. Runs in the one thread, so that a model need not bear several."""
        ledger = client.oracle.ledger
        try:
            answers = client.oracle.query(x)
            spent = ledger.distinct
        except BudgetExceededError as error:
            raise RefusedError(
                402,
                "budget_exceeded",
                f"The budget of {error.budget} distinct inputs does not cover {error.asked} new ones; {error.spent} are spent.",
                budget=error.budget, spent=error.spent, asked=error.asked, remaining=max(0, error.budget - error.spent),
            ) from None  # fmt: skip
        except LedgerError as error:
            _log.error("The ledger of client %s failed: %s", client.name, error)
            raise RefusedError(503, "ledger_unavailable", "The accounts cannot be kept just now.", wait=5) from None
        except Exception as error:  # whatever a model raises must not end the server, nor tell a client about it
            _log.error("The model failed on %d inputs: %s: %s", len(x), type(error).__name__, error)
            _log.debug("Traceback", exc_info=error)
            raise RefusedError(500, "model_failed", "The model could not answer; nothing was spent.") from None
        remaining = None if ledger.budget is None else max(0, ledger.budget - spent)
        kind = client.oracle.labels
        return {"model": client.model, "kind": kind, **pack(answers), "spent": spent, "remaining": remaining}


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The request's body, which is not read further than it may be long, whatever its headers say."""
    too_long = RefusedError(413, "too_large", f"The body is longer than {most} bytes; send fewer rows per request.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > most:
                raise too_long
            body += chunk
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise RefusedError(408, "too_slow", f"The body took longer than {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise RefusedError(400, "disconnected", "The body ended early.") from None


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """The response to an error, with no more than it should tell."""
    if isinstance(error, HTTPException):
        error = RefusedError(error.status_code, "http_error", str(error.detail))
    if not isinstance(error, RefusedError):
        error = RefusedError(500, "internal_error", "The server failed; its log says why.")
    return error.response()
