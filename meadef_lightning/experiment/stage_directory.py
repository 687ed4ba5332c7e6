"""A stage's directory: filled once, resumed when interrupted, then only read; ``stage.json`` says what it was made from.

Finished stages are skipped, interrupted ones resume, and a directory of other inputs is never mixed into.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from meadef_lightning import processes
from meadef_lightning.experiment.artifacts import (
    FULL,
    OutputError,
    is_rank_zero,
    make_directory,
    read_json,
    write_json_atomic,
)

Status = Literal["running", "done", "failed"]
STAGE_FILE = "stage.json"
WANDB_FILE = "wandb.json"
"""Id of the W&B run that follows a stage; see `wandb_tracker`."""
INTERRUPTED = "interrupted"
_SIGTERM_STATUS = 143
"""What a program that SIGTERM ended tells its caller, as shells do: 128 and the signal's number."""
_MAX_CAUSE_CHARACTERS = 2000
_WRITE_ONLY = FULL | {errno.EROFS}  # can only come from writing: inside a stage they mean its directory, not an input


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
        if cause == INTERRUPTED and isinstance(error, SystemExit) and error.code is None:
            error.code = _SIGTERM_STATUS  # Lightning gives none, and a script that runs experiments would end as if all were done

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
