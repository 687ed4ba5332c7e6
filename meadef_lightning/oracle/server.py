"""A victim behind HTTP: the same policies and ledgers as in one process, one account for each API key.

``POST /predict`` asks, ``GET /info`` tells a client what it needs for that, ``GET /health`` is for load balancers, ``/docs`` shows
the schema. `HTTPOracle` is the client. What a client may learn is what the policy gives away: neither weights nor their hash, nor
why a model failed.

A request is one transaction of the client's ledger, which is paid for before it is answered: a server that is killed loses no
answer that it gave, and a question that is repeated costs nothing. Errors are JSON, ``{"error": {"code": ..., "message": ...}}``;
an exhausted budget is 402, which waiting does not help, a client that is too fast gets 429 with ``Retry-After``.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from torch import nn

from meadef_lightning.__about__ import __version__
from meadef_lightning.oracle.clients import Client, Clients, ServerLimits
from meadef_lightning.oracle.oracle import Oracle
from meadef_lightning.oracle.policies import Policy
from meadef_lightning.watermark.batches import Key

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Request
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from starlette.exceptions import HTTPException

    from meadef_lightning.oracle.connections import WatchedConnection
    from meadef_lightning.oracle.schema import Answers, Failure, Info, Query
    from meadef_lightning.oracle.service import RefusedError, Service, read_body, refuse
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f'Serving an oracle needs {missing.name}: pip install "meadef-lightning[serve]".', name=missing.name
    ) from missing

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


async def _client(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_scheme)]
) -> Client:
    service: Service = request.app.state.service
    client = service.clients.find(credentials.credentials) if credentials is not None else None
    if client is None:
        raise RefusedError(401, "unauthorized", "Send a valid API key: Authorization: Bearer KEY.")
    return client


@_router.get("/health")
async def health() -> dict[str, str]:
    """Tell that the server runs."""
    return {"status": "ok"}


@_router.get("/info", responses={401: _FAILURES[401]})
def info(request: Request, client: Annotated[Client, Depends(_client)]) -> Info:
    """Tell a client what it must know to ask, and what it has left."""
    # not a coroutine: the ledger is locked while a batch is answered, and the server must go on
    service: Service = request.app.state.service
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
    service: Service = request.app.state.service
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, "not_json", "Send the query with Content-Type: application/json.")
    if service.waiting >= service.limits.waiting:
        raise RefusedError(503, "overloaded", "Too many requests are waiting; try again.", wait=1)
    service.waiting += 1
    try:
        body = await read_body(request, service.body_bytes, service.limits.body_seconds)
        # in a thread, like the model below, lest a large body keeps all other clients waiting
        x = await asyncio.to_thread(service.parse, body)
        if wait := client.bucket.take(len(x)):
            raise RefusedError(
                429, "too_fast", f"At most {client.bucket.rate:g} rows per second; wait {wait:.1f} seconds.", wait=wait
            )
        loop = asyncio.get_running_loop()
        return JSONResponse(await loop.run_in_executor(service.thread, service.answer, client, x))
    finally:
        service.waiting -= 1


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
    service = Service(clients, limits, (channels, rows, columns), width, value_range)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.thread.shutdown()
        clients.close()

    app = FastAPI(title="meadef oracle", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    app.include_router(_router)
    for kind in (RefusedError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
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
        ValueError: If there is no such port.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port} must lie in 0 to 65535; 0 takes a free one.")
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
            error.errno,
            f"Cannot listen on {host} port {port} ({error.strerror}); choose another port, or an address of this machine.",
        ) from error
    return listener


def server(app: FastAPI, patience: float = 30.0) -> uvicorn.Server:
    """A server of the application: ``server(app).run(sockets=[listen()])`` serves until it is interrupted.

    Args:
        app: What `create_app` made.
        patience: Seconds after which a connection that stands still is cut, at most twice as many: one whose client does not go on with
            the head of its request, or does not read the answer.

    Returns:
        The server. It logs warnings and errors only, and neither API keys nor queries.
    """
    connection: Any = partial(WatchedConnection, patience=patience)
    return uvicorn.Server(uvicorn.Config(app, http=connection, log_level="warning", server_header=False))
