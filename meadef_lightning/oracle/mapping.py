"""How a foreign classification API is asked, and where it answers: a declaration, templates and paths.

Nothing here asks anything; `meadef_lightning.oracle.mapped_http` does. A declaration in YAML::

    url: https://api.example.com/v1/classify
    headers: {Authorization: "Bearer ${API_TOKEN}"}
    request: {instances: {$each: {b64: $image}}}
    images: png
    response: predictions[*].probabilities
    classes: {cat: 3, dog: 5, puppy: 5}
    batch_size: 16
    requests_per_second: 2
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor

from meadef_lightning.oracle.transport import checked_url

IMAGE: Final = "$image"
EACH: Final = "$each"
MOST_LABELS: Final = 100_000
_STEP: Final = re.compile(r"\.?([^.\[\]]+)|\[([0-9]{1,9}|\*)\]")


@dataclass(frozen=True)
class HTTPMapping:
    """How an API is asked, and where it answers.

    Args:
        url: Where images are sent, ``http[s]://host[:port][/path]``, without a query.
        response: Path to the answers in the JSON that comes back, e.g. ``predictions[*].scores``: names, ``[0]`` for one element,
            ``[*]`` for one answer an image. Without ``[*]`` it leads to the list of all answers or, where ``request`` has no
            ``$each``, to the one answer. ``$`` is the whole JSON.
        request: The JSON to send. The text ``$image`` in it stands for the image, and ``{$each: TEMPLATE}`` for a list of the
            template filled with one image after the other. Without it, the image itself is the body.
        images: ``"list"`` sends nested lists of numbers, ``"png"`` a PNG file, ``"float32"`` little-endian numbers row by row; the
            last two as base64 within JSON. A PNG holds bytes, so that what lies outside of black and white is clipped.
        answer: ``"scores"`` for probabilities of all classes, or of the best ones by name; ``"label"`` for one class only.
        classes: Class of the task for each label of the API, by name, or by position; several labels may have the same. By
            default labels are numbers and the same as the task's.
        label_key: Where answers are lists of objects, such as ``[{name: cat, score: 0.9}]``: the field of the label; for
            ``answer: label``, the field of the label within an object.
        score_key: Likewise, the field of the probability.
        headers: Sent along. ``${NAME}`` is replaced by an environment variable; a secret belongs into one.
        method: HTTP method.
        batch_size: Most images in a request; more than 1 needs ``$each``.
        requests_per_second: Most requests a second; no limit if None.
        timeout: Seconds to wait for a connection, for the head of an answer, and for its body.
        retries: How often a request is repeated after a failure that may pass; the API may charge for each.

    Raises:
        ValueError: If a value is out of range, or the declaration contradicts itself.
    """

    url: str
    response: str
    request: Any = None
    images: Literal["list", "png", "float32"] = "list"
    answer: Literal["scores", "label"] = "scores"
    classes: dict[str, int] | list[int] | None = None
    label_key: str | None = None
    score_key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    method: Literal["POST", "PUT"] = "POST"
    batch_size: int = 1
    requests_per_second: float | None = None
    timeout: float = 60.0
    retries: int = 4

    def __post_init__(self) -> None:
        checked_url(self.url)
        parsed_path(self.response)
        if self.images not in ("list", "png", "float32") or self.answer not in ("scores", "label"):
            raise ValueError("images must be list, png or float32, and answer must be scores or label.")
        rate = 1.0 if self.requests_per_second is None else self.requests_per_second
        if self.batch_size < 1 or not 0 < rate < float("inf"):
            raise ValueError("batch_size must be at least 1, and requests_per_second positive and finite.")
        images, lists = _count(self.request)
        if self.request is None:
            if self.images == "list":
                raise ValueError("Without a request, the image is the body: set images to png or float32.")
        elif images != 1:
            raise ValueError(f"The request must hold {IMAGE} once, it does so {images} times.")
        if lists > 1 or (lists == 1 and not _each_holds_image(self.request)):
            raise ValueError(f"The request may hold one {EACH}, with {IMAGE} in it and nothing beside it.")
        if self.batch_size > 1 and lists == 0:
            raise ValueError(f"batch_size={self.batch_size} needs a request with {EACH}, which lists the images.")
        if self.score_key is not None and (self.label_key is None or self.answer != "scores"):
            raise ValueError("score_key goes with label_key and `answer: scores`.")
        if self.answer == "scores" and self.label_key is not None and self.score_key is None:
            raise ValueError("label_key names the labels of scores: give score_key, too.")
        if self.classes is not None and not (self.targets and all(is_label(target) for target in self.targets)):
            raise ValueError(f"classes must name at least one class, each from 0 to {MOST_LABELS - 1}.")

    @property
    def lists_images(self) -> bool:
        """Whether a request holds a list of images, and the answer one of answers."""
        return _count(self.request)[1] == 1

    @property
    def targets(self) -> list[int]:
        """The classes that labels are mapped to."""
        return list(self.classes.values()) if isinstance(self.classes, dict) else self.classes or []

    def class_of(self, label: Any) -> int | None:
        """Class of a label that the API answered; None if it has none."""
        if isinstance(self.classes, dict):
            return self.classes.get(str(label)) if isinstance(label, str) or type(label) is int else None
        if not is_label(label):
            return None
        if self.classes is None:
            return int(label)
        return self.classes[label] if label < len(self.classes) else None


def encode_images(images: Tensor, form: str) -> list[Any]:
    """Encode images one by one.

    Args:
        images: ``(B, ...)`` float32; for PNG ``(B, 1 or 3, H, W)`` in [0, 1], beyond which they are clipped.
        form: ``"list"``, ``"png"`` or ``"float32"``.

    Returns:
        For each image nested lists, or bytes.

    Raises:
        ValueError: If images with so many channels make no PNG.
    """
    images = images.detach().cpu()
    if form == "list":
        nested: list[Any] = images.tolist()
        return nested
    if form == "float32":
        return [image.contiguous().numpy().astype("<f4").tobytes() for image in images]
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"A PNG has 1 or 3 channels, got images of shape {tuple(images.shape[1:])}; declare channels.")
    from PIL import Image

    files = []
    for image in (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1).contiguous().numpy()).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def fill(template: Any, images: Sequence[Any]) -> Any:
    """Put encoded images into a request's template; see `HTTPMapping`.

    Args:
        template: JSON values with ``$image`` and perhaps ``$each``.
        images: Encoded images, text or nested lists; one, where there is no ``$each``.

    Returns:
        JSON values.

    Raises:
        ValueError: If lists of numbers should go into a longer text.
    """
    if isinstance(template, dict):
        if set(template) == {EACH}:
            return [fill(template[EACH], [image]) for image in images]
        return {name: fill(value, images) for name, value in template.items()}
    if isinstance(template, list):
        return [fill(value, images) for value in template]
    if template == IMAGE:
        return images[0]
    if isinstance(template, str) and IMAGE in template:
        if not isinstance(images[0], str):
            raise ValueError(f"The text {template!r} takes images as png or float32, not as lists.")
        return template.replace(IMAGE, images[0])
    return template


def parsed_path(text: str) -> tuple[str | int, ...]:
    """Parse a path such as ``predictions[*].scores``; see `HTTPMapping`.

    Returns:
        Names, positions, and ``"*"``.

    Raises:
        ValueError: If it cannot be parsed.
    """
    rest, steps = text.strip().removeprefix("$"), list[str | int]()
    while rest:
        match = _STEP.match(rest)
        if match is None or (match[1] is not None and match[1] == "*"):
            raise ValueError(f"The path {text!r} cannot be read; write it like predictions[*].scores or $[0].label.")
        steps.append(match[1] if match[1] is not None else match[2] if match[2] == "*" else int(match[2]))
        rest = rest[match.end() :]
    if steps.count("*") > 1:
        raise ValueError(f"The path {text!r} may hold [*] once: one answer an image.")
    return tuple(steps)


def follow(value: Any, path: Sequence[str | int]) -> Any:
    """Follow a path into JSON values.

    Args:
        value: JSON values.
        path: See `parsed_path`.

    Returns:
        What lies there; a list of that, if the path holds ``"*"``.

    Raises:
        ValueError: If there is nothing.
    """
    for position, step in enumerate(path):
        if step == "*":
            if not isinstance(value, list):
                raise ValueError(f"there is {shown(value)} where a list should be")
            return [follow(item, path[position + 1 :]) for item in value]
        if isinstance(step, str):
            if not isinstance(value, dict) or step not in value:
                raise ValueError(f"there is {shown(value)} without {step!r}")
            value = value[step]
        else:
            if not isinstance(value, list) or step >= len(value):
                raise ValueError(f"there is {shown(value)} without element {step}")
            value = value[step]
    return value


def shown(value: Any) -> str:
    """What a JSON value is, briefly: a hostile answer must not swell a message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_label(value: Any) -> bool:
    """Whether a JSON value is a number that may stand for a label."""
    return type(value) is int and 0 <= value < MOST_LABELS


def _count(template: Any) -> tuple[int, int]:
    """How often a template holds ``$image`` and ``$each``."""
    if isinstance(template, str):
        return template.count(IMAGE), 0
    parts = template.values() if isinstance(template, dict) else template if isinstance(template, list) else ()
    counts = [_count(part) for part in parts]
    each = isinstance(template, dict) and EACH in template
    return sum(count[0] for count in counts), each + sum(count[1] for count in counts)


def _each_holds_image(template: Any) -> bool:
    if isinstance(template, dict) and EACH in template:
        return len(template) == 1 and _count(template[EACH])[0] == 1
    parts = template.values() if isinstance(template, dict) else template if isinstance(template, list) else ()
    return any(_each_holds_image(part) for part in parts)
