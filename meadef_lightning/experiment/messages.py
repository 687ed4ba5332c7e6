"""What a configuration's mistake is called: jsonargparse's messages, told as one thing that is wrong, what is allowed, and a guess.

jsonargparse reports a wrong value below a type that may be one of several things with every one of them, the Python types it tried and
the whole value. A user needs the place, the cause and what would have been right.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

_KEY = re.compile(r'Parser key "([^"]*)":\s*')
_CLASS = re.compile(r"Problem with given class_path '([^']*)':\s*")
_SUBTYPES = re.compile(r"Subtypes: .*?<class '([\w.]+)'>")
_STRUCTURED = re.compile(
    r"Does not validate against any|Parser key \"|Problem with given class_path|is not accepted|unrecognized arguments"
)
_NOISE = re.compile(
    r"(Does not validate against any|Subtypes: |Errors:|Given value type: |Expected a <class 'NoneType'>|Not a valid subclass of |"
    r"Subclass types expect one of:|a class path \(str\)|a dict with|a dict without|Expected a path but )"
)
_OTHER_CLASS = re.compile(r"[\w.]+ is no \w+\.")
_SHOWN = 12
"""Most names in a list of what is allowed."""


def readable(message: str, options: Iterable[str] = ()) -> str:
    """Tells a message of jsonargparse in short.

    Args:
        message: The message; one of another form is returned as it is.
        options: What is known at the top of the configuration.

    Returns:
        One line for each cause, with the place in the configuration before it.
    """
    if not _STRUCTURED.search(message):
        return message
    place: list[str] = []
    causes: list[str] = []
    owner, base, given = "", "", ""
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        while match := _KEY.match(text) or _CLASS.match(text):
            if match.re is _CLASS:
                owner = match[1]
            elif match[1] not in place:
                place.append(match[1])
            text = text[match.end() :]
        if match := _SUBTYPES.match(text):
            base = match[1]
        if text.startswith("Given value: "):
            given = text.removeprefix("Given value: ")
        elif text and not _NOISE.match(text):
            causes.append(_cause(text, owner, base, options))
    # that an import path is of another class is news only where nothing else is wrong
    telling = [cause for cause in causes if not _OTHER_CLASS.match(cause)] or causes or [message]
    told = "; ".join(dict.fromkeys(telling))
    # a whole mapping, or jsonargparse's own wrapping of a value, tells nothing
    if given and given not in told and len(given) <= 60 and not given.startswith(("{", "NestedArg(", "Namespace(")):
        told += f" (got {given})"
    return f"{'.'.join(place)}: {told}" if place else told


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean …?`` if a known name is like this one, else a full stop."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    near = near or [other for other in names if name and other.lower().startswith(name.lower())]
    return f"; did you mean {near[0]!r}?" if near else "."


def allowed(known: Iterable[str], verb: str = "There are") -> str:
    """Returns a sentence that lists the known names, the first few of many; nothing if there are none."""
    names = sorted(set(known))
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" {verb} {', '.join(names[:_SHOWN])}{more}."


def _cause(text: str, owner: str, base: str, options: Iterable[str]) -> str:
    if match := re.match(r"Option '([^']*)' is not accepted", text):
        name = match[1].partition(".")[0]
        known = _parameters(owner) or sorted({option.partition(".")[0] for option in options})
        return f"there is no option {name!r}" + suggestion(name, known) + allowed(known)
    if match := re.match(r"unrecognized arguments: (--[\w.+-]+)?", text):
        return text + suggestion(match[1] or "", (f"--{name}" for name in options))
    if match := re.match(r"module '([^']*)' has no attribute '([^']*)'", text):
        known = _public(match[1])
        return f"{match[1]} has no {match[2]!r}" + suggestion(match[2], known) + allowed(known)
    if match := re.match(r"Expected a dot import path string: (.*)", text):
        known, what = _subclasses(base), base.rpartition(".")[2] or "class"
        return f"{match[1]!r} names no {what}{suggestion(match[1], known)}{allowed(known)} Others are given as package.module.Class."
    if match := re.match(r"Import path (\S+) does not correspond to a subclass of (\S+)", text):
        return f"{match[1]} is no {match[2]}." + allowed(_subclasses(base) if base.endswith(f".{match[2]}") else [])
    if match := re.match(r"Expected a typing\.Literal\[(.*)\]", text):
        return f"must be one of {match[1]}"
    if match := re.match(r"Expected an? <class '(\w+)'>\. Got value: (.*)", text):
        form = {"list": "a list, e.g. [a, b]", "dict": "a mapping, e.g. {name: value}", "int": "an int"}
        return f"must be {form.get(match[1], f'a {match[1]}')}, got {match[2]}"
    return text


def _parameters(path: str) -> list[str]:
    """Names of what a class or function takes; none if it is unknown."""
    module, _, name = path.rpartition(".")
    found: Any = getattr(sys.modules.get(module), name, None)
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


def _public(module: str) -> list[str]:
    """Names of the classes that a module of ours shows, or its public modules."""
    try:
        found = importlib.import_module(module) if module.split(".")[0] == "meadef_lightning" else sys.modules[module]
    except (ImportError, KeyError):
        return []
    return [name for name in getattr(found, "__all__", vars(found)) if not name.startswith("_")]


def _subclasses(path: str) -> list[str]:
    """Names of the classes below a class, as far as they are imported."""
    module, _, name = path.rpartition(".")
    waiting, names = [getattr(sys.modules.get(module), name, None)], []
    while waiting:
        for found in getattr(waiting.pop(), "__subclasses__", list)():
            if not inspect.isabstract(found) and not found.__name__.startswith("_"):
                names.append(found.__name__)
            waiting.append(found)
    return names


class _Readable:
    """Ends the program with one message, and without the many lines of every option's form."""

    def error(self: Any, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong; exits with 2, or raises where the parser was told so."""
        known = [name.lstrip("-") for action in self._actions for name in action.option_strings]
        text = readable(message, [name for name in known if name not in ("h", "help")])
        if not self.exit_on_error:
            super().error(text, ex)  # type: ignore[misc]
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: {text}\nEvery option is explained by: {program} --help\n")
        sys.exit(2)


class Parser(_Readable, ArgumentParser):
    """jsonargparse's parser with messages for users."""


class LightningParser(_Readable, LightningArgumentParser):
    """LightningCLI's parser with messages for users."""
