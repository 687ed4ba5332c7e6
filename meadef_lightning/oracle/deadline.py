"""Connections to servers that are not trusted: the head of an answer comes in time, or the connection is cut.

A time-out of a socket begins anew with every byte, so that a server could hold a client for ever, a byte at a time.
"""

import socket
import threading
from contextlib import suppress
from typing import Any

import urllib3
from typing_extensions import override
from urllib3.connection import HTTPConnection, HTTPSConnection


def _in_time(connection: HTTPConnection, receive: Any) -> Any:
    """What ``receive`` returns, if it does so within the connection's time-out from now."""
    late, line = threading.Event(), connection.sock

    def cut() -> None:
        late.set()
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)  # wakes whoever reads

    timer = threading.Timer(float(connection.timeout or 0), cut)
    timer.daemon = True
    timer.start()
    try:
        answer = receive()
    except Exception as error:
        if late.is_set():
            raise TimeoutError("timed out") from error
        raise
    finally:
        timer.cancel()
    if late.is_set():  # half a head looks like a whole one
        answer.close()
        raise TimeoutError("timed out")
    return answer


class _Connection(HTTPConnection):
    @override
    def getresponse(self) -> Any:
        return _in_time(self, super().getresponse)


class _SecureConnection(HTTPSConnection):
    @override
    def getresponse(self) -> Any:
        return _in_time(self, super().getresponse)


class _TimedPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TimedSecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


def timed_pool(seconds: float) -> urllib3.PoolManager:
    """Makes a pool of such connections, which repeats nothing.

    Args:
        seconds: To wait for a connection, and for the head of an answer.
    """
    pool = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(seconds, seconds))
    pool.pool_classes_by_scheme = {"http": _TimedPool, "https": _TimedSecurePool}
    return pool
