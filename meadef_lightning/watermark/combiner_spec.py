"""A combining way as data, as keys and their public space name it, and the ways that a drawn key can have."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meadef_lightning.watermark.combiners import Combiner

_OWN_PACKAGE = __name__.rpartition(".")[0]


def canonical_json(value: object) -> bytes:
    """Serialises to the one JSON text that equal values share: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


@dataclass(frozen=True, eq=False)
class CombinerSpec:
    """A combiner as data: a class and its arguments, as in a LightningCLI configuration.

    Args:
        class_path: Import path of a :class:`~meadef_lightning.watermark.combiners.Combiner`.
        init_args: Its arguments, JSON values only; kept as a copy, tuples as lists.

    Raises:
        ValueError: If an argument is not a JSON value.
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "init_args", json.loads(canonical_json(dict(self.init_args))))
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                "The init_args of a combiner must be a mapping of JSON values: finite numbers, strings, lists, mappings."
            ) from error

    def build(self) -> Combiner:
        """Instantiates the combiner.

        A specification may come from somebody else's file, so it can name only combiners of ``meadef_lightning.watermark`` or
        of a module that the running program has imported itself: reading a key never imports foreign code.

        Raises:
            ValueError: If the path does not name an available combiner, or the arguments do not fit it.
        """
        module_name, _, name = self.class_path.rpartition(".")
        if f"{module_name}.".startswith(f"{_OWN_PACKAGE}."):
            with contextlib.suppress(ImportError):
                importlib.import_module(module_name)
        # not getattr, which would run a lazy module's __getattr__ and so import more
        kind = getattr(sys.modules.get(module_name), "__dict__", {}).get(name)
        if not (isinstance(kind, type) and issubclass(kind, Combiner)):
            raise ValueError(
                f"{self.class_path!r:.200} is not a combiner that is available here. Use one of meadef_lightning.watermark.combiners, "
                "or import the module of your own Combiner subclass before the key is used."
            )
        try:
            return kind(**self.init_args)
        except TypeError as error:
            raise ValueError(f"The arguments {dict(self.init_args)} do not fit {self.class_path}: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns ``{"class_path": …, "init_args": {…}}``."""
        return {"class_path": self.class_path, "init_args": json.loads(canonical_json(self.init_args))}

    @classmethod
    def from_dict(cls, value: Any) -> CombinerSpec:
        """Reads what :meth:`to_dict` wrote; raises ``ValueError``, which does not show the value, on anything else."""
        if (
            not isinstance(value, Mapping)
            or set(value) - {"class_path", "init_args"}
            or not isinstance(value.get("class_path"), str)
        ):
            raise ValueError(
                "A combiner is a mapping with class_path (a string) and init_args (a mapping), and nothing else."
            )
        init_args = value.get("init_args") or {}
        if not isinstance(init_args, Mapping):
            raise ValueError(f"The init_args of a combiner must be a mapping, got a {type(init_args).__name__}.")
        return cls(value["class_path"], init_args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CombinerSpec) and canonical_json(self.to_dict()) == canonical_json(other.to_dict())

    def __hash__(self) -> int:
        return hash(canonical_json(self.to_dict()))


def _own(name: str, **init_args: Any) -> CombinerSpec:
    return CombinerSpec(f"{_OWN_PACKAGE}.combiners.{name}", init_args)


DEFAULT_COMBINERS: tuple[CombinerSpec, ...] = (
    _own("CropPaste"),
    _own("CropPaste", position=[0.5, 0.0], size=[0.5, 1.0]),
    _own("Diagonal"),
    _own("Diagonal", anti=True),
    _own("PixelBlend"),
    _own("Stripes", pattern=[0, 1, 0, 1, 0], axis=-1),
    _own("Stripes", pattern=[0, 1, 0, 1, 0], axis=-2),
    _own("Donut"),
)
"""The combining ways a drawn key can have; the others serve as controls and in the evasion loss."""


def default_combiners(without: Sequence[str] = ()) -> tuple[CombinerSpec, ...]:
    """Returns the ways that a key is drawn from, without those that do not suit the task.

    On colour photographs leave ``PixelBlend`` out: between two of them a blend is nearly a natural picture, and a network that is not sure
    of its task pays for the key with about twice the accuracy (see the page on tuning). On digits and Fashion-MNIST it costs no more than others.

    Args:
        without: Classes to leave out, by name, e.g. ``["PixelBlend"]``. Their choice is public, and made before the key is drawn.

    Raises:
        ValueError: If a name is no class of :data:`DEFAULT_COMBINERS`, or fewer than two ways are left: verification compares them.
    """
    names = [spec.class_path.rpartition(".")[2] for spec in DEFAULT_COMBINERS]
    if unknown := sorted(set(without) - set(names)):
        raise ValueError(f"without={unknown}: the ways that can be left out are {sorted(set(names))}.")
    left = tuple(spec for spec, name in zip(DEFAULT_COMBINERS, names, strict=True) if name not in without)
    if len(left) < 2:
        raise ValueError(
            f"without={sorted(without)} leaves {len(left)} way(s) of combining, and verification compares at least two."
        )
    return left
