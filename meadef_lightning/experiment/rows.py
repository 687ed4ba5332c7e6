"""The rows of ``report.json``: what is said of the key, the victim, a suspect, a removal and a detection, and its checks.

All rates are fractions in [0, 1].
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

PAPER_THRESHOLD = 0.30  # IEEE S&P 2024: WSR above which the paper claims ownership

Kind = Literal["extracted", "removed", "independent", "victim"]
Labels = Literal["soft", "hard", "topk", "feature"]
Verdict = Literal["supported", "inconclusive", "not supported"]

_SEED_SUFFIX = re.compile(r"(?P<name>.+)/seed-(?P<seed>\d+)")


def rate(name: str, value: Any) -> float:
    """Checks a rate in [0, 1]."""
    # Real and Integral rather than float and int: NumPy's scalars are welcome, booleans are not
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], not {value!r}")
    return float(value)


def finite(name: str, value: Any) -> float:
    """Checks a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def whole(name: str, value: Any) -> int:
    """Checks a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, not {value!r}")
    return int(value)


def text(name: str, value: Any, empty: bool = False) -> str:
    """Checks a string that can be shown."""
    # printable, because names end up on terminals: no escape sequences, no line breaks
    if not isinstance(value, str) or not (value or empty) or not value.isprintable():
        raise ValueError(f"{name} must be a printable{'' if empty else ', non-empty'} string, not {value!r}")
    return value


def choice(name: str, value: Any, kinds: Any) -> None:
    """Checks one of the values of a literal type."""
    if value not in get_args(kinds):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, not {value!r}")


def members_of(where: str, obj: Any, cls: type) -> dict[str, Any]:
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
        text("commitment", self.commitment)
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
            object.__setattr__(self, item.name, rate(item.name, getattr(self, item.name)))


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
        text("name", self.name)
        text("attack", self.attack, empty=True)
        for name, kinds in (("kind", Kind), ("labels", Labels), ("verdict", Verdict)):
            choice(name, getattr(self, name), kinds)
        object.__setattr__(self, "queries", whole("queries", self.queries))
        for name in ("accuracy", "fidelity", "wsr", "wfpr", "p_value"):
            object.__setattr__(self, name, rate(name, getattr(self, name)))
        if not isinstance(self.wsr_ci, (list, tuple)) or len(self.wsr_ci) != 2:
            raise ValueError(f"wsr_ci must be two numbers, low and high, not {self.wsr_ci!r}")
        low, high = (rate("wsr_ci", value) for value in self.wsr_ci)
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
class PathPoint:
    """One point on the path of a removal.

    Args:
        strength: How far the thief went, in the removal's unit; 0 is the model before it.
        accuracy: Test accuracy there, in [0, 1].
        wsr: Watermark success rate there.
        wfpr: Watermark false-positive rate there.
    """

    strength: float
    accuracy: float
    wsr: float
    wfpr: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", finite("strength", self.strength))
        for name in ("accuracy", "wsr", "wfpr"):
            object.__setattr__(self, name, rate(name, getattr(self, name)))


@dataclass(frozen=True)
class RemovalRow:
    """The path of one removal on one model. The patched positive control is no suspect, but has paths, too.

    Args:
        name: ``TARGET.REMOVAL``, ending in ``/seed-<n>`` in experiments of several seeds.
        target: the model it acts on.
        attack: the removal.
        unit: what its strength counts.
        points: accuracy that the thief gives away at most, in [0, 1].
        chosen: the strength that he takes home: the last within his budget.
        curve: the path, the untouched model first.
        gains: what the thief has won besides, e.g. accuracy on another task; rates in [0, 1] by name.
    """

    name: str
    target: str
    attack: str
    unit: str
    points: float
    chosen: float
    curve: tuple[PathPoint, ...]
    gains: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "target", "attack", "unit"):
            text(name, getattr(self, name))
        object.__setattr__(self, "points", rate("points", self.points))
        object.__setattr__(self, "chosen", finite("chosen", self.chosen))
        object.__setattr__(self, "curve", tuple(self.curve))
        if not self.curve:
            raise ValueError("curve must hold at least one point")
        if not isinstance(self.gains, Mapping):
            raise ValueError(f"gains must be an object, not {self.gains!r}")
        object.__setattr__(
            self, "gains", {text("gains", name): rate(name, value) for name, value in self.gains.items()}
        )


@dataclass(frozen=True)
class DetectionRow:
    """What one search for a watermark found.

    Args:
        attack: the detector.
        target: the model it searched, or whose queries it screened.
        level: ``model`` or ``inputs``.
        score: how suspicious the model is (largest finite number for infinite ones); the mean over the watermark samples for ``inputs``.
        threshold: the method's own.
        decision: whether the model is called marked; for ``inputs``, whether most of the watermark samples are.
        auc: area under the ROC curve: this model against the clean ones, or its watermark samples against natural ones; null where
            there is nothing to compare with.
        true_rate: share of watermark samples, or of the searched models, that are flagged, whatever for.
        false_rate: share of natural samples, or of clean models, that are flagged.
        named_target: share of the searched models of whose flagged classes one is the mark's target: a model that is flagged for other
            classes only is a false alarm; null for ``inputs``.
        key_rank: where the key's sources and target stand among all that the method ranks, 1 for the most suspicious, the median over
            seeds; null where it ranks none, where the model's mark is no key's, and where a search of an earlier release has not kept it.
    """

    attack: str
    target: str
    level: Literal["model", "inputs"]
    score: float
    threshold: float
    decision: bool
    auc: float | None
    true_rate: float | None
    false_rate: float | None
    named_target: float | None = None
    key_rank: float | None = None

    def __post_init__(self) -> None:
        text("attack", self.attack)
        text("target", self.target)
        if self.level not in ("model", "inputs"):
            raise ValueError(f"level must be model or inputs, not {self.level!r}")
        for name in ("score", "threshold"):
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        if not isinstance(self.decision, bool):
            raise ValueError(f"decision must be true or false, not {self.decision!r}")
        for name in ("auc", "true_rate", "false_rate", "named_target"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, rate(name, getattr(self, name)))
        if self.key_rank is not None:
            object.__setattr__(self, "key_rank", finite("key_rank", self.key_rank))
            if self.key_rank < 1:
                raise ValueError(f"key_rank must be at least 1, the most suspicious, not {self.key_rank!r}")
