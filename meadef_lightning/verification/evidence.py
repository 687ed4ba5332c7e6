"""A verdict's evidence: one JSON file from which anybody who holds the key derives the verdict again, without the suspect.

The key is never in it, and neither are its classes: the answers are encrypted, so that only the key opens them, and each field carries a seal
(:mod:`~meadef_lightning.verification.sealing`). Somebody who can query the suspect without limit can still try all keys of the public key space
on it; no file prevents that.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meadef_lightning.verification.commitment import now, versions
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.evidence_form import (
    LABELLED,
    SCHEMA_VERSION,
    EvidenceError,
    check_answers,
    check_form,
    finite,
    listed,
    unique,
)
from meadef_lightning.verification.labels import LabelMap
from meadef_lightning.verification.remaining import UNIT
from meadef_lightning.verification.responses import Reference, Responses, SoftAnswers
from meadef_lightning.verification.sealing import hide, reveal, seals
from meadef_lightning.verification.verdict import Verdict, judge
from meadef_lightning.watermark.key import WatermarkKey

MAX_EVIDENCE_BYTES = 256 << 20


def check_size(table: DecoyTable, references: int) -> None:
    """Refuses a verification whose evidence would be too large to be read again, before anything is asked.

    Args:
        table: The keys that are compared.
        references: Number of reference models whose answers go into the evidence, too.

    Raises:
        ValueError: If so; the message says how many decoys would do.
    """
    entries = len(table.pairs) * len(table.space.combiners) * table.width * (1 + references)
    # a count is a digit, as nearly all are 0; shares have the digits of what a class gets of some 32 samples; each with a comma and a space
    share = max(32 * UNIT // (table.key.num_classes - 2), 1)
    if (3 + len(str(share)) + 2) * entries > MAX_EVIDENCE_BYTES:
        raise ValueError(
            f"The evidence would hold {entries:.2g} counts and shares and be larger than {MAX_EVIDENCE_BYTES >> 20} MiB, which nobody could check. "
            f"Nothing was asked. Use fewer decoys than {table.decoys}, of which 999 reach p = 0.001, or fewer reference models."
        )


@dataclass(frozen=True)
class Evidence:
    """What is kept of a verification.

    Args:
        schema_version: Version of this form.
        key: ``commitment`` (SHA-256), ``drawn_uniformly`` and ``num_classes``.
        model: ``sha256`` of the suspect's weights (:func:`~.fingerprints.model_fingerprint`), or null for a black box, and those of the
            ``references``, a list.
        data: ``verification`` and ``test``: SHA-256 of the samples and labels (:func:`~.fingerprints.tensors_fingerprint`).
        procedure: ``alpha``, ``decoys``, ``seed``, ``null_statistics``, and ``labels``: what the suspect's labels were taken to stand for
            (``LabelMap.to_dict()``; the answers below are translated already), or null where they are the classes.
        answers: Encrypted, what :meth:`opened` returns.
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
    answers: str
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
        data_sha256: Mapping[str, str],
        null_statistics: Sequence[float] | None = None,
        labels: LabelMap | None = None,
    ) -> Evidence:
        """Makes the evidence of a verdict.

        Args:
            verdict: The verdict of :func:`~meadef_lightning.verification.verdict.judge`.
            responses: The answers that it was judged by.
            key: The key.
            data_sha256: Fingerprints of the splits ``verification`` and ``test``.
            null_statistics: What ``judge`` was given.
            labels: How the suspect's answers were translated into classes, if they were.
        """
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "created": now(),
            "key": {name: getattr(key, name) for name in ("drawn_uniformly", "num_classes")}
            | {"commitment": key.commitment()},
            "model": {
                "sha256": responses.model_sha256,
                "references": [known.model_sha256 for known in responses.references],
            },
            "data": {"verification": data_sha256["verification"], "test": data_sha256["test"]},
            "procedure": {
                "alpha": verdict.alpha,
                "decoys": responses.decoys,
                "seed": responses.seed,
                "null_statistics": None if null_statistics is None else [float(value) for value in null_statistics],
                "labels": None if labels is None else labels.to_dict(),
            },
            "verdict": verdict.to_dict(),
            "versions": versions(),
            "answers": hide(
                {
                    "trigger": responses.trigger.tolist(),
                    "control": responses.control.tolist(),
                    "cells": responses.counts.tolist(),
                    "references": [known.counts.tolist() for known in responses.references],
                    "natural": responses.natural.tolist(),
                    "natural_labels": responses.natural_labels.tolist(),
                    "soft": _soft(responses),
                },
                key,
            ),
        }
        return cls(**content, seal=seals(content, key))

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

    def opened(self, key: WatermarkKey) -> dict[str, Any]:
        """Decrypts the answers.

        Args:
            key: The key that the evidence is about.

        Returns:
            ``trigger``, ``control``, ``natural`` and ``natural_labels`` (classes), ``cells`` (one row of counts a cell), ``references``
            (such a table of each reference model), and ``soft``: what probabilities say, ``trigger``, ``control``, ``cells`` and
            ``references`` of shares in thousandths, or null.

        Raises:
            EvidenceError: If the key is another one, or they were changed, or are not of this form.
        """
        answers: dict[str, Any] = reveal(self.answers, key, MAX_EVIDENCE_BYTES)
        check_answers(answers, key.num_classes, len(self.model["references"]))
        return answers

    @property
    def labels(self) -> LabelMap | None:
        """What the suspect's labels were taken to stand for, derived again from the counts; ``None`` where they are the classes.

        Raises:
            EvidenceError: If the recorded map does not follow from them.
        """
        recorded = self.procedure["labels"]
        try:
            return None if recorded is None else LabelMap.from_dict(recorded, self.key["num_classes"])
        except ValueError as error:
            raise EvidenceError(f"procedure.labels cannot be used: {error}.") from error

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
            content = json.loads(text.decode(), parse_float=finite, parse_constant=finite, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise EvidenceError(f"{name} is not evidence: it is not valid JSON ({error}).") from error
        try:
            check_form(content)
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
        for name in ("drawn_uniformly", "num_classes"):
            if self.key[name] != getattr(key, name):
                raise EvidenceError(
                    f"key.{name} differs: the evidence says something else of the key than the key itself."
                )
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seal"}
        expected = seals(content, key)
        changed = [
            name for name in sorted(expected.keys() | self.seal.keys()) if expected.get(name) != self.seal.get(name)
        ]
        if changed:
            raise EvidenceError(f"The evidence was changed after it was made. Fields that differ: {listed(changed)}.")
        procedure, _ = self.procedure, self.labels
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
        """Reads the answers as what ``judge`` takes."""
        decoys, seed = self.procedure["decoys"], self.procedure["seed"]
        plan, answers = DecoyTable(key, decoys, seed), self.opened(key)
        shape = (len(plan.cells), plan.width)
        tables = [("cells", answers["cells"]), *(("references", table) for table in answers["references"])]
        for name, table in tables:
            if (rows := len(table)) != shape[0] or any(len(row) != shape[1] for row in table):
                raise ValueError(f"answers.{name} must have {shape[0]} rows of {shape[1]} counts, got {rows} rows.")
        counts, *known = (torch.tensor(table, dtype=torch.int64) for _, table in tables)
        soft, shares = _soft_answers(answers["soft"], len(known))
        return Responses(
            **{name: torch.tensor(answers[name], dtype=torch.int64) for name in LABELLED},
            cells=plan.cells,
            counts=counts,
            decoys=decoys,
            seed=seed,
            model_sha256=self.model["sha256"],
            references=tuple(Reference(*row) for row in zip(known, self.model["references"], shares, strict=True)),
            soft=soft,
        )


def _soft(responses: Responses) -> dict[str, Any] | None:
    """What probabilities say, as JSON values."""
    if responses.soft is None:
        return None
    soft, known = responses.soft, [reference.soft for reference in responses.references]
    return {
        "trigger": soft.trigger.tolist(),
        "control": soft.control.tolist(),
        "cells": soft.cells.tolist(),
        "references": [None if table is None else table.tolist() for table in known],
    }


def _soft_answers(value: Mapping[str, Any] | None, references: int) -> tuple[SoftAnswers | None, list[Tensor | None]]:
    """Reads what :func:`_soft` returned; tables that are none are refused later, by their shape."""
    if value is None:
        return None, [None] * references

    def table(rows: list[list[int]]) -> Tensor:
        if any(len(row) != len(rows[0]) for row in rows):
            raise ValueError("answers.soft has rows of different lengths.")
        return torch.tensor(rows, dtype=torch.int64)

    trigger, control = (torch.tensor(value[name], dtype=torch.int64) for name in ("trigger", "control"))
    known = [None if rows is None else table(rows) for rows in value["references"]]
    return SoftAnswers(trigger, control, table(value["cells"] or [])), known


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


def _coarse(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds every number to nine digits: another version of SciPy may differ in the last ones."""
    value: dict[str, Any] = json.loads(json.dumps(values), parse_float=lambda text: f"{float(text):.9g}")
    return value
