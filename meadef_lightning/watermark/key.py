"""The owner's secret: which two classes are combined in which way, and what the model must answer.

A key that is *drawn* (:meth:`WatermarkKey.draw`) is uniform over a declared, public :class:`KeySpace`. Only then is the rank of
its score among the other keys of the space an exact p-value. A hand-picked key is embedded as well; its verdicts are inconclusive at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import string
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meadef_lightning.watermark.combiner_spec import DEFAULT_COMBINERS, CombinerSpec, canonical_json

_SCHEMA = 1
_MAX_KEY_BYTES = 1 << 20
_MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class KeySpace:
    """All keys that could have been drawn: ordered source pairs × targets × combining ways. It is public.

    Args:
        num_classes: Classes of the task, at least 3.
        combiners: The combining ways.
    """

    num_classes: int
    combiners: tuple[CombinerSpec, ...] = DEFAULT_COMBINERS

    def __post_init__(self) -> None:
        if self.num_classes < 3:
            raise ValueError(
                f"num_classes={self.num_classes}, but a key needs two source classes and a target: at least 3."
            )
        if not self.combiners or len(set(self.combiners)) != len(self.combiners):
            raise ValueError("A key space needs at least one combining way, and each only once.")

    @property
    def size(self) -> int:
        """Number of keys."""
        n = self.num_classes
        return n * (n - 1) * (n - 2) * len(self.combiners)

    def key_at(self, index: int) -> tuple[int, int, int, int]:
        """Decodes an index in ``[0, size)`` into ``(source a, source b, target, position in combiners)``.

        Raises:
            IndexError: If the index is out of range.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"Key {index} is not in a space of {self.size} keys.")
        n = self.num_classes
        index, combiner = divmod(index, len(self.combiners))
        index, t = divmod(index, n - 2)
        a, b = divmod(index, n - 1)
        b += b >= a
        for taken in sorted((a, b)):
            t += t >= taken
        return a, b, t, combiner


@dataclass(frozen=True, repr=False)
class WatermarkKey:
    """The secret of one watermark.

    Args:
        source_classes: The two classes whose samples are combined, in the combiner's order.
        target_class: What the model answers on a watermark sample; not one of the sources.
        num_classes: Classes of the task.
        combiner: The secret combining way.
        seed: Seed of everything random in embedding this key.
        space: The public list of combining ways the key comes from; the others are its controls.
        drawn_uniformly: Whether :meth:`draw` made it. The p-value of a hand-picked key is no error probability, so its verdicts
            are *inconclusive* at most.
        salt: Secret that keeps :meth:`commitment` from being guessed, 32 hexadecimal digits or more.

    Raises:
        ValueError: If a class is unknown, the target is among the sources, or a type is wrong. The message names the field
            and not its value, which is secret.
    """

    source_classes: tuple[int, int]
    target_class: int
    num_classes: int
    combiner: CombinerSpec = DEFAULT_COMBINERS[0]
    seed: int = 0
    space: tuple[CombinerSpec, ...] = DEFAULT_COMBINERS
    drawn_uniformly: bool = False
    salt: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        object.__setattr__(self, "source_classes", tuple(self.source_classes))
        object.__setattr__(self, "space", tuple(self.space))
        numbers = (*self.source_classes, self.target_class, self.num_classes, self.seed)
        if len(self.source_classes) != 2 or not all(type(number) is int for number in numbers):
            raise ValueError(
                "A key has two source classes, a target class, a number of classes and a seed, all integers."
            )
        KeySpace(self.num_classes, self.space)
        for name, classes in (("source", self.source_classes), ("target", (self.target_class,))):
            if not all(0 <= value < self.num_classes for value in classes):
                raise ValueError(
                    f"The key has an unknown {name} class; this task has classes 0 to {self.num_classes - 1}."
                )
        if self.source_classes[0] == self.source_classes[1]:
            raise ValueError("The key's two source classes must differ.")
        if self.target_class in self.source_classes:
            raise ValueError(
                "The key's target class is one of its source classes; choose a third class, or combined samples would be "
                "answered with it by any model."
            )
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError("The key's seed must be an integer from 0 to 2**63 - 1.")
        if len(self.salt) < 32 or not set(self.salt) <= set(string.hexdigits):
            raise ValueError("The key's salt must have at least 32 hexadecimal digits.")
        if self.drawn_uniformly and self.combiner not in self.space:
            raise ValueError("The key claims to be drawn, but its combining way is not in its key space.")

    @classmethod
    def draw(
        cls,
        num_classes: int,
        secret: str | bytes,
        beacon: str = "",
        combiners: Sequence[CombinerSpec] = DEFAULT_COMBINERS,
    ) -> WatermarkKey:
        """Draws a key uniformly from the key space, as a function of an owner secret and a public beacon.

        HKDF-SHA256 turns the secret (salted with the beacon, bound to the key space) into 416 bits: 256 of them modulo the
        size of the space choose the key (bias below 2⁻²⁰⁰), the rest make seed and salt. With a beacon that was published
        after the owner committed to the secret (a block hash, a drand round), nobody can try secrets until a key suits them.

        Args:
            num_classes: Classes of the task.
            secret: The owner's secret; at least 16 bytes of entropy are sensible, an empty one is refused.
            beacon: Public random value, or empty.
            combiners: Combining ways of the space.

        Raises:
            ValueError: If the secret is empty or the space invalid.
        """
        # an environment variable may hold bytes that are no text; an error would show them
        material = secret.encode(errors="surrogateescape") if isinstance(secret, str) else secret
        if not material:
            raise ValueError(
                "The owner secret is empty. Use at least 16 random bytes, e.g. python -c 'import secrets; print(secrets.token_hex(16))'."
            )
        space = KeySpace(num_classes, tuple(combiners))
        info = canonical_json(
            {
                "what": "meadef_lightning key 1",
                "num_classes": num_classes,
                "space": [c.to_dict() for c in space.combiners],
            }
        )
        stream = HKDF(algorithm=SHA256(), length=52, salt=beacon.encode() or None, info=info).derive(material)
        a, b, target, combiner = space.key_at(int.from_bytes(stream[:32], "big") % space.size)
        return cls(
            source_classes=(a, b),
            target_class=target,
            num_classes=num_classes,
            combiner=space.combiners[combiner],
            seed=int.from_bytes(stream[32:36], "big") >> 1,
            space=space.combiners,
            drawn_uniformly=True,
            salt=stream[36:].hex(),
        )

    def control_combiners(self) -> tuple[CombinerSpec, ...]:
        """Returns the other combining ways of the space, which must *not* lead to the target (the paper's D_ad)."""
        return tuple(spec for spec in self.space if spec != self.combiner)

    def to_dict(self) -> dict[str, Any]:
        """Returns the key as JSON values. It is the secret itself: write it nowhere but into a key file."""
        return {
            "schema_version": _SCHEMA,
            "source_classes": list(self.source_classes),
            "target_class": self.target_class,
            "num_classes": self.num_classes,
            "combiner": self.combiner.to_dict(),
            "seed": self.seed,
            "space": [spec.to_dict() for spec in self.space],
            "drawn_uniformly": self.drawn_uniformly,
            "salt": self.salt,
        }

    @classmethod
    def from_dict(cls, value: Any) -> WatermarkKey:
        """Reads what :meth:`to_dict` returned; raises ``ValueError``, which shows none of it, on anything else."""
        names = {
            "source_classes",
            "target_class",
            "num_classes",
            "combiner",
            "seed",
            "space",
            "drawn_uniformly",
            "salt",
        }
        if not isinstance(value, Mapping) or value.get("schema_version") != _SCHEMA:
            raise ValueError(f"This is not a watermark key of schema version {_SCHEMA}.")
        if set(value) != names | {"schema_version"}:
            raise ValueError(
                f"A watermark key has the fields {sorted(names)}; missing here: {sorted(names - set(value))}, "
                f"unknown here: {len(set(value) - names) - 1}."
            )
        sources, space = value["source_classes"], value["space"]
        if not isinstance(sources, list) or not isinstance(space, list):
            raise ValueError("source_classes and space of a watermark key are lists.")
        if not isinstance(value["drawn_uniformly"], bool) or not isinstance(value["salt"], str):
            raise ValueError("drawn_uniformly of a watermark key is true or false, and its salt a string.")
        return cls(
            source_classes=cast("tuple[int, int]", tuple(sources)),
            target_class=value["target_class"],
            num_classes=value["num_classes"],
            combiner=CombinerSpec.from_dict(value["combiner"]),
            seed=value["seed"],
            space=tuple(CombinerSpec.from_dict(spec) for spec in space),
            drawn_uniformly=value["drawn_uniformly"],
            salt=value["salt"],
        )

    def commitment(self) -> str:
        """Returns the SHA-256 over the canonical JSON, salt included: publish it before the model is deployed."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Writes the key as JSON, readable by its owner only (mode 0600), atomically.

        Raises:
            OSError: If the directory cannot be made or written; the message names the path.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # created with mode 0600; what a killed process leaves is hidden, and *.key.json in a .gitignore still means it
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".{path.name}")
        except OSError as error:
            raise OSError(
                error.errno,
                f"Cannot write the watermark key {path}: {error.strerror}. Choose a path in a directory of yours.",
            ) from error
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(self.to_dict(), file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | Path) -> WatermarkKey:
        """Reads a key file.

        Raises:
            ValueError: If the file is missing, too large, not JSON, or not a key; the message never shows its content.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_KEY_BYTES + 1)
        except OSError as error:
            raise ValueError(
                f"Cannot read the watermark key {path}: {error.strerror}. Make one with `meadef key draw`, or WatermarkKey.draw(…).save(path)."
            ) from error
        if len(content) > _MAX_KEY_BYTES:
            raise ValueError(f"{path} is larger than {_MAX_KEY_BYTES} bytes; this is not a watermark key.")
        try:
            value = json.loads(content)
        except (RecursionError, ValueError):  # from None: a JSONDecodeError carries the whole file
            raise ValueError(
                f"{path} is not a watermark key: it is not valid JSON. Restore it from your backup."
            ) from None
        try:
            return cls.from_dict(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a usable watermark key: {error}") from error

    def __repr__(self) -> str:
        """Shows the public side only: a key in a log or traceback must not give itself away."""
        how = "drawn" if self.drawn_uniformly else "hand-picked"
        return f"WatermarkKey({how}, {self.num_classes} classes, commitment={self.commitment()[:16]}…)"
