"""A verdict's evidence: one JSON file from which anybody who holds the key derives the verdict again, without the suspect.

The key is never in it, and neither are its classes. Raw answers would name the target (it is what most triggers get), and the
table of cells would let anyone look up the key with the published statistic. So the answers to composites are written with the
classes renamed and the cells in another order, both a secret function of the key's salt, which :func:`check_evidence` undoes.
(Somebody who can query the suspect without limit can still try all keys of the public key space on it; no file prevents that.)

Each field carries a seal, an HMAC under the key's salt: whoever does not hold the key cannot change a field unnoticed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from meadef_lightning.__about__ import __version__
from meadef_lightning.verification.statistics import MAX_DECOYS, DecoyTable, seeded_permutation
from meadef_lightning.verification.verdict import Responses, Verdict, judge
from meadef_lightning.watermark.key import WatermarkKey

SCHEMA_VERSION = 2
"""1 ranked keys by their own cell alone (no neighbours); such evidence must be checked by the version that wrote it."""
MAX_EVIDENCE_BYTES = 256 << 20
_LABELLED = ("trigger", "control", "natural", "natural_labels")


class EvidenceError(ValueError):
    """The evidence is malformed, was changed, or belongs to another key; the message names what differs."""


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _absorb(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def tensors_fingerprint(*tensors: Tensor) -> str:
    """Returns the SHA-256 over dtypes, shapes and bytes of the tensors, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for position, tensor in enumerate(tensors):
        _absorb(digest, str(position), tensor)
    return digest.hexdigest()


def model_fingerprint(module: nn.Module) -> str:
    """Returns the SHA-256 over a module's ``state_dict``: names, dtypes, shapes and bytes of its tensors.

    It does not depend on the device or on ``torch.compile``. State that is no tensor counts by its name only.
    """
    digest = hashlib.sha256()
    state = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    for name in sorted(state):
        _absorb(digest, name, state[name] if isinstance(state[name], Tensor) else torch.empty(0))
    return digest.hexdigest()


def _blinding(key: WatermarkKey, seed: int, cells: int) -> tuple[Tensor, Tensor]:
    """Returns the secret names of the classes and the secret order of the cells."""
    return (
        seeded_permutation(key.num_classes, "blind classes", key.salt, seed),
        seeded_permutation(cells, "blind cells", key.salt, seed),
    )


@dataclass(frozen=True)
class Evidence:
    """What is kept of a verification.

    Args:
        schema_version: Version of this form.
        key: ``commitment`` (SHA-256), ``drawn_uniformly`` and ``num_classes``.
        model: ``sha256`` of the suspect's weights (:func:`model_fingerprint`), or null for a black box.
        data: ``verification`` and ``test``: SHA-256 of the samples and labels (:func:`tensors_fingerprint`).
        procedure: ``alpha``, ``decoys``, ``seed`` and ``null_statistics``.
        answers: ``trigger``, ``control``, ``cells`` (one row of counts a cell) and ``reference`` (the same of a reference model, or
            null), all with blinded classes; ``natural`` and
            ``natural_labels`` as they are.
        verdict: ``Verdict.to_dict()``.
        versions: ``package``, ``torch``, ``lightning`` and ``python``.
        created: UTC time, ISO 8601. Only it and its seal differ between two runs of the same verification.
        seal: HMAC-SHA256 of every field, by name.
    """

    schema_version: int
    key: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    procedure: Mapping[str, Any]
    answers: Mapping[str, Any]
    verdict: Mapping[str, Any]
    versions: Mapping[str, Any]
    created: str
    seal: Mapping[str, str]

    @classmethod
    def collect(
        cls,
        verdict: Verdict,
        responses: Responses,
        key: WatermarkKey,
        *,
        model_sha256: str | None,
        data_sha256: Mapping[str, str],
        null_statistics: Sequence[float] | None = None,
    ) -> Evidence:
        """Makes the evidence of a verdict.

        Args:
            verdict: The verdict of :func:`~meadef_lightning.verification.verdict.judge`.
            responses: The answers that it was judged by.
            key: The key.
            model_sha256: Fingerprint of the suspect; ``None`` if only its answers are known.
            data_sha256: Fingerprints of the splits ``verification`` and ``test``.
            null_statistics: What ``judge`` was given.
        """
        classes, order = _blinding(key, responses.seed, len(responses.counts))
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "key": {name: getattr(key, name) for name in ("drawn_uniformly", "num_classes")}
            | {"commitment": key.commitment()},
            "model": {"sha256": model_sha256},
            "data": {"verification": data_sha256["verification"], "test": data_sha256["test"]},
            "procedure": {
                "alpha": verdict.alpha,
                "decoys": responses.decoys,
                "seed": responses.seed,
                "null_statistics": None if null_statistics is None else [float(value) for value in null_statistics],
            },
            "verdict": verdict.to_dict(),
            "versions": {
                "package": __version__,
                "torch": str(torch.__version__),
                "lightning": lightning.__version__,
                "python": platform.python_version(),
            },
            "answers": {
                "trigger": classes[responses.trigger].tolist(),
                "control": classes[responses.control].tolist(),
                # column c of the file is the class that is named c; row r is cell order[r]
                "cells": responses.counts[order][:, classes.argsort()].tolist(),
                "reference": None
                if responses.reference is None
                else responses.reference[order][:, classes.argsort()].tolist(),
                "natural": responses.natural.tolist(),
                "natural_labels": responses.natural_labels.tolist(),
            },
        }
        return cls(**content, seal=_seal(content, key))

    def save(self, path: str | Path) -> Path:
        """Writes the evidence as JSON, atomically.

        Raises:
            OSError: If it cannot be written; the message names the path and the remedy.
        """
        path = Path(path)
        fields_text = [
            f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in asdict(self).items()
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(("{\n" + ",\n".join(fields_text) + "\n}\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)  # evidence is for others; mkstemp made it private
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OSError(
                error.errno, f"Cannot write evidence to {path} ({error.strerror}); choose another path."
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Reads an evidence file, which may come from anybody, and checks its form (not yet its content).

        Raises:
            EvidenceError: If it is missing, too large, not JSON, or not of this form; the message names the field.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                text = file.read(MAX_EVIDENCE_BYTES + 1)
        except OSError as error:
            raise EvidenceError(f"Cannot read the evidence {path}: {error.strerror}.") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: bytes, name: str) -> Evidence:
        """Reads the content of an evidence file, as :meth:`load` does.

        Args:
            text: The content.
            name: What messages call it.

        Raises:
            EvidenceError: As :meth:`load`.
        """
        if len(text) > MAX_EVIDENCE_BYTES:
            raise EvidenceError(f"{name} is larger than {MAX_EVIDENCE_BYTES} bytes; this is not evidence of ours.")
        try:
            content = json.loads(text.decode(), parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError) as error:
            raise EvidenceError(f"{name} is not evidence: it is not valid JSON ({error}).") from error
        try:
            _check_form(content)
        except EvidenceError as error:
            raise EvidenceError(f"{name} is not evidence of this form: {error}") from error
        return cls(**content)

    def check(self, key: WatermarkKey) -> Verdict:
        """Derives the verdict again from the answers and the key.

        Args:
            key: The key that the evidence is about.

        Returns:
            The verdict, which equals the recorded one.

        Raises:
            EvidenceError: If the key is another one, a field was changed, or the verdict does not follow from the answers; the
                message names the fields.
        """
        if self.key["commitment"] != key.commitment():
            raise EvidenceError(
                "key.commitment differs: the evidence is about another key, or was changed. Use the key that was verified."
            )
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seal"}
        expected = _seal(content, key)
        changed = [
            name for name in sorted(expected.keys() | self.seal.keys()) if expected.get(name) != self.seal.get(name)
        ]
        if changed:
            raise EvidenceError(
                f"The evidence was changed after it was made. Fields that differ: {', '.join(changed)}."
            )
        procedure = self.procedure
        try:
            verdict = judge(self._responses(key), key, procedure["alpha"], procedure["null_statistics"])
        except ValueError as error:
            raise EvidenceError(f"The answers in the evidence cannot be judged: {error}") from error
        derived, recorded = _coarse(verdict.to_dict()), _coarse(self.verdict)
        different = [f"verdict.{name}" for name in sorted(derived) if derived[name] != recorded[name]]
        if different:
            raise EvidenceError(
                f"The verdict does not follow from the answers. Fields that differ: {', '.join(different)}."
            )
        return verdict

    def _responses(self, key: WatermarkKey) -> Responses:
        """Undoes the blinding."""
        decoys, seed = self.procedure["decoys"], self.procedure["seed"]
        cells = DecoyTable(key, decoys, seed).cells
        counts = torch.tensor(self.answers["cells"], dtype=torch.int64)
        labels = {name: torch.tensor(self.answers[name], dtype=torch.int64) for name in _LABELLED}
        classes, order = _blinding(key, seed, len(cells))
        named = classes.argsort()
        known = self.answers["reference"]
        reference = None if known is None else torch.tensor(known, dtype=torch.int64)
        for name, table in (("cells", counts), ("reference", reference)):
            if table is not None and len(table) != len(cells):
                raise ValueError(f"answers.{name} must have {len(cells)} rows, got {len(table)}.")
        return Responses(
            trigger=named[labels["trigger"]],
            control=named[labels["control"]],
            cells=cells,
            counts=counts[order.argsort()][:, classes],
            natural=labels["natural"],
            natural_labels=labels["natural_labels"],
            decoys=decoys,
            seed=seed,
            reference=None if reference is None else reference[order.argsort()][:, classes],
        )


def check_evidence(path: str | Path, key: WatermarkKey) -> Verdict:
    """Checks an evidence file offline: nothing but the file and the key is needed.

    Args:
        path: The file.
        key: The key that it is about.

    Returns:
        The verdict, derived again from the raw answers.

    Raises:
        EvidenceError: If the file is malformed or oversized, about another key, was changed, or does not bear out its verdict; the
            message names the fields that differ.
    """
    return Evidence.load(path).check(key)


def _seal(content: Mapping[str, Any], key: WatermarkKey) -> dict[str, str]:
    """Returns an HMAC of each field, one level deep, so that a change can be named."""
    leaves: dict[str, Any] = {}
    for name, section in content.items():
        parts = section.items() if isinstance(section, Mapping) else [("", section)]
        leaves |= {f"{name}.{part}".rstrip("."): value for part, value in parts}
    secret = f"meadef_lightning evidence {SCHEMA_VERSION} {key.salt}".encode()
    return {
        path: hmac.new(secret, _canonical([path, value]), hashlib.sha256).hexdigest()
        for path, value in sorted(leaves.items())
    }


def _coarse(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds every number to nine digits: another version of SciPy may differ in the last ones."""
    value: dict[str, Any] = json.loads(json.dumps(values), parse_float=lambda text: f"{float(text):.9g}")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is not a finite number")
    return value


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
_FLAT = (_is_flat, "a value, or a list or object of values")
_FORM: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema_version": (
        _integer(SCHEMA_VERSION, SCHEMA_VERSION)[0],
        f"{SCHEMA_VERSION}, which this package derives; check evidence of another version with the package version that it names",
    ),
    "created": _TEXT,
    "key.commitment": _HASH,
    "key.drawn_uniformly": (lambda value: type(value) is bool, "true or false"),
    "key.num_classes": _integer(3, 1 << 20),
    "model.sha256": (lambda value: value is None or _is_hash(value), "64 hexadecimal digits or null"),
    "data.verification": _HASH,
    "data.test": _HASH,
    "procedure.alpha": (_is_number, "a finite number"),
    "procedure.decoys": _integer(1, MAX_DECOYS),
    "procedure.seed": _integer(0, (1 << 63) - 1),
    "procedure.null_statistics": _NUMBERS,
    "answers.cells": _ROWS,
    "answers.reference": (lambda value: value is None or _ROWS[0](value), "a list of rows of counts, or null"),
    **{f"answers.{name}": _LABELS for name in _LABELLED},
    # the verdict is derived again and compared, so all that matters here is that it can be
    **{f"verdict.{field.name}": _FLAT for field in fields(Verdict)},
    **{f"versions.{name}": _TEXT for name in ("package", "torch", "lightning", "python")},
    "seal": (lambda value: isinstance(value, dict) and all(map(_is_hash, value.values())), "hashes by field"),
}


def _check_form(content: Any) -> None:
    """Checks names, types and ranges of parsed JSON that may be hostile; raises ``EvidenceError`` naming the field."""
    sections = {path.partition(".")[0] for path in _FORM if "." in path}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in sections):
        raise EvidenceError(f"it must be an object with the objects {', '.join(sorted(sections))}.")
    fits, what = _FORM["schema_version"]  # first: evidence of another version may well have other fields
    if "schema_version" in content and not fits(content["schema_version"]):
        raise EvidenceError(f"schema_version must be {what}.")
    found = {name for name in content if name not in sections}
    found |= {f"{name}.{part}" for name in sections for part in content[name]}
    if wrong := sorted(found ^ _FORM.keys()):
        raise EvidenceError(f"missing or unknown fields: {', '.join(wrong)[:500]}.")
    for path, (fits, what) in _FORM.items():
        section, _, part = path.partition(".")
        if not fits(content[section][part] if part else content[section]):
            raise EvidenceError(f"{path} must be {what}.")
    classes, answers = content["key"]["num_classes"], content["answers"]
    for name in _LABELLED:
        if max(answers[name], default=0) >= classes:
            raise EvidenceError(f"answers.{name} holds classes above {classes - 1}.")
    for name in ("cells", "reference"):
        if any(len(row) != classes for row in answers[name] or ()):
            raise EvidenceError(f"answers.{name} must have rows of key.num_classes = {classes} counts.")
