"""What only the holder of a key can do to a document about it: write answers without naming a class, and seal fields against change.

Raw answers would name the target (it is what most triggers get), and a table of cells would let anyone look up the key with the published
statistic. So classes are renamed and cells put into another order, both a secret function of the key's salt. A seal is an HMAC under
that salt: whoever does not hold the key cannot change a field unnoticed.

**Pitfalls.** Renaming is no encryption. Who has a model of the task can match the columns of a blinded table with those of his own: on digits a first
attempt (sorted columns, one assignment) named 2 to 10 of the ten classes in tables of other clean models, and up to 6 in those of stolen ones. So
evidence is for a judge; as long as the key is in use, publish the verdict and not the answers.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meadef_lightning.verification.decoys import seeded_permutation
from meadef_lightning.verification.evidence_form import SCHEMA_VERSION
from meadef_lightning.watermark.key import WatermarkKey


def canonical(value: object) -> bytes:
    """Returns the one JSON text of a value; raises ``ValueError`` on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seals(content: Mapping[str, Any], key: WatermarkKey) -> dict[str, str]:
    """Returns an HMAC of each field, one level deep, so that a change can be named.

    Args:
        content: The fields: JSON values, or mappings of such.
        key: The key, whose salt is the secret.
    """
    leaves: dict[str, Any] = {}
    for name, section in content.items():
        parts = section.items() if isinstance(section, Mapping) else [("", section)]
        leaves |= {f"{name}.{part}".rstrip("."): value for part, value in parts}
    secret = f"meadef_lightning evidence {SCHEMA_VERSION} {key.salt}".encode()
    return {
        path: hmac.new(secret, canonical([path, value]), hashlib.sha256).hexdigest()
        for path, value in sorted(leaves.items())
    }


@dataclass(frozen=True, eq=False, repr=False)
class Blinding:
    """Secret names of the classes, and the secret order of a table's rows and columns.

    Args:
        names: Name of each class, a permutation, int64.
        places: Place of each column in the file, a permutation, int64; the classes' names where each class has a column.
        rows: Row of the table that stands in each row of the file, a permutation, int64.
    """

    names: Tensor
    places: Tensor
    rows: Tensor

    @classmethod
    def of(cls, key: WatermarkKey, seed: int, cells: int, width: int) -> Blinding:
        """Derives the names and orders of a verification.

        Args:
            key: The key.
            seed: The verifier's seed.
            cells: Rows of its table of answers.
            width: Columns of it.
        """
        names = seeded_permutation(key.num_classes, "blind classes", key.salt, seed)
        places = names if width == len(names) else seeded_permutation(width, "blind columns", key.salt, seed)
        return cls(names, places, seeded_permutation(cells, "blind cells", key.salt, seed))

    def hide_labels(self, labels: Tensor) -> Tensor:
        """Renames classes, int64, any shape."""
        return self.names[labels]

    def reveal_labels(self, named: Tensor) -> Tensor:
        """Undoes :meth:`hide_labels`."""
        return self.names.argsort()[named]

    def hide_table(self, counts: Tensor) -> Tensor:
        """Puts a table of answers ``(cells, width)`` into the file's order."""
        return counts[self.rows][:, self.places.argsort()]

    def reveal_table(self, written: Tensor) -> Tensor:
        """Undoes :meth:`hide_table`."""
        return written[self.rows.argsort()][:, self.places]
