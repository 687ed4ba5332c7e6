"""What an experiment found: the schema of ``report.json``.

Other programs read it; whatever changes what they find there changes `SCHEMA_VERSION`. Members that were added since (`_ADDED`) are null in
a report that was written without them.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meadef_lightning.experiment.artifacts import read_json
from meadef_lightning.experiment.rows import (
    DetectionRow,
    KeyInfo,
    PathPoint,
    RemovalRow,
    SuspectRow,
    VictimRow,
    members_of,
    text,
    whole,
)

SCHEMA_VERSION = 2
_LISTS: dict[str, type] = {"suspects": SuspectRow, "removal": RemovalRow, "detection": DetectionRow}
_ADDED: dict[type, tuple[str, ...]] = {DetectionRow: ("named_target", "key_rank")}


def _check_version(version: Any) -> None:
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version {version!r} is unknown: this package reads version {SCHEMA_VERSION}. "
            "Install the release that wrote the report, or write it again with this one."
        )


@dataclass(frozen=True)
class Report:
    """Content of ``report.json``.

    Args:
        experiment: the experiment's name.
        seeds: the seeds it ran with; not empty, no repetitions.
        key: what may be said in public about the key.
        victim: the owner's model; with several seeds, means over them.
        suspects: all judged models, at least one of them ``independent`` as negative control.
        removal: paths of the removal attacks.
        detection: what the searches for a watermark found.
        schema_version: form of the file, 2 (1 had neither removal nor detection).

    Raises:
        ValueError: if any value has the wrong type or range, a name repeats, or the negative control is missing.
    """

    experiment: str
    seeds: tuple[int, ...]
    key: KeyInfo
    victim: VictimRow
    suspects: tuple[SuspectRow, ...]
    removal: tuple[RemovalRow, ...] = ()
    detection: tuple[DetectionRow, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_version(self.schema_version)
        text("experiment", self.experiment)
        if not isinstance(self.seeds, (list, tuple)):
            raise ValueError(f"seeds must be a list, not {self.seeds!r}")
        object.__setattr__(self, "seeds", tuple(whole("seeds", seed) for seed in self.seeds))
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be a non-empty list without repetitions, not {list(self.seeds)}")
        for name in ("suspects", "removal", "detection"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        repeated = [name for name, times in Counter(row.name for row in self.suspects).items() if times > 1]
        if repeated:
            raise ValueError(f"suspect names must be unique, but {', '.join(map(repr, repeated))} occurs repeatedly")
        if not any(row.kind == "independent" for row in self.suspects):
            raise ValueError("suspects must hold at least one 'independent' model as negative control; add one")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, keys in the order of the schema."""
        rows = [{**dataclasses.asdict(row), "wsr_ci": list(row.wsr_ci)} for row in self.suspects]
        return {
            "schema_version": self.schema_version,
            "experiment": self.experiment,
            "seeds": list(self.seeds),
            "key": dataclasses.asdict(self.key),
            "victim": dataclasses.asdict(self.victim),
            "suspects": rows,
            "removal": [
                {**dataclasses.asdict(row), "curve": list(map(dataclasses.asdict, row.curve))} for row in self.removal
            ],
            "detection": [dataclasses.asdict(row) for row in self.detection],
        }

    @classmethod
    def from_dict(cls, obj: Any) -> Report:
        """Checks plain JSON values and makes a report of them.

        Raises:
            ValueError: if anything is missing, unknown, of the wrong type or out of range; says where.
        """
        if isinstance(obj, Mapping) and "schema_version" in obj:
            _check_version(obj["schema_version"])  # first: of an unknown version nothing else can be judged
        members = members_of("report", obj, cls)
        for name in _LISTS:
            if not isinstance(members[name], list):
                raise ValueError(f"{name} must be a list")
        where = ""
        try:
            where = "key: "
            members["key"] = KeyInfo(**members_of("it", members["key"], KeyInfo))
            where = "victim: "
            members["victim"] = VictimRow(**members_of("it", members["victim"], VictimRow))
            for name, row_type in _LISTS.items():
                rows = []
                for index, row in enumerate(members[name]):
                    where = f"{name}[{index}]: "
                    if isinstance(row, Mapping) and row:
                        row = {**dict.fromkeys(_ADDED.get(row_type, ())), **row}
                    values = members_of("it", row, row_type)
                    if row_type is RemovalRow:
                        if not isinstance(values["curve"], list):
                            raise ValueError("curve must be a list")
                        values["curve"] = tuple(
                            PathPoint(**members_of("a point", point, PathPoint)) for point in values["curve"]
                        )
                    rows.append(row_type(**values))
                members[name] = tuple(rows)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        return cls(**members)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Reads ``report.json``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or not a report; names the file and what is wrong with it.
        """
        obj = read_json(path)
        try:
            return cls.from_dict(obj)
        except ValueError as error:
            raise ValueError(f"{path} is not a valid report: {error}") from error
