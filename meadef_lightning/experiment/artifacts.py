"""Files of an experiment: atomic writing, guarded reading, hashes, and ``stage.json``.

Whatever happens to a run (Ctrl-C, a full disk, a killed process), a file written here is either the old one or the
new one, never half of either. ``stage.json`` says what a stage was made from, so that a finished stage is skipped,
an interrupted one resumes, and a directory of other inputs is never mixed into.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, Literal, NoReturn, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from meadef_lightning import processes

Status = Literal["running", "done", "failed"]

STAGE_FILE = "stage.json"
WANDB_FILE = "wandb.json"
"""Id of the W&B run that follows a stage; see `wandb_tracker`."""
INTERRUPTED = "interrupted"
MAX_JSON_BYTES = 64 * 2**20
_MAX_CAUSE_CHARACTERS = 2000
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRITE_ONLY = _FULL | {errno.EROFS}  # can only come from writing: inside a stage they mean its directory, not an input


class OutputError(OSError):
    """The output directory cannot be written; the message names the path and the remedy, ``errno`` the cause."""

    def __init__(self, path: Path, cause: OSError) -> None:
        if cause.errno in _FULL:
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


@dataclass(frozen=True)
class StageRecord:
    """Content of ``stage.json``.

    Args:
        name: the stage's name.
        status: ``running`` (also what a killed process leaves behind), ``done`` or ``failed``.
        inputs: hash of everything that the stage was made from, by name.
        seconds: time spent, summed over attempts that ended by themselves; at least 0.
        error: cause of a failure, ``"interrupted"`` after Ctrl-C or SIGTERM, otherwise None.

    Raises:
        ValueError: if a value has the wrong type or range.
    """

    name: str
    status: Status
    inputs: Mapping[str, str]
    seconds: float = 0.0
    error: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a stage's name must be a non-empty string, not {self.name!r}")
        if self.status not in get_args(Status):
            raise ValueError(f"stage status must be one of {', '.join(get_args(Status))}, not {self.status!r}")
        if not isinstance(self.inputs, Mapping) or not all(
            isinstance(key, str) and isinstance(value, str) for key, value in self.inputs.items()
        ):
            raise ValueError("a stage's inputs must map names to hashes, both strings")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds >= 0:
            raise ValueError(f"a stage's seconds must be a number of at least 0, not {self.seconds!r}")
        if self.error is not None and not isinstance(self.error, str):
            raise ValueError(f"a stage's error must be a string or null, not {self.error!r}")

    def save(self, directory: Path) -> None:
        """Writes ``stage.json`` atomically; raises `OutputError` where that is impossible."""
        obj = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        write_json_atomic(directory / STAGE_FILE, {**obj, "inputs": dict(self.inputs)})

    @classmethod
    def load(cls, directory: Path) -> StageRecord | None:
        """Reads a directory's ``stage.json``; None where there is none.

        Raises:
            ValueError: if the file is not a stage record; names the file and the remedy.
        """
        path = directory / STAGE_FILE
        try:
            obj = read_json(path)
        except FileNotFoundError:
            return None
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            if not isinstance(obj, dict) or set(obj) != names:
                raise ValueError(f"it must hold exactly {', '.join(sorted(names))}")
            return cls(**obj)
        except ValueError as error:
            raise ValueError(
                f"{path} is not a stage record ({error}). Delete {directory} to run the stage again."
            ) from error


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files and talks to the terminal."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _is_interruption(error: BaseException) -> bool:
    # Lightning turns Ctrl-C into sys.exit(1) while it handles the KeyboardInterrupt, and SIGTERM into a SystemExit
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit)
        and (isinstance(error.__context__, KeyboardInterrupt) or type(error).__name__ == "SIGTERMException")
    )


class Stage:
    """One stage of an experiment: a directory that is filled once, resumed when interrupted, and then only read.

    Use as a context manager. The body runs in any case, and asks ``stage.done`` whether anything is left to do::

        with Stage(root / "victim", "victim", {"config": config_hash(config)}) as stage:
            if not stage.done:
                train(stage.directory, resume=stage.resumed)

    Leaving the body normally marks the stage ``done``; an exception marks it ``failed`` with its cause, Ctrl-C with
    ``"interrupted"``, and passes on. Of several processes, which must all enter it, rank zero reads and writes ``stage.json``.

    Args:
        directory: where the stage's files are; created with its parents.
        name: the stage's name, as recorded.
        inputs: hash of everything that the result depends on, by name (for example from `config_hash`).

    Attributes:
        directory: where the stage's files are.
        done: whether an earlier run finished this stage from the same inputs.
        resumed: whether an earlier run started on the same inputs without finishing; its files may be continued.
        record: the `StageRecord` as last written.

    Raises:
        MisconfigurationException: on entering, if the directory holds results made from other inputs, or of another
            stage; says what differs. An attempt that broke off before it left anything but its configuration may be
            repeated with other inputs.
        OutputError: on entering or leaving, if the directory cannot be written.
        ValueError: on entering, if ``stage.json`` is damaged.
        ProcessFailedError: on leaving, if the body failed because another process did.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str, inputs: Mapping[str, str]) -> None:
        self.directory = Path(directory)
        self.record = StageRecord(name, "running", dict(inputs))
        self.done = False
        self.resumed = False
        self._started = 0.0

    def __enter__(self) -> Stage:
        self.record, self.done, self.resumed = processes.first(self._open)
        self._started = time.perf_counter()
        return self

    def _open(self) -> tuple[StageRecord, bool, bool]:
        make_directory(self.directory)
        earlier = StageRecord.load(self.directory)
        if earlier is not None:
            if earlier.name != self.record.name or earlier.inputs != self.record.inputs:
                self._refuse_other_inputs(earlier)
            else:
                self.done = earlier.status == "done"
                self.resumed = not self.done
                self.record = dataclasses.replace(self.record, seconds=earlier.seconds)
        if self.done and earlier is not None:
            self.record = earlier
        else:
            self._save(self.record)
        return self.record, self.done, self.resumed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done:
            return  # whatever went wrong while reading a finished stage does not unfinish it
        seconds = self.record.seconds + time.perf_counter() - self._started
        if error is None:
            self._save(dataclasses.replace(self.record, status="done", seconds=seconds))
            return
        elsewhere = processes.other_failure(error) if isinstance(error, Exception) else None
        cause = INTERRUPTED if _is_interruption(error) else elsewhere or f"{type(error).__name__}: {error}"
        failed = dataclasses.replace(self.record, status="failed", seconds=seconds, error=cause[:_MAX_CAUSE_CHARACTERS])
        try:
            self._save(failed)
        except OutputError as unwritable:
            rank_zero_warn(f"{unwritable} The cause of the failure follows, unrecorded.")
        if isinstance(error, OSError) and not isinstance(error, OutputError) and error.errno in _WRITE_ONLY:
            raise OutputError(self.directory, error) from error
        if elsewhere is not None:
            raise processes.ProcessFailedError(elsewhere) from error

    def _save(self, record: StageRecord) -> None:
        if is_rank_zero():
            record.save(self.directory)
        self.record = record

    def _refuse_other_inputs(self, earlier: StageRecord) -> None:
        left = {entry.name for entry in self.directory.iterdir()} - {STAGE_FILE, WANDB_FILE, "config.yaml"}
        if earlier.status != "done" and not left:
            return
        old, new = earlier.inputs, self.record.inputs
        differences = [f"{name!r} differs" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
        differences += [f"{name!r} is new" for name in sorted(new.keys() - old.keys())]
        differences += [f"{name!r} is gone" for name in sorted(old.keys() - new.keys())]
        if earlier.name != self.record.name:
            differences.insert(0, f"it belongs to stage {earlier.name!r}")
        raise MisconfigurationException(
            f"stage {self.record.name!r} cannot use {self.directory}: it holds files made from other inputs "
            f"({', '.join(differences)}). Choose another directory with --output, or delete {self.directory} "
            "to run the stage again."
        )
