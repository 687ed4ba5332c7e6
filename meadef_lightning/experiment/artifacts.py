"""Files of an experiment: atomic writing, guarded reading, and hashes.

Whatever happens to a run (Ctrl-C, a full disk, a killed process), a file written here is either the old one or the
new one, never half of either.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

from lightning.pytorch.utilities.rank_zero import rank_zero_only

MAX_JSON_BYTES = 64 * 2**20
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says of a disk that has no room."""


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files and talks to the terminal."""
    return getattr(rank_zero_only, "rank", 0) == 0


class OutputError(OSError):
    """The output directory cannot be written; the message names the path and the remedy, ``errno`` the cause."""

    def __init__(self, path: Path, cause: OSError) -> None:
        if cause.errno in FULL:
            remedy = "The disk is full: free some space, or choose another directory with --output."
        elif cause.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            remedy = "It is read-only for this user: change its permissions, or choose another directory with --output."
        elif cause.errno in {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}:
            remedy = "A file stands where a directory is needed (or the reverse): choose another one with --output."
        else:
            remedy = "Choose another directory with --output."
        reason = cause.strerror or str(cause) or type(cause).__name__
        super().__init__(f"cannot write {path} ({reason}). {remedy} Finished stages are kept and will be skipped.")
        self.errno = cause.errno


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Creates a directory with its parents, if need be; raises `OutputError` where that is impossible."""
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(directory, error) from error
    return directory


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes, mode: int = 0o644) -> Path:
    """Replaces a file in one step; readers see the old content or the new one, also after a crash.

    Args:
        path: the file; its directory must exist.
        data: the new content.
        mode: permissions of the new file, further restricted by the process's umask.

    Raises:
        OutputError: if the directory is missing, read-only or full; nothing is left behind, the old file stays.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        # created with its final permissions: a secret is at no moment readable by others
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)  # noqa: PTH105  (kept beside os.open and os.fsync)
        finally:
            temporary.unlink(missing_ok=True)  # still there only after a failure
    except OSError as error:
        raise OutputError(target, error) from error
    return target


def write_text_atomic(path: str | os.PathLike[str], text: str, mode: int = 0o644) -> Path:
    """Writes UTF-8 text as `write_bytes_atomic` does; newlines are written as they are given."""
    return write_bytes_atomic(path, text.encode("utf-8"), mode)


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header, lines ended by one newline.

    Args:
        columns: the columns, in order; what else a row holds is left out.
        rows: mappings from column to value; a missing value is left empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_json_atomic(path: str | os.PathLike[str], obj: Any, mode: int = 0o644) -> Path:
    """Writes an object as indented JSON (UTF-8, keys in the object's own order), atomically.

    Args:
        path: the file; its directory must exist.
        obj: what `json.dumps` accepts; NaN and infinities are refused because they are not JSON.
        mode: permissions of the new file.

    Raises:
        ValueError: if the object cannot be written as JSON.
        OutputError: as `write_bytes_atomic`.
    """
    try:
        data = (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from error
    return write_bytes_atomic(path, data, mode)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Reads a JSON file that may be damaged or come from somebody else.

    Args:
        path: the file.
        max_bytes: refuse larger files before parsing them.

    Returns:
        The parsed object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is too large, not UTF-8 or not JSON (NaN included); names the path and the remedy.
    """
    source = Path(path)
    with source.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{source} is larger than {max_bytes:,} bytes, which no file of ours is; check the path.")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{source} is not valid JSON ({error}): the file is damaged or not what it is taken for. "
            "Restore it from a copy, or delete it and run the command that writes it again."
        ) from error


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content as 64 lower-case hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What `json` cannot write itself but a configuration may hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # a default such as `adam`; lambdas have no name
    if isinstance(value, FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"{type(value).__name__} has no canonical JSON form; pass plain values")


def config_hash(obj: Any) -> str:
    """SHA-256 over canonical JSON: the same for equal configurations, whatever the order of their keys.

    Args:
        obj: mappings, sequences, strings, numbers, booleans, None, paths and dataclasses, nested at will.

    Returns:
        64 lower-case hex digits.

    Raises:
        ValueError: if the object holds anything else, NaN, or keys of mixed types.
    """
    try:
        text = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"configuration cannot be hashed: {error}") from error
    return hashlib.sha256(text.encode("ascii")).hexdigest()
