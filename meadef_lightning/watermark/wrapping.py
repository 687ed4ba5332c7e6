"""Putting code around a method of one module instance for a while, in a way that Lightning, copies and pickles bear."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn


def visible_signature(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function whose signature Lightning reads to choose a method's arguments: it looks through one decorator."""
    visible = getattr(method, "__wrapped__", method)
    function: Callable[..., Any] = getattr(visible, "__func__", visible)
    return function


class MethodWrapper:
    """Replaces a method of a module instance until :meth:`undo`.

    The replacement is a bound method and no closure: it follows the module through ``deepcopy``, and is pickled as the
    class's plain method. It shows Lightning the signature that it would find without us.
    """

    def __init__(self) -> None:
        self._undo: tuple[nn.Module, str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the module out: a copy has wrapped nothing."""
        return {"_undo": None}

    def apply(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Wraps ``module.name``; does nothing if it is wrapped already, and begins anew if somebody replaced it since.

        Args:
            module: The instance.
            name: Name of its method.
            around: Called as ``around(method, module, *args, **kwargs)`` instead of ``method(module, *args, **kwargs)``.
        """
        current = getattr(module, name)
        if self._undo is not None and getattr(current, "_wrapped_by", None) is self:
            return
        self.undo()
        own = isinstance(current, types.MethodType) and current.__self__ is module
        # called through its function, so that a copy of the module runs its own method
        method = current.__func__ if own else lambda _, *args, **kwargs: current(*args, **kwargs)

        def wrapper(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return around(method, module, *args, **kwargs)

        wrapper.__name__ = name  # what pickle looks up
        wrapper.__wrapped__ = visible_signature(current)  # type: ignore[attr-defined]
        wrapper._wrapped_by = self  # type: ignore[attr-defined]
        wrapper._previous = module.__dict__.get(name)  # type: ignore[attr-defined]
        self._undo = (module, name, wrapper._previous)  # type: ignore[attr-defined]
        setattr(module, name, types.MethodType(wrapper, module))

    def undo(self) -> None:
        """Gives the module its method back: the class's, or the one that the instance had (compiled modules have one).

        Of several wrappers around each other one that is not outermost stays, and goes with the one around it.
        """
        if self._undo is None:
            return
        module, name, previous = self._undo
        self._undo = None
        if getattr(module.__dict__.get(name), "_wrapped_by", None) is not self:
            return  # somebody has replaced or wrapped it, so nothing of ours is there to take away
        while getattr(previous, "_wrapped_by", None) is not None and previous._wrapped_by._undo is None:
            previous = previous._previous  # one of ours that was undone before
        if previous is None:
            delattr(module, name)
        else:
            setattr(module, name, previous)
