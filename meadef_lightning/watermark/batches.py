"""Where a batch keeps its samples and labels, and a model its logits (Composer's key convention)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Key = int | str | Callable[[Any], Any]
"""Index of a sequence, key of a mapping, name of an attribute, or a function of the whole."""


def pick(container: Any, key: Key | None, name: str) -> Any:
    """Returns the part of ``container`` that ``key`` points to.

    Args:
        container: A batch or a model's output: sequence, mapping, dataclass, any object.
        key: See :data:`Key`; ``None`` returns the container itself.
        name: Name of the argument that the user set, for the error message.

    Raises:
        ValueError: If there is no such part; the message says what there is.
    """
    if key is None:
        return container
    if callable(key):
        return key(container)
    try:
        if isinstance(key, str) and not isinstance(container, Mapping):
            return getattr(container, key)
        return container[key]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if isinstance(container, Mapping):
            there = f"a mapping with the keys {list(container)}"
        elif isinstance(container, Sequence):
            there = f"a {type(container).__name__} of {len(container)} parts"
        else:
            there = f"a {type(container).__name__}" + (
                f" with {list(vars(container))}" if hasattr(container, "__dict__") else ""
            )
        raise ValueError(
            f"{name}={key!r} points to nothing: got {there}. Give an index, a key, an attribute or a function."
        ) from error
