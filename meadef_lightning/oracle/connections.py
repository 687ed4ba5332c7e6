"""Connections that stand still are cut, whether or not somebody has an API key.

A client that never finishes the head of a request, or never reads its answer, would else hold a connection and its memory for ever,
and keep the server from ending.
"""

import asyncio
import socket
from typing import Any, Final

from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

_BUFFER: Final = 1 << 18


class WatchedConnection(H11Protocol):
    """A connection that is looked at now and then, and cut if nothing happened between two looks.

    While a request is worked on, nothing need happen: reading its body has a limit of its own, and a model may take its time.

    Args:
        *args: See `H11Protocol`.
        patience: Seconds between two looks.
        **kwargs: See `H11Protocol`.
    """

    def __init__(self, *args: Any, patience: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience = patience
        self._answered = 0
        self._seen: tuple[int, int] | None = None
        self._next_look: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        line = transport.get_extra_info("socket")
        if line is not None:
            # a reader's progress shows once a third of the system's buffer is free, which by default grows to megabytes
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._next_look = self.loop.call_later(self._patience, self._look)

    @override
    def on_response_complete(self) -> None:
        self._answered += 1
        super().on_response_complete()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        seen = (self._answered, unsent)
        working = self.cycle is not None and not self.cycle.response_complete and not unsent
        if seen == self._seen and not working:
            self.transport.abort()  # close() would wait until everything is sent
            return
        self._seen = None if working else seen
        self._next_look = self.loop.call_later(self._patience, self._look)
