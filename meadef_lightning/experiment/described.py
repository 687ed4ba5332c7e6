"""The YAML that describes a suspect: which model weights belong to, what it takes, where its answers are, how a service is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.oracle.input_space import InputSpace
from meadef_lightning.oracle.mapping import HTTPMapping

_MAX_YAML_BYTES, _MAX_YAML_VALUES = 1 << 20, 100_000


def described(file: Path) -> dict[str, Any]:
    """Reads a suspect's YAML, which may come from its owner.

    Args:
        file: The YAML.

    Returns:
        Its sections: ``model`` as it is, ``input`` and ``http`` checked and built, ``output``.

    Raises:
        MisconfigurationException: If it is too large, or not of this form; the message names the section.
    """
    from jsonargparse import ArgumentError

    from meadef_lightning.experiment.messages import Parser

    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_YAML_BYTES + 1)
        if len(text) > _MAX_YAML_BYTES:
            raise MisconfigurationException(
                f"{file} is larger than {_MAX_YAML_BYTES} bytes, and no configuration of a model."
            )
        content = yaml.safe_load(text.decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise MisconfigurationException(f"Cannot read the model's configuration {file}: {error}") from error
    _refuse_explosion(content, file)
    known = ("model", "input", "output", "http")
    section = {name: content[name] for name in known if name in content} if isinstance(content, Mapping) else {}
    if not section:
        raise MisconfigurationException(
            f"{file} has no `model:` section with class_path and init_args, nor `input:`, `output:` or `http:`."
        )
    for name, kind in (("input", InputSpace), ("http", HTTPMapping)):
        if name not in section:
            continue
        parser = Parser(exit_on_error=False)
        parser.add_class_arguments(kind, name)
        try:
            section[name] = parser.instantiate(parser.parse_object({name: section[name]}))[name]
        except (ArgumentError, TypeError, ValueError) as error:
            raise MisconfigurationException(f"The section `{name}:` of {file} cannot be used: {error}") from error
    if not isinstance(section.get("output", 0), (int, str)):
        raise MisconfigurationException(f"`output:` of {file} must be an index or a name.")
    return section


def _refuse_explosion(content: Any, file: Path) -> None:
    """Refuses YAML whose references to itself, each of a few bytes, stand for more values than fit into memory, or for no end of them."""
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if seen + len(waiting) > _MAX_YAML_VALUES:
            raise MisconfigurationException(
                f"{file} stands for more than {_MAX_YAML_VALUES} values, by anchors and references. Write it without them."
            )
