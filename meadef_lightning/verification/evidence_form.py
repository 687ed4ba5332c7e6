"""The form of an evidence file, which may come from anybody: names, types, ranges and times, before anything is computed with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from meadef_lightning.verification.decoys import MANY_CLASSES, MAX_DECOYS
from meadef_lightning.verification.verdict import Verdict

SCHEMA_VERSION = 5
"""1 ranked keys by their own cell alone (no neighbours), 2 let keys that were not drawn support a claim and did not tell what the
suspect's labels stand for, 3 renamed classes instead of encrypting answers, and did not weigh keys by how much references differ on
them, 4 looked at labels alone, and not at reversed sources; such evidence must be checked by the version that wrote it."""
LABELLED = ("trigger", "control", "natural", "natural_labels")
SOFT = {"trigger", "control", "cells", "references"}


class EvidenceError(ValueError):
    """The evidence is malformed, was changed, or belongs to another key; the message names what differs."""


def finite(text: str) -> float:
    """Reads a JSON number; raises ``ValueError`` on NaN and infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is not a finite number")
    return value


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object; raises ``ValueError`` where a name occurs twice, of which every reader may take another one."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has two members of the same name")
    return content


def listed(names: Sequence[str]) -> str:
    """Lists names that may be a stranger's, without characters that a terminal obeys."""
    return ", ".join(ascii(name)[1:-1] for name in names)[:500]


def time_of(text: str) -> datetime:
    """Reads a time, ISO 8601 with its zone, so that times of several zones compare; raises ``ValueError`` on anything else."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None or not text.isascii() or not text.isprintable():
        raise ValueError("a time needs its zone")
    return time


def is_time(value: object) -> bool:
    """Whether a value is what :func:`time_of` reads."""
    try:
        return isinstance(value, str) and len(value) < 100 and time_of(value) is not None
    except ValueError:
        return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


def _is_flat(value: object) -> bool:
    values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    return not any(isinstance(inner, list | dict) for inner in values)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _integer(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}"


_COUNT = _integer(0, 1 << 20)
_HASH = (_is_hash, "64 hexadecimal digits")
_TEXT = (lambda value: isinstance(value, str), "a string")
_LABELS = (lambda value: isinstance(value, list) and all(map(_COUNT[0], value)), "a list of classes")
_ROWS = (lambda value: isinstance(value, list) and all(map(_LABELS[0], value)), "a list of rows of counts")
_NUMBERS = (lambda value: value is None or (isinstance(value, list) and all(map(_is_number, value))), "numbers or null")
_TABLES = (lambda value: isinstance(value, list) and all(map(_ROWS[0], value)), "a list of tables of counts")
_WHOLE = (
    lambda value: isinstance(value, list) and all(type(n) is int and 0 <= n <= 1 << 40 for n in value),
    "a list of whole numbers",
)


def _is_soft(value: object) -> bool:
    """Whether a value is null or holds what :class:`~.responses.SoftAnswers` does."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != SOFT or not isinstance(value["references"], list):
        return False
    # a reference that answered with labels has no table
    tables = [value["cells"], *(table for table in value["references"] if table is not None)]
    return all(_WHOLE[0](value[name]) for name in ("trigger", "control")) and all(
        isinstance(table, list) and all(map(_WHOLE[0], table)) for table in tables
    )


_HASHES = (
    lambda value: isinstance(value, list) and all(one is None or _is_hash(one) for one in value),
    "a list of 64 hexadecimal digits or null each",
)
_FLAT = (_is_flat, "a value, or a list or object of values")
_FORM: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema_version": (
        _integer(SCHEMA_VERSION, SCHEMA_VERSION)[0],
        f"{SCHEMA_VERSION}, which this package derives; check evidence of another version with the package version that it names",
    ),
    "created": (is_time, "a time with its zone, ISO 8601"),
    "key.commitment": _HASH,
    "key.drawn_uniformly": (lambda value: type(value) is bool, "true or false"),
    "key.num_classes": _integer(3, 1 << 20),
    "model.references": _HASHES,
    "model.sha256": (lambda value: value is None or _is_hash(value), "64 hexadecimal digits or null"),
    "data.verification": _HASH,
    "data.test": _HASH,
    "procedure.alpha": (_is_number, "a finite number"),
    "procedure.decoys": _integer(1, MAX_DECOYS),
    "procedure.seed": _integer(0, (1 << 63) - 1),
    "procedure.null_statistics": _NUMBERS,
    "procedure.labels": (lambda value: value is None or isinstance(value, dict), "an object or null"),
    "answers": _TEXT,
    # the verdict is derived again and compared, so all that matters here is that it can be
    **{f"verdict.{field.name}": _FLAT for field in fields(Verdict)},
    **{f"versions.{name}": _TEXT for name in ("package", "torch", "lightning", "python")},
    "seal": (lambda value: isinstance(value, dict) and all(map(_is_hash, value.values())), "hashes by field"),
}
_ANSWERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "cells": _ROWS,
    "references": _TABLES,
    "soft": (_is_soft, f"null or an object of {', '.join(sorted(SOFT))}, lists or tables of whole numbers"),
    **dict.fromkeys(LABELLED, _LABELS),
}


def check_form(content: Any) -> None:
    """Checks names, types and ranges of parsed JSON that may be hostile; raises ``EvidenceError`` naming the field."""
    sections = {path.partition(".")[0] for path in _FORM if "." in path}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in sections):
        raise EvidenceError(f"it must be an object with the objects {', '.join(sorted(sections))}.")
    fits, what = _FORM["schema_version"]  # first: evidence of another version may well have other fields
    if "schema_version" in content and not fits(content["schema_version"]):
        raise EvidenceError(f"schema_version must be {what}.")
    whole = {path for path in _FORM if "." not in path}
    wrong = sorted((content.keys() - sections) ^ whole)  # by themselves: a name may hold a dot
    wrong += sorted({f"{name}.{part}" for name in sections for part in content[name]} ^ (_FORM.keys() - whole))
    if wrong:
        raise EvidenceError(f"missing or unknown fields: {listed(wrong)}.")
    for path, (fits, what) in _FORM.items():
        section, _, part = path.partition(".")
        if not fits(content[section][part] if part else content[section]):
            raise EvidenceError(f"{path} must be {what}.")


def check_answers(answers: Any, classes: int, references: int) -> None:
    """Checks names, types and ranges of decrypted answers, whose writer held the key but may lie.

    Args:
        answers: JSON values.
        classes: Classes of the task.
        references: How many reference models there were.

    Raises:
        EvidenceError: If something is wrong; the message names the field.
    """
    if not isinstance(answers, dict) or answers.keys() != _ANSWERS.keys():
        raise EvidenceError(f"answers must be an object of {', '.join(sorted(_ANSWERS))}.")
    for name, (fits, what) in _ANSWERS.items():
        if not fits(answers[name]):
            raise EvidenceError(f"answers.{name} must be {what}.")
    for name in LABELLED:
        if max(answers[name], default=0) >= classes:
            raise EvidenceError(f"answers.{name} holds classes above {classes - 1}.")
    if len(answers["references"]) != references:
        raise EvidenceError(f"answers.references must be {references} tables, one for each of model.references.")
    if answers["soft"] is not None and len(answers["soft"]["references"]) != references:
        raise EvidenceError(f"answers.soft.references must be {references} tables, one for each of model.references.")
    for name, tables in (("cells", [answers["cells"]]), ("references", answers["references"])):
        if classes <= MANY_CLASSES and any(len(row) != classes for table in tables for row in table):
            raise EvidenceError(f"answers.{name} must have rows of key.num_classes = {classes} counts.")
