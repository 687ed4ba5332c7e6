"""Somebody else's classification API as a black box: a declaration says how images are sent and where the answers are.

The server is not trusted, as with `HTTPOracle`: answers are bounded in size and time, must be JSON, and are checked before they
are stored. Redirects are not followed. Nothing tells whether the model behind the address was exchanged, so a ledger is tied to
the declaration alone; start a new one when the service announces a new model.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from typing_extensions import override

from meadef_lightning.oracle.base import BlackBox
from meadef_lightning.oracle.clients import TokenBucket
from meadef_lightning.oracle.http import check_answers
from meadef_lightning.oracle.input_space import InputSpace, ToInputSpace
from meadef_lightning.oracle.ledger import QueryLedger
from meadef_lightning.oracle.mapping import MOST_LABELS, HTTPMapping, encode_images, fill, follow, parsed_path, shown
from meadef_lightning.oracle.policies import AnswerKind
from meadef_lightning.oracle.transport import Channel, checked_url
from meadef_lightning.oracle.wire import ENVELOPE

_BYTES_PER_ANSWER: Final = 1 << 16
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SHORTEST_SECRET: Final = 8
_FORBIDDEN: Final = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")


class MappedHTTPOracle(BlackBox):
    """A foreign API, asked, counted and cached like any other victim or suspect.

    Args:
        mapping: How it is asked.
        mean: Mean of each channel in the normalisation of the images that will be asked.
        std: Standard deviation, likewise.
        space: What the API takes; by default pixels for PNG, and else images as they are.
        num_classes: Number of classes of the task, where ``classes`` map labels to them: the width of the answers.
        ledger: What was asked; see `BlackBox`.
        backoff: Seconds before a request is repeated for the first time; doubled each time.

    Raises:
        ValueError: If a header cannot be sent, an environment variable is missing, or images cannot be sent as declared. The
            message never shows a header's value.
    """

    def __init__(
        self,
        mapping: HTTPMapping,
        mean: Sequence[float],
        std: Sequence[float],
        space: InputSpace | None = None,
        num_classes: int = 0,
        ledger: QueryLedger | None = None,
        backoff: float = 0.25,
    ) -> None:
        super().__init__(ledger, mapping.batch_size)
        if mapping.images == "png" and space is not None and space.normalises:
            raise ValueError(
                "A PNG holds pixels: declare channels and size, without scale, mean, std and channels_last."
            )
        self.mapping, self.space = mapping, InputSpace() if space is None else space
        plain = space is None and mapping.images != "png"
        self._convert = None if plain else ToInputSpace(self.space, mean, std)
        self._width = max([num_classes, *(1 + target for target in mapping.targets)])
        self._path = parsed_path(mapping.response)
        self._channel = _Foreign(mapping, backoff)
        facts = {
            **asdict(mapping),
            "space": None if plain else asdict(self.space),
            "mean": list(mean),
            "std": list(std),
        }
        for private in ("headers", "batch_size", "requests_per_second", "timeout", "retries"):
            del facts[private]  # they decide no answer, and headers are secrets
        self._digest = hashlib.sha256(json.dumps([facts, num_classes], sort_keys=True).encode()).hexdigest()

    @property
    @override
    def labels(self) -> AnswerKind:
        return "soft" if self.mapping.answer == "scores" else "hard"

    @override
    def fingerprint(self) -> str:
        """SHA-256 over the declaration, as 64 hexadecimal digits."""
        return self._digest

    @override
    def _answer(self, x: Tensor) -> Tensor:
        reply = self._channel.exchange("", self._body(x), ENVELOPE + len(x) * _BYTES_PER_ANSWER)
        try:
            found = follow(reply, self._path)
            values = found if self.mapping.lists_images or "*" in self._path else [found]
            if not isinstance(values, list) or len(values) != len(x):
                raise ValueError(f"there is {shown(values)} at {self.mapping.response!r}, not {len(x)} answers")
            answers = self._read(values)
            check_answers(answers, self.labels, MOST_LABELS)
        except ValueError as error:
            raise self._channel.error(
                "",
                f"the answer cannot be right: {str(error).rstrip('.')}; nothing of this batch was stored",
                "Compare the declaration (response, answer, classes) with what the API documents.",
            ) from None
        return answers

    def _body(self, x: Tensor) -> bytes:
        with torch.no_grad():
            images = x.float() if self._convert is None else self._convert(x.float())
        encoded = encode_images(images, self.mapping.images)
        if self.mapping.request is None:
            return encoded[0]  # type: ignore[no-any-return]  # checked: PNG or numbers
        texts = [base64.b64encode(image).decode("ascii") if isinstance(image, bytes) else image for image in encoded]
        return json.dumps(fill(self.mapping.request, texts)).encode()

    def _read(self, values: list[Any]) -> Tensor:
        """Answers as a tensor; raises ``ValueError`` where they are none."""
        if self.mapping.answer == "label":
            return torch.tensor([self._label(value) for value in values])
        rows = [self._scores(value) for value in values]
        if len({len(row) for row in rows}) != 1 or not 1 <= len(rows[0]) <= MOST_LABELS:
            raise ValueError("the answers are not equally long")
        return torch.tensor(rows, dtype=torch.float32)

    def _label(self, value: Any) -> int:
        key = self.mapping.label_key
        if key is not None and isinstance(value, dict):
            value = value.get(key)
        label = self.mapping.class_of(value)
        if label is None:
            raise ValueError(f"{shown(value)} is no label that `classes` declares")
        return label

    def _scores(self, value: Any) -> list[float]:
        classes, label_key, score_key = self.mapping.classes, self.mapping.label_key, self.mapping.score_key
        if label_key is not None:
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise ValueError(
                    f"there is {shown(value)} where a list of objects with {label_key!r} and {score_key!r} should be"
                )
            pairs = [(item.get(label_key), item.get(score_key)) for item in value]
        elif isinstance(value, dict):
            pairs = list(value.items())
        elif isinstance(value, list):
            if classes is None:
                return [_number(item) for item in value]
            if len(value) != len(classes):
                raise ValueError(f"there are {len(value)} scores, but {len(classes)} classes are declared")
            pairs = list(enumerate(value))
        else:
            raise ValueError(f"there is {shown(value)} where scores should be")
        if classes is None:
            raise ValueError("the scores are named; declare `classes`")
        row = [0.0] * self._width
        for label, score in pairs:
            target = self.mapping.class_of(label)
            if target is None:
                raise ValueError(f"{shown(label)} is no label that `classes` declares")
            row[target] += _number(score)
        return row

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mapping.url!r}, ledger={self.ledger!r})"


class _Foreign(Channel):
    """The channel to a foreign API: its own address, method and headers."""

    stranger = "Check the declaration and the address."
    remedies: ClassVar = {
        401: "Check the environment variables that the headers name.",
        403: "Check the environment variables that the headers name.",
        404: "Check the address.",
        405: "Check the declared method.",
        413: "Lower batch_size.",
        415: "Check what images are sent as, and the Content-Type in the headers.",
    }

    def __init__(self, mapping: HTTPMapping, backoff: float) -> None:
        self._lines, secrets = resolved_headers(mapping.headers)
        super().__init__(checked_url(mapping.url), secrets, mapping.timeout, mapping.retries, backoff)
        self._method = mapping.method
        self._bucket = TokenBucket(mapping.requests_per_second, 1.0)
        raw = {"png": "image/png", "float32": "application/octet-stream"}
        self._type = "application/json" if mapping.request is not None else raw[mapping.images]

    @override
    def once(self, path: str, body: bytes | None, most: int) -> Any:
        while wait := self._bucket.take(1):  # for a repeated request, too
            time.sleep(wait)
        return super().once(path, body, most)

    @override
    def address(self, path: str) -> str:
        return self.url

    @override
    def method(self, body: bytes | None) -> str:
        return self._method

    @override
    def headers(self, body: bytes | None) -> dict[str, str]:
        named = {name.lower() for name, _ in self._lines.pairs}
        given = {} if "content-type" in named else {"Content-Type": self._type}
        return {**given, **dict(self._lines.pairs)}


class _Lines:
    """Header lines that show themselves only when they are asked to."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self.pairs = pairs

    @override
    def __repr__(self) -> str:
        return "***"


def resolved_headers(headers: Mapping[str, str]) -> tuple[_Lines, list[str]]:
    """Put environment variables into headers.

    Args:
        headers: Value by name, with ``${NAME}`` for the environment variable ``NAME``.

    Returns:
        The lines to send, and what messages must not show: values from the environment, and every value long enough to be a secret.

    Raises:
        ValueError: If a variable is missing, or a line cannot be sent; the message never shows a value.
    """
    pairs, secrets = [], []
    for name, template in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or name.lower() in _FORBIDDEN:
            raise ValueError(f"The header {name[:60]!r} cannot be sent; it is no name, or this client sets it itself.")
        for variable in _VARIABLE.findall(template):
            if not os.environ.get(variable):
                raise ValueError(f"The header {name} needs the environment variable {variable}, which is not set.")
            secrets.append(os.environ[variable])
        value = _VARIABLE.sub(lambda match: os.environ[match[1]], template)
        if not re.fullmatch(r"[!-~](?:[ -~]*[!-~])?", value):
            raise ValueError(f"The value of the header {name} cannot be sent; it must be visible ASCII characters.")
        pairs.append((name, value))
        if len(value) >= _SHORTEST_SECRET:
            secrets.append(value)
    return _Lines(pairs), secrets


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"there is {shown(value)} where a number should be")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("there is a number that is too large") from None
