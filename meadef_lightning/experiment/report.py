"""What an experiment found: the schema of ``report.json``.

Other programs read it; whatever changes its form changes `SCHEMA_VERSION`. All rates are fractions in [0, 1].
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from meadef_lightning.experiment.artifacts import read_json

if TYPE_CHECKING:
    pass

SCHEMA_VERSION = 1
PAPER_THRESHOLD = 0.30  # IEEE S&P 2024: WSR above which the paper claims ownership

Kind = Literal["extracted", "removed", "independent", "victim"]
Labels = Literal["soft", "hard", "topk", "feature"]
Verdict = Literal["supported", "inconclusive", "not supported"]

_SEED_SUFFIX = re.compile(r"(?P<name>.+)/seed-(?P<seed>\d+)")


def _rate(name: str, value: Any) -> float:
    # Real and Integral rather than float and int: NumPy's scalars are welcome, booleans are not
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], not {value!r}")
    return float(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, not {value!r}")
    return int(value)


def _text(name: str, value: Any, empty: bool = False) -> str:
    # printable, because names end up on terminals: no escape sequences, no line breaks
    if not isinstance(value, str) or not (value or empty) or not value.isprintable():
        raise ValueError(f"{name} must be a printable{'' if empty else ', non-empty'} string, not {value!r}")
    return value


def _choice(name: str, value: Any, kinds: Any) -> None:
    if value not in get_args(kinds):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, not {value!r}")


def _check_version(version: Any) -> None:
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version {version!r} is unknown: this package reads version {SCHEMA_VERSION}. "
            "Install the release that wrote the report, or write it again with this one."
        )


def _fields(where: str, obj: Any, cls: type) -> dict[str, Any]:
    """The members of a JSON object, which must be exactly the fields of a dataclass."""
    names = {item.name for item in dataclasses.fields(cls)}
    if not isinstance(obj, Mapping) or set(obj) != names:
        found = (
            f"missing {sorted(names - set(obj))}, unknown {sorted(map(str, set(obj) - names))}" if obj else "nothing"
        )
        raise ValueError(f"{where} must be an object with {', '.join(sorted(names))} ({found})")
    return dict(obj)


@dataclass(frozen=True)
class KeyInfo:
    """What may be said in public about the watermark key.

    Args:
        commitment: hex digest published before deployment (`WatermarkKey.commitment`).
        drawn_uniformly: whether the key was drawn from its key space; only then are p-values exact.
    """

    commitment: str
    drawn_uniformly: bool

    def __post_init__(self) -> None:
        _text("commitment", self.commitment)
        if not isinstance(self.drawn_uniformly, bool):
            raise ValueError(f"drawn_uniformly must be true or false, not {self.drawn_uniformly!r}")


@dataclass(frozen=True)
class VictimRow:
    """The owner's model, all rates in [0, 1].

    Args:
        accuracy: test accuracy of the watermarked victim.
        clean_accuracy: test accuracy of the same training without a watermark, same seed.
        wsr: watermark success rate.
        wfpr: watermark false-positive rate.
    """

    accuracy: float
    clean_accuracy: float
    wsr: float
    wfpr: float

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _rate(item.name, getattr(self, item.name)))


@dataclass(frozen=True)
class SuspectRow:
    """One judged model, all rates in [0, 1].

    Args:
        name: unique in the report; ends in ``/seed-<n>`` in experiments of several seeds.
        kind: ``extracted``, ``removed`` (stolen, then scrubbed), ``independent`` (negative control) or ``victim``.
        attack: how the model was made; empty where nothing was attacked.
        labels: what the oracle answered, or what an independent model was trained on.
        queries: distinct inputs that the oracle was asked; 0 where it was not asked.
        accuracy: test accuracy.
        fidelity: agreement with the victim on test data.
        wsr: watermark success rate.
        wsr_ci: its 95 % Wilson interval, low and high.
        wfpr: watermark false-positive rate.
        p_value: decoy-key p-value.
        verdict: ``supported``, ``inconclusive`` or ``not supported``.
    """

    name: str
    kind: Kind
    attack: str
    labels: Labels
    queries: int
    accuracy: float
    fidelity: float
    wsr: float
    wsr_ci: tuple[float, float]
    wfpr: float
    p_value: float
    verdict: Verdict

    def __post_init__(self) -> None:
        _text("name", self.name)
        _text("attack", self.attack, empty=True)
        for name, kinds in (("kind", Kind), ("labels", Labels), ("verdict", Verdict)):
            _choice(name, getattr(self, name), kinds)
        object.__setattr__(self, "queries", _whole("queries", self.queries))
        for name in ("accuracy", "fidelity", "wsr", "wfpr", "p_value"):
            object.__setattr__(self, name, _rate(name, getattr(self, name)))
        if not isinstance(self.wsr_ci, (list, tuple)) or len(self.wsr_ci) != 2:
            raise ValueError(f"wsr_ci must be two numbers, low and high, not {self.wsr_ci!r}")
        low, high = (_rate("wsr_ci", value) for value in self.wsr_ci)
        if low > high:
            raise ValueError(f"wsr_ci must be in order, low before high, not {self.wsr_ci!r}")
        object.__setattr__(self, "wsr_ci", (low, high))

    @property
    def base_name(self) -> str:
        """The name without its ``/seed-<n>``."""
        match = _SEED_SUFFIX.fullmatch(self.name)
        return match["name"] if match else self.name

    @property
    def seed(self) -> int | None:
        """The seed that the name ends in, None where it names none."""
        match = _SEED_SUFFIX.fullmatch(self.name)
        return int(match["seed"]) if match else None

    @property
    def surprising(self) -> bool:
        """Whether the verdict contradicts what is known about the model: a missed theft or a false claim."""
        return self.verdict == ("supported" if self.kind == "independent" else "not supported")


@dataclass(frozen=True)
class Report:
    """Content of ``report.json``.

    Args:
        experiment: the experiment's name.
        seeds: the seeds it ran with; not empty, no repetitions.
        key: what may be said in public about the key.
        victim: the owner's model; with several seeds, means over them.
        suspects: all judged models, at least one of them ``independent`` as negative control.
        schema_version: form of the file, 1.

    Raises:
        ValueError: if any value has the wrong type or range, a name repeats, or the negative control is missing.
    """

    experiment: str
    seeds: tuple[int, ...]
    key: KeyInfo
    victim: VictimRow
    suspects: tuple[SuspectRow, ...]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_version(self.schema_version)
        _text("experiment", self.experiment)
        if not isinstance(self.seeds, (list, tuple)):
            raise ValueError(f"seeds must be a list, not {self.seeds!r}")
        object.__setattr__(self, "seeds", tuple(_whole("seeds", seed) for seed in self.seeds))
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be a non-empty list without repetitions, not {list(self.seeds)}")
        object.__setattr__(self, "suspects", tuple(self.suspects))
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
        }

    @classmethod
    def from_dict(cls, obj: Any) -> Report:
        """Checks plain JSON values and makes a report of them.

        Raises:
            ValueError: if anything is missing, unknown, of the wrong type or out of range; says where.
        """
        if isinstance(obj, Mapping) and "schema_version" in obj:
            _check_version(obj["schema_version"])  # first: of an unknown version nothing else can be judged
        members = _fields("report", obj, cls)
        if not isinstance(members["suspects"], list):
            raise ValueError("suspects must be a list")
        where = ""
        try:
            where = "key: "
            members["key"] = KeyInfo(**_fields("it", members["key"], KeyInfo))
            where = "victim: "
            members["victim"] = VictimRow(**_fields("it", members["victim"], VictimRow))
            rows = []
            for index, row in enumerate(members["suspects"]):
                where = f"suspects[{index}]: "
                rows.append(SuspectRow(**_fields("it", row, SuspectRow)))
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        return cls(**{**members, "suspects": tuple(rows)})

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
