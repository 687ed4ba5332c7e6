"""A victim behind HTTP: the same policies and ledgers as in one process, one account for each API key.

``POST /predict`` asks, ``GET /info`` tells a client what it needs for that, ``GET /health`` is for load balancers, ``/docs`` shows
the schema. `HTTPOracle` is the client. What a client may learn is what the policy gives away: neither weights nor their hash, nor
why a model failed.

A request is one transaction of the client's ledger, which is paid for before it is answered: a server that is killed loses no
answer that it gave, and a question that is repeated costs nothing. Errors are JSON, ``{"error": {"code": ..., "message": ...}}``;
an exhausted budget is 402, which waiting does not help, a client that is too fast gets 429 with ``Retry-After``.
"""

import asyncio
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from torch import Tensor, nn

from meadef_lightning.__about__ import __version__
from meadef_lightning.oracle.clients import Client, Clients, ServerLimits
from meadef_lightning.oracle.ledger import BudgetExceededError
from meadef_lightning.oracle.oracle import Oracle
from meadef_lightning.oracle.policies import Policy
from meadef_lightning.oracle.storage import LedgerError
from meadef_lightning.oracle.wire import message_bytes, pack, unpack
from meadef_lightning.watermark.batches import Key

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from meadef_lightning.oracle.schema import Answers, Failure, Info, Query
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f'Serving an oracle needs {missing.name}: pip install "meadef-lightning[serve]".', name=missing.name
    ) from missing

_log = logging.getLogger(__name__)
_UNREAD: Final = frozenset(
    {401, 408, 413, 415, 503}
)  # answered before the body was read: the connection is of no more use


class _RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str, wait: float | None = None, **numbers: int | None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.wait, self.numbers = status, code, message, wait, numbers

    def response(self) -> JSONResponse:
        headers = {"Connection": "close"} if self.status in _UNREAD else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.wait is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.wait)))
        return JSONResponse(
            {"error": {"code": self.code, "message": self.message, **self.numbers}}, self.status, headers
        )


class _Service:
    """The victim's clients, and the one thread that asks it."""

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
        """The images in a request."""
        try:
            query = Query.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise _RefusedError(422, "bad_query", f"{where}: {first['msg']}") from None
        rows, *shape = query.shape
        if tuple(shape) != self.image_shape or not 1 <= rows <= self.limits.rows_per_request:
            raise _RefusedError(
                422,
                "bad_shape",
                f"shape is {query.shape}, expected 1 to {self.limits.rows_per_request} rows of {list(self.image_shape)}.",
            )
        try:
            x = unpack(query.shape, query.data, torch.float32)
        except ValueError as error:
            raise _RefusedError(422, "bad_data", str(error)) from None
        low, high = x.aminmax()
        if not (low.isfinite() and high.isfinite()):  # aminmax hands NaN on
            raise _RefusedError(422, "not_finite", "The values hold NaN or infinity.")
        if self.value_range is not None and not self.value_range[0] <= low <= high <= self.value_range[1]:
            raise _RefusedError(
                422,
                "out_of_range",
                f"The values lie in [{low:.4g}, {high:.4g}], allowed is [{self.value_range[0]:.4g}, {self.value_range[1]:.4g}]: "
                "normalise the images as in the model's training.",
            )
        return x

    def answer(self, client: Client, x: Tensor) -> dict[str, Any]:
        """Ask the victim. Runs in the one thread, so that a model need not bear several."""
        ledger = client.oracle.ledger
        try:
            answers = client.oracle.query(x)
            spent = ledger.distinct
        except BudgetExceededError as error:
            raise _RefusedError(
                402,
                "budget_exceeded",
                f"The budget of {error.budget} distinct inputs does not cover {error.asked} new ones; {error.spent} are spent.",
                budget=error.budget, spent=error.spent, asked=error.asked, remaining=max(0, error.budget - error.spent),
            ) from None  # fmt: skip
        except LedgerError as error:
            _log.error("The ledger of client %s failed: %s", client.name, error)
            raise _RefusedError(503, "ledger_unavailable", "The accounts cannot be kept just now.", wait=5) from None
        except Exception as error:  # whatever a model raises must not end the server, nor tell a client about it
            _log.error("The model failed on %d inputs: %s: %s", len(x), type(error).__name__, error)
            _log.debug("Traceback", exc_info=error)
            raise _RefusedError(500, "model_failed", "The model could not answer; nothing was spent.") from None
        remaining = None if ledger.budget is None else max(0, ledger.budget - spent)
        kind = client.oracle.labels
        return {"model": client.model, "kind": kind, **pack(answers), "spent": spent, "remaining": remaining}


_router = APIRouter()
_scheme = HTTPBearer(auto_error=False, description="An API key of this server.")
_FAILURES: Final[dict[int | str, dict[str, Any]]] = {
    401: {"model": Failure, "description": "No valid API key."},
    402: {"model": Failure, "description": "The budget is spent; `remaining` says what is left."},
    408: {"model": Failure, "description": "The body came too slowly."},
    413: {"model": Failure, "description": "The body is too large."},
    415: {"model": Failure, "description": "The body is not declared as JSON."},
    422: {"model": Failure, "description": "The query has another form than it must have."},
    429: {"model": Failure, "description": "Too fast: `Retry-After` says how many seconds to wait."},
    500: {"model": Failure, "description": "The model failed; nothing was spent."},
    503: {"model": Failure, "description": "Overloaded: `Retry-After` says how many seconds to wait."},
}


def _client(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_scheme)]) -> Client:
    service: _Service = request.app.state.service
    client = service.clients.find(credentials.credentials) if credentials is not None else None
    if client is None:
        raise _RefusedError(401, "unauthorized", "Send a valid API key: Authorization: Bearer KEY.")
    return client


@_router.get("/health")
async def health() -> dict[str, str]:
    """Tell that the server runs."""
    return {"status": "ok"}


@_router.get("/info", responses={401: _FAILURES[401]})
def info(request: Request, client: Annotated[Client, Depends(_client)]) -> Info:
    """Tell a client what it must know to ask, and what it has left."""
    # not a coroutine: the ledger is locked while a batch is answered, and the server must go on
    service: _Service = request.app.state.service
    ledger = client.oracle.ledger
    spent = ledger.distinct
    return Info(
        model=client.model,
        kind=client.oracle.labels,
        num_classes=service.num_classes,
        image_shape=list(service.image_shape),
        max_rows=service.limits.rows_per_request,
        budget=ledger.budget,
        spent=spent,
        remaining=None if ledger.budget is None else max(0, ledger.budget - spent),
    )


@_router.post(
    "/predict",
    response_model=Answers,
    responses=_FAILURES,
    # the body is read by hand, after the API key was checked and no further than it may be long
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": Query.model_json_schema()}}}
    },
)
async def predict(request: Request, client: Annotated[Client, Depends(_client)]) -> JSONResponse:
    """Ask the model about a batch of images. Images that were asked before are free."""
    service: _Service = request.app.state.service
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _RefusedError(415, "not_json", "Send the query with Content-Type: application/json.")
    if service.waiting >= service.limits.waiting:
        raise _RefusedError(503, "overloaded", "Too many requests are waiting; try again.", wait=1)
    service.waiting += 1
    try:
        x = service.parse(await _body(request, service.body_bytes, service.limits.body_seconds))
        if wait := client.bucket.take(len(x)):
            raise _RefusedError(
                429, "too_fast", f"At most {client.bucket.rate:g} rows per second; wait {wait:.1f} seconds.", wait=wait
            )
        loop = asyncio.get_running_loop()
        return JSONResponse(await loop.run_in_executor(service.thread, service.answer, client, x))
    finally:
        service.waiting -= 1


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """The request's body, which is not read further than it may be long, whatever its headers say."""
    too_long = _RefusedError(413, "too_large", f"The body is longer than {most} bytes; send fewer rows per request.")
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
        raise _RefusedError(408, "too_slow", f"The body took longer than {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise _RefusedError(400, "disconnected", "The body ended early.") from None


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """The response to an error, with no more than it should tell."""
    if isinstance(error, HTTPException):
        error = _RefusedError(error.status_code, "http_error", str(error.detail))
    if not isinstance(error, _RefusedError):
        error = _RefusedError(500, "internal_error", "The server failed; its log says why.")
    return error.response()


def create_app(
    victim: nn.Module,
    policy: Policy | None = None,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    api_keys: Mapping[str, str],
    directory: Path | str,
    limits: ServerLimits | None = None,
    value_range: tuple[float, float] | None = None,
    output_key: Key | None = None,
    device: torch.device | str | None = None,
) -> FastAPI:
    """Make the ASGI application that serves a victim; see `server` for how to run it.

    Args:
        victim: See `Oracle`, as ``output_key`` and ``device``. It should not be trained while it is served.
        policy: What is given away, the same to all clients; `Soft` by default.
        image_shape: Channels, height and width of a query.
        num_classes: Width of the victim's answers: classes, or features of an encoder. A black image, asked at once, checks it,
            or tells it if None.
        api_keys: API key of each client (16 or more visible ASCII characters), by the client's name. Only digests are kept.
        directory: Folder of the clients' ledgers, ``NAME.sqlite``, which are continued where they exist.
        limits: What each client may ask.
        value_range: Lowest and highest value in a query; values of a normalised image are small, and what lies outside is refused
            before it is paid for. No limit but finiteness if None.
        output_key: Where the logits are if the victim returns more than a tensor.
        device: Where to move the victim.

    Returns:
        The application.

    Raises:
        ValueError: If an argument is out of range, a client's name or key cannot be used, or the victim does not take
            such images or gives other answers.
        LedgerError: If a ledger belongs to another victim or policy, or cannot be used.
    """
    limits = ServerLimits() if limits is None else limits
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be three positive sizes (C, H, W), got {image_shape}.")
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be (lowest, highest), got {value_range}.")
    zeros = torch.zeros(1, *image_shape)
    try:
        answers = Oracle(victim, policy, device=device, output_key=output_key).query(zeros)
        if answers.ndim == 1:  # a class does not tell how many there are
            answers = Oracle(victim, output_key=output_key).query(zeros)
    except RuntimeError as error:
        raise ValueError(f"The victim does not take images of shape {tuple(image_shape)}: {error}") from error
    width = answers.shape[1]
    if num_classes not in (None, width):
        raise ValueError(
            f"The victim answers with {width} classes, but num_classes is {num_classes}; give the right number."
        )
    clients = Clients(victim, policy, output_key, api_keys, Path(directory), limits)
    channels, rows, columns = image_shape  # a list, if it comes from a file
    service = _Service(clients, limits, (channels, rows, columns), width, value_range)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.thread.shutdown()
        clients.close()

    app = FastAPI(title="meadef oracle", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    app.include_router(_router)
    for kind in (_RefusedError, HTTPException, Exception):
        app.add_exception_handler(kind, _refuse)
    return app


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Open the socket for `run`.

    Args:
        host: Address of this machine; by default one that only this machine reaches.
        port: Port; 0 takes a free one, which ``getsockname()[1]`` tells.

    Returns:
        The listening socket.

    Raises:
        OSError: If the port is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with its protocol, which asyncio wants to see before it switches off Nagle's algorithm: 40 ms per request
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"Cannot listen on {host} port {port} ({error.strerror}); choose another port."
        ) from error
    return listener


def server(app: FastAPI) -> uvicorn.Server:
    """A server of the application: ``server(app).run(sockets=[listen()])`` serves until it is interrupted.

    Args:
        app: What `create_app` made.

    Returns:
        The server. It logs warnings and errors only, and neither API keys nor queries.
    """
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
