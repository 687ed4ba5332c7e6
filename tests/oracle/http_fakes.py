"""A small victim, a real server for it in a thread, and a server that says what a test wants; all on the loopback interface."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import torch
import urllib3
from torch import nn

from meadef_lightning.oracle.server import create_app, listen, server
from meadef_lightning.oracle.wire import pack

API_KEY = "a-test-key-0123456789"
SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """Four classes, always the same weights; counts the rows it is asked, and chokes on images that begin with 3."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.layer.parameters():
                weight.normal_(generator=generator)
        self.asked = 0

    def forward(self, x):
        if bool((x[:, 0, 0, 0] == 3).any()):
            raise RuntimeError("a secret of the model")
        self.asked += len(x)
        return self.layer(x.flatten(1))


def images(count, seed=1):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def query(shape=(1, *SHAPE), values=None, **more):
    """The body of a request."""
    return {**pack(torch.zeros(*shape) if values is None else values), **more}


@contextmanager
def serving(victim, policy=None, *, directory, image_shape=SHAPE, num_classes=4, api_keys=None, **options):
    """A real server in a thread; gives its URL."""
    keys = {"tester": API_KEY} if api_keys is None else api_keys
    app = create_app(
        victim,
        policy,
        image_shape=image_shape,
        num_classes=num_classes,
        api_keys=keys,
        directory=directory,
        **options,
    )
    if isinstance(victim, Linear):
        victim.asked = 0  # a trial belongs to nobody
    listener = listen()
    running = server(app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)
        listener.close()


def send(url, path="/predict", body=None, key=API_KEY, method=None, **headers):
    """One request; the status, the headers and the JSON of its answer."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers.setdefault("Content-Type", "application/json")
    if key is not None:
        headers.setdefault("Authorization", f"Bearer {key}")
    content = json.dumps(body) if isinstance(body, dict) else body
    with urllib3.PoolManager(retries=False, timeout=10) as pool:
        answer = pool.request(method or ("GET" if body is None else "POST"), url + path, body=content, headers=headers)
    return answer.status, answer.headers, json.loads(answer.data)


INFO = {"model": "m1", "kind": "soft", "num_classes": 4, "image_shape": [1, 4, 4], "max_rows": 8}


def reply(answers, **changes):
    """What an honest server would answer."""
    kind = "hard" if answers.ndim == 1 else "soft"
    return {"model": "m1", "kind": kind, **pack(answers), "spent": 0, "remaining": None, **changes}


@contextmanager
def pretending(predict, info=None):
    """A server whose answers are functions of the handler, or JSON values, or lists of these to be used one after the other.

    Gives its URL and the list of the requests' paths.
    """
    asked = []
    plans = {"/info": INFO if info is None else info, "/predict": predict}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            asked.append(path)
            plan = plans.get(path, {})
            if isinstance(plan, list):
                plan = plan.pop(0) if len(plan) > 1 else plan[0]
            if callable(plan):
                plan(self)
            else:
                say(json.dumps(plan))(self)

        do_POST = do_GET  # noqa: N815 - the name is the base class's

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that hangs up is what some tests are about

    with Server(("127.0.0.1", 0), Handler) as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{fake.server_port}", asked
        finally:
            fake.shutdown()
            thread.join(10)


def say(body, status=200, kind="application/json", **headers):
    """An answer with this body."""
    content = body.encode() if isinstance(body, str) else body

    def act(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return act


def fail(status, message="no", **more):
    """An error as our server would put it; keyword arguments with an underscore in front are headers."""
    headers = {name[1:]: value for name, value in more.items() if name.startswith("_")}
    numbers = {name: value for name, value in more.items() if not name.startswith("_")}
    return say(json.dumps({"error": {"code": "x", "message": message, **numbers}}), status, **headers)
