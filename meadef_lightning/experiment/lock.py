"""One run at a time in a directory of results: two that fill the same stages would overwrite each other's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from meadef_lightning.experiment.artifacts import OutputError, is_rank_zero

LOCK_FILE = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other runs out of a directory while the body runs.

    The operating system holds the lock for the process, not the file ``.lock``, which stays where it is: however the process ends,
    ``SIGKILL`` included, the directory is free again. Of the processes of one run only rank zero takes it, since it alone writes.

    Args:
        directory: The directory of the results; it must exist.

    Raises:
        MisconfigurationException: If another run works there; nothing is waited for.
        OutputError: If the lock's file cannot be made.
    """
    if not is_rank_zero():
        yield
        return
    lock = FileLock(directory / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MisconfigurationException(
            f"Another run is at work in {directory}, and two would overwrite each other's files. Wait until it has ended, then run "
            "this again (what it has done will be skipped), or choose another directory with --output."
        ) from error
    except NotImplementedError:
        rank_zero_warn(f"The file system of {directory} knows no locks: do not start a second run there.")
    except OSError as error:
        raise OutputError(directory / LOCK_FILE, error) from error
    try:
        yield
    finally:
        lock.release()
