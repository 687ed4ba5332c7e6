"""A server in a process of its own, which kills itself at a chosen moment as ``kill -9`` would."""

import os
import signal

import torch
from http_fakes import API_KEY, SHAPE, Linear

from meadef_lightning.oracle.clients import ServerLimits
from meadef_lightning.oracle.server import create_app, listen, server


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(Linear):
    """Dies in the middle of a batch: after the forward, before anything is written."""

    batches = None

    def forward(self, x):
        answers = super().forward(x)
        if self.batches is not None:
            self.batches -= 1
            if self.batches == 0:
                die()
        return answers


def serve(directory, port, ready, moment=None, batches=None):
    """Serves until it is ended.

    Args:
        directory: Folder of the ledgers.
        port: Port; 0 for a free one.
        ready: Connection that gets the port.
        moment: ``"forward"`` or ``"response"``: dies within, or after the ledger was written and before the client knows.
        batches: In which batch.
    """
    torch.set_num_threads(1)
    victim = Dying()
    app = create_app(
        victim, image_shape=SHAPE, num_classes=4, api_keys={"tester": API_KEY}, directory=directory,
        limits=ServerLimits(rows_per_request=10),
    )  # fmt: skip
    if moment == "forward":
        victim.batches = batches

    async def wrapped(scope, receive, send):
        async def dying(message):
            nonlocal batches
            if moment == "response" and scope.get("path") == "/predict" and message["type"] == "http.response.start":
                batches -= 1
                if batches == 0:
                    die()
            await send(message)

        await app(scope, receive, dying)

    with listen(port=port) as listener:
        ready.send(listener.getsockname()[1])
        server(wrapped).run(sockets=[listener])
