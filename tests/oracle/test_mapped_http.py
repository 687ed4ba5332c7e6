"""A foreign service on the loopback interface: its schemas are spoken, its lies are refused, its secrets are kept."""

import base64
import io
import json
import threading
import traceback
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from meadef_lightning.oracle import OracleHTTPError, Totals, mapped_http
from meadef_lightning.oracle.input_space import InputSpace
from meadef_lightning.oracle.mapped_http import MappedHTTPOracle
from meadef_lightning.oracle.mapping import HTTPMapping, fill, follow, parsed_path

MEAN, STD = (0.25,), (0.5,)
LIST = {"request": {"inputs": {"$each": "$image"}}, "batch_size": 4}
TOKEN = "a-secret-token-0123"  # noqa: S105 - of nobody


def images(count, channels=1, seed=1):
    pixels = torch.rand(count, channels, 4, 5, generator=torch.Generator().manual_seed(seed))
    return (pixels - MEAN[0]) / STD[0]


def probabilities(x):
    """The model that everybody here serves, on whatever it was sent."""
    return (torch.as_tensor(np.asarray(x), dtype=torch.float32).reshape(len(x), -1)[:, :3] * 7).softmax(-1)


@contextmanager
def service(answer):
    """Serves ``answer(JSON or bytes)``: JSON values, bytes as they are, or a status and a body; gives URL and requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers["Content-Type"] == "application/json":
                body = json.loads(body)
            asked.append((self.path, dict(self.headers), body))
            said = answer(body)
            status, said = said if isinstance(said, tuple) else (200, said)
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_PUT = do_POST  # noqa: N815 - likewise

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/classify/", asked
        finally:
            server.shutdown()
            thread.join(10)


def oracle(url, response="$", space=None, num_classes=3, **mapping):
    return MappedHTTPOracle(
        HTTPMapping(url, response, **{"retries": 0, "timeout": 5.0, **mapping}), MEAN, STD, space, num_classes
    )


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text) if isinstance(text, str) else text)))


# --- schemas


def test_nested_lists_and_a_list_of_answers():
    x = images(6)
    with service(lambda body: {"outputs": probabilities(body["inputs"]).tolist()}) as (url, asked):
        asker = oracle(url, "outputs", **LIST)
        torch.testing.assert_close(asker.query(x), probabilities(x))
        assert [len(body["inputs"]) for _, _, body in asked] == [4, 2]
        assert {path for path, _, _ in asked} == {"/v1/classify/"}  # as declared, with its slash
        asker.query(x)
        assert (len(asked), asker.ledger.totals()) == (2, Totals(6, 12))  # nothing is asked twice
        assert asker.labels == "soft"


def test_png_in_objects_and_named_scores():
    names = ["cat", "dog", "pup"]

    def answer(body):
        rows = probabilities([decoded(item["b64"].partition(",")[2]) / 255 for item in body["instances"]])
        return {"predictions": [{"scores": dict(zip(names, row, strict=True))} for row in rows.tolist()]}

    request = {"instances": {"$each": {"b64": "data:image/png;base64,$image"}}, "version": 2}
    mapping = {"request": request, "images": "png", "batch_size": 4, "classes": {"cat": 1, "dog": 0, "pup": 0}}
    x = images(5)
    with service(answer) as (url, asked):
        found = oracle(url, "predictions[*].scores", num_classes=2, **mapping).query(x)
    seen = probabilities(((x * 0.5 + 0.25) * 255).round() / 255)
    torch.testing.assert_close(found, torch.stack([seen[:, 1:].sum(1), seen[:, 0]], dim=1))
    assert asked[0][2]["version"] == 2


def test_one_png_as_the_body_and_the_best_labels_as_objects():
    def answer(body):
        row = probabilities([decoded(body)[..., ::-1] / 255])[0]
        return [{"label": f"c{k}", "score": float(row[k])} for k in row.topk(2).indices.tolist()]

    space = InputSpace(channels="bgr", size=(8, 10))
    mapping = {"images": "png", "classes": {f"c{k}": k for k in range(3)}, "label_key": "label", "score_key": "score"}
    with service(answer) as (url, asked):
        found = oracle(url, "$", space, method="PUT", **mapping).query(images(2, 3))
    assert found.count_nonzero(dim=1).tolist() == [2, 2]
    assert asked[0][1]["Content-Type"] == "image/png"
    assert decoded(asked[0][2]).shape == (8, 10, 3)


def test_raw_numbers_and_one_label():
    def answer(body):
        return {"result": [{"class": int(probabilities([np.frombuffer(body, "<f4").copy()]).argmax())}]}

    x = images(3)
    with service(answer) as (url, asked):
        asker = oracle(url, "result[0]", images="float32", answer="label", label_key="class", classes=[2, 1, 0])
        assert asker.query(x).tolist() == (2 - probabilities(x).argmax(1)).tolist()
        assert asker.labels == "hard"
    assert asked[0][1]["Content-Type"] == "application/octet-stream"
    assert np.frombuffer(asked[0][2], "<f4").tolist() == x[0].flatten().tolist()  # not declared otherwise: as it is


def test_secrets_come_from_the_environment_and_are_shown_nowhere(monkeypatch):
    monkeypatch.setenv("THEIR_TOKEN", TOKEN)
    headers = {"Authorization": "Bearer ${THEIR_TOKEN}", "X-Version": "3"}
    with service(lambda body: (401, {"error": f"no user has {TOKEN}"})) as (url, asked):
        asker = oracle(url, headers=headers, **LIST)
        with pytest.raises(OracleHTTPError, match=r"no user has \*\*\*\. Check the environment variables") as error:
            asker.query(images(1))
    assert asked[0][1]["Authorization"] == f"Bearer {TOKEN}"
    assert asked[0][1]["X-Version"] == "3"
    shown = "".join(traceback.format_exception(error.value)) + repr(asker) + repr(vars(asker)) + asker.fingerprint()
    assert TOKEN not in shown + repr(vars(asker._channel))
    monkeypatch.delenv("THEIR_TOKEN")
    with pytest.raises(ValueError, match="Authorization needs the environment variable THEIR_TOKEN"):
        oracle(url, headers=headers, **LIST)
    monkeypatch.setenv("THEIR_TOKEN", f"{TOKEN}\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="header Authorization cannot be sent") as error:
        oracle(url, headers=headers, **LIST)
    assert TOKEN not in str(error.value)


def test_requests_are_spread_over_time_repeated_ones_too(monkeypatch):
    clock, times = [0.0], []
    monkeypatch.setattr(mapped_http, "TokenBucket", partial(mapped_http.TokenBucket, clock=lambda: clock[0]))
    monkeypatch.setattr(mapped_http.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def answer(body):
        times.append(clock[0])
        return (503, {}) if len(times) in (2, 3) else probabilities(body["inputs"]).tolist()

    with service(answer) as (url, _):
        oracle(url, requests_per_second=0.5, request={"inputs": {"$each": "$image"}}, retries=2).query(images(3))
    assert times == pytest.approx([0.0, 2.0, 4.0, 6.0, 8.0])  # the first at once, then one in two seconds


def test_the_ledger_belongs_to_the_declaration():
    first = oracle("http://localhost/a", **LIST).fingerprint()
    assert first == oracle("http://localhost/a", headers={"X": "1"}, timeout=9.0, **LIST).fingerprint()
    for other in ({"response": "x"}, {"classes": [0, 1, 2]}, {"space": InputSpace(scale=255.0)}, {"images": "float32"}):
        assert oracle("http://localhost/a", **LIST, **other).fingerprint() != first


# --- lies


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"outputs": [[0.2, 0.8, 0.0]]}, "there is a list of 1 at 'outputs', not 2 answers"),
        ({"outputs": [[0.2, 0.8], [1.0, 0.0, 0.0]]}, "not equally long"),
        ({"outputs": [[], []]}, "not equally long"),
        ({"outputs": [0.2, 0.8]}, "there is 0.2 where scores should be"),
        (b'{"outputs": [[NaN, 1, 0], [1, 0, 0]]}', "NaN or infinite"),
        (b'{"outputs": [[1e999, 1, 0], [1, 0, 0]]}', "NaN or infinite"),
        (b'{"outputs": [[1%s, 1, 0], [1, 0, 0]]}' % (b"0" * 400), "too large"),
        ({"outputs": [[0.5, 0.5, 2.0], [1, 0, 0]]}, r"outside \[0, 1\]"),
        ({"outputs": [[0.9, 0.9, 0.9], [1, 0, 0]]}, "sum to more than 1"),
        ({"outputs": [[True, 0, 0], [1, 0, 0]]}, "there is true where a number should be"),
        ({"outputs": [["1", 0, 0], [1, 0, 0]]}, 'there is "1" where a number'),
        ({"outputs": [{"cat": 1.0}, {"cat": 1.0}]}, "scores are named; declare `classes`"),
        ({"output": 1}, "there is an object without 'outputs'"),
        ([1, 2], "there is a list of 2 without 'outputs'"),
        ("\x1b[31m" * 90, "without 'outputs'"),
        (b"<html>", "is no JSON"),
        (b"[" * 3000, "is no JSON"),
        (b" " * 200_000, r"longer than the \d+ bytes"),
        ((302, b"{}"), "redirects, which is not followed"),
        ((404, b"nothing"), r"status 404.*Check the address"),
        ((503, {"error": "later"}), "later, tried once"),
    ],
)
def test_answers_that_are_none(said, message):
    with service(lambda body: said) as (url, asked):
        asker = oracle(url, "outputs", **LIST)
        with pytest.raises(OracleHTTPError, match=message) as error:
            asker.query(images(2))
    assert str(error.value).startswith(url)
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 500
    assert asker.ledger.totals() == Totals(0, 0)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["dog", "wolf"], '"wolf" is no label that `classes` declares'),
        (["dog", None], "null is no label"),
        (["dog", {"name": "dog"}], "an object is no label"),
        (["dog", "x" * 9000], r"\"xxx.*\.\.\. is no label"),
    ],
)
def test_labels_that_are_none(said, message):
    with service(lambda body: said) as (url, _):
        asker = oracle(url, answer="label", classes={"dog": 0, "cat": 1}, **LIST)
        with pytest.raises(OracleHTTPError, match=message):
            asker.query(images(2))


def test_other_labels_than_declared_by_position():
    with service(lambda body: {"outputs": [[0.5, 0.5]]}) as (url, _):
        with pytest.raises(OracleHTTPError, match="2 scores, but 3 classes are declared"):
            oracle(url, "outputs", classes=[0, 1, 2], **LIST).query(images(1))
        with pytest.raises(OracleHTTPError, match="list of objects with 'label' and 'score'"):
            oracle(url, "outputs", label_key="label", score_key="score", **LIST).query(images(1))


# --- declarations


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"request": {"x": 1}}, r"must hold \$image once, it does so 0 times"),
        ({"request": ["$image", "$image"]}, "it does so 2 times"),
        ({"request": {"x": "$image", "y": {"$each": 1}}}, r"one \$each, with \$image in it"),
        ({"request": {"y": {"$each": "$image", "z": 1}}}, "nothing beside it"),
        ({"request": "$image", "batch_size": 2}, r"batch_size=2 needs a request with \$each"),
        ({}, "the image is the body: set images"),
        ({"images": "png", "batch_size": 0}, "batch_size must be at least 1"),
        ({"images": "png", "requests_per_second": 0.0}, "requests_per_second positive"),
        ({"images": "png", "classes": {"a": -1}}, "classes must name at least one class"),
        ({"images": "png", "classes": []}, "classes must name at least one class"),
        ({"images": "png", "score_key": "s"}, "score_key goes with label_key"),
        ({"images": "png", "label_key": "s"}, "give score_key, too"),
        ({"images": "jpeg"}, "images must be list, png or float32"),
        ({"images": "png", "response": "a[*][*]"}, "once: one answer an image"),
        ({"images": "png", "response": "a..b"}, "cannot be read"),
        ({"images": "png", "url": "http://u:secret@localhost"}, "without user"),
        ({"images": "png", "headers": {"Host": "x"}}, "'Host' cannot be sent"),
    ],
)
def test_declarations_that_cannot_be(mapping, message):
    with pytest.raises(ValueError, match=message) as error:
        MappedHTTPOracle(HTTPMapping(**{"url": "http://localhost", "response": "$", **mapping}), MEAN, STD)
    assert "secret" not in str(error.value)


def test_images_that_cannot_be_sent():
    with pytest.raises(ValueError, match="A PNG holds pixels"):
        oracle("http://localhost", space=InputSpace(scale=255.0), images="png")
    with pytest.raises(ValueError, match="1 or 3 channels"):
        oracle("http://localhost", images="png").query(images(1, 2))
    with pytest.raises(ValueError, match="takes images as png or float32, not as lists"):
        oracle("http://localhost", request={"x": "a $image"}).query(images(1))


def test_templates_and_paths():
    template = {"a": [{"$each": {"b": "$image", "c": ["k", 1, None]}}], "d": "e"}
    assert fill(template, ["x", "y"]) == {
        "a": [[{"b": "x", "c": ["k", 1, None]}, {"b": "y", "c": ["k", 1, None]}]],
        "d": "e",
    }
    assert parsed_path("$.a[0].b-c[*].d") == ("a", 0, "b-c", "*", "d")
    value = {"a": [{"b-c": [{"d": 1}, {"d": 2}]}]}
    assert follow(value, parsed_path("a[0].b-c[*].d")) == [1, 2]
    assert follow(value, parsed_path("$")) is value
    for path, problem in (("a[1]", "a list of 1 without element 1"), ("a[*].x", "an object without 'x'")):
        with pytest.raises(ValueError, match=problem):
            follow(value, parsed_path(path))
