"""Stand-ins for functions of the operating system that fail."""

import os
from collections.abc import Callable
from typing import Any, NoReturn


def raiser(code: int) -> Callable[..., NoReturn]:
    """A function that fails with an ``OSError`` of that number, whatever it is given."""

    def fail(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail
