"""Slow clients over real sockets: who stands still is cut off, who is merely slow is not, and the server can end."""

import contextlib
import json
import socket
import threading
import time

import pytest
import torch
from http_fakes import API_KEY, query
from torch import nn

from meadef_lightning.oracle.server import create_app, listen, server

PATIENCE = 0.8
ROWS, CLASSES = 64, 20_000  # 7 MB, more than sockets buffer


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x):
        if float(x[0, 0, 0, 0]) == 7:
            time.sleep(2.5 * PATIENCE)  # a model may take its time
        return self.layer(x.flatten(1))


@pytest.fixture
def running(tmp_path):
    app = create_app(Wide(), image_shape=(1, 2, 2), api_keys={"tester": API_KEY}, directory=tmp_path)
    listener = listen()
    ours = server(app, patience=PATIENCE)
    thread = threading.Thread(target=ours.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield ours, thread, listener.getsockname()
    ours.should_exit = True
    thread.join(10)
    listener.close()


def connect(address, buffer=None):
    line = socket.socket()
    if buffer is not None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    line.settimeout(20)
    line.connect(address)
    return line


def request(values):
    body = json.dumps(query(values=values)).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def test_a_head_that_never_ends_is_cut_off(running):
    with connect(running[2]) as silent, connect(running[2]) as dripping:
        dripping.sendall(b"GET /health HTTP/1.1\r\nX: ")
        cut = False
        for _ in range(50):
            time.sleep(PATIENCE / 5)
            try:
                dripping.sendall(b"a")
            except OSError:
                cut = True
                break
        assert cut
        with contextlib.suppress(ConnectionError):
            assert silent.recv(1) == b""


def test_an_answer_that_nobody_reads_does_not_keep_the_server(running):
    ours, thread, address = running
    with connect(address, buffer=4096) as line:
        line.sendall(request(torch.rand(ROWS, 1, 2, 2)))
        assert line.recv(4) == b"HTTP"
        ours.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def test_a_slow_reader_and_a_slow_model_get_their_answers(running):
    x = torch.full((ROWS, 1, 2, 2), 7.0)
    with connect(running[2], buffer=1 << 16) as line:
        line.sendall(request(x))
        got = bytearray()
        while chunk := line.recv(1 << 16):
            got += chunk
            time.sleep(PATIENCE / 20)
    answer = json.loads(got.partition(b"\r\n\r\n")[2])
    assert answer["shape"] == [ROWS, CLASSES]
