"""Several processes that run the same program as one: who works and who waits, and how all hear of a failure.

``torchrun``, a scheduler or Lightning starts the processes, and each runs every line of the pipeline. Trainings and verifications are
shared by Lightning's strategies; whatever else there is to do, and every file to write, is rank zero's, while the others wait
(:func:`first`, :func:`in_turn`). They wait in a process group of their own, over gloo and without a time limit worth mentioning: an
attack that asks and trains on rank zero for hours must not run into the time-out of the group that trains.

A process that fails ends the others, too, since their connections to it break; it leaves its reason in the store through which the
processes met, and theirs is told with it (:class:`ProcessFailedError`). With NCCL a process may wait within a kernel, where it
notices nothing: there ``torchrun``, or Lightning where it started the processes, ends it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.quiet import quiet

T = TypeVar("T")

DEVICE_OPTIONS = ("accelerator", "devices", "num_nodes", "strategy")
"""Arguments of the Trainer that say where it runs."""

FSDP2 = "fsdp2"
"""Our short name of Lightning's ``ModelParallelStrategy``, which a configuration cannot name."""

_PATIENCE = timedelta(days=30)
_STORE_SECONDS = 5
_BACKGROUND = ("spawn", "fork", "notebook")


class ProcessFailedError(RuntimeError):
    """Another process failed first; the message names it and its reason."""


class _State:
    """What this process knows of the others.

    Attributes:
        alone: Whether this process is within :func:`alone`.
        waiting: The processes' main group, and the group in which they wait that was made for it.
        launches: How often :func:`launch` was called, the same number in every process.
    """

    alone = False
    waiting: tuple[Any, Any] = (None, None)
    launches = 0


def _met() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """Returns how many processes take part in what is done here: 1 within :func:`alone`, and outside ``torch.distributed``."""
    return dist.get_world_size() if _met() and not _State.alone else 1


def rank() -> int:
    """Returns this process's number among all, also within :func:`alone`."""
    return dist.get_rank() if _met() else 0


@contextmanager
def alone() -> Iterator[None]:
    """The body is run by this process for itself: nothing in it waits for the others."""
    before, _State.alone = _State.alone, True
    try:
        yield
    finally:
        _State.alone = before


def first(work: Callable[[], T]) -> T:
    """Lets rank zero work while the others wait, and tells them what came out; every process must call it.

    Args:
        work: What rank zero does, alone.

    Returns:
        What it returned, which must be picklable where there are several processes.

    Raises:
        Exception: In all processes, what it raised. One that cannot be sent becomes a ``RuntimeError`` elsewhere.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None]
    failed: Exception | None = None
    if rank() == 0:
        try:
            with alone():
                outcome = [(work(), None)]
        except Exception as error:
            failed = error
            other_failure(error)
            outcome = [(None, _sendable(error))]
    dist.broadcast_object_list(outcome, src=0, group=_waiting_group())
    if failed is not None:
        raise failed
    result: T
    result, elsewhere = outcome[0]
    if elsewhere is not None:
        raise elsewhere
    return result


def in_turn(work: Callable[[], T]) -> T:
    """Lets rank zero work, and then each of the others for itself: they find done what rank zero wrote.

    For results that cannot be sent. Every process must call it.

    Args:
        work: What each does, alone.
    """
    if count() == 1:
        return work()
    made: list[T] = []
    first(lambda: made.append(work()))
    if not made:
        with alone():
            made.append(work())
    return made[0]


def on_each_node(work: Callable[[], None]) -> None:
    """Lets one process of each machine work, rank zero first, such as for a download; every process must call it."""
    first(work)
    if rank() and int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0:
        work()
    meet()


def meet() -> None:
    """Waits until every process is here."""
    if count() > 1:
        dist.barrier(group=_waiting_group())


def started_from_outside() -> dict[str, Any]:
    """Returns the options with which a Trainer uses all processes that ``torchrun`` started; none without it, or for one process."""
    if not (dist.is_available() and dist.is_torchelastic_launched()) or int(os.environ["WORLD_SIZE"]) == 1:
        return {}
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    nodes = {"num_nodes": everywhere // here} if everywhere > here else {}
    return {"devices": here, "strategy": "ddp", **nodes}


def bare_trainer(options: Mapping[str, Any]) -> Trainer:
    """Makes a Trainer that only knows where it would run, to be asked for its device and its number of processes.

    Args:
        options: Arguments of a Trainer, of which the :data:`DEVICE_OPTIONS` count.

    Raises:
        MisconfigurationException: If there is no such device, or the strategy starts its processes in the background.
    """
    where = {name: options[name] for name in DEVICE_OPTIONS if name in options}
    strategy = where.get("strategy", "auto")
    if isinstance(strategy, str):
        if any(word in strategy for word in _BACKGROUND):
            raise MisconfigurationException(
                f"strategy={strategy!r} starts processes that know a single training only, and an experiment has many. Use ddp, which "
                "runs the same command in each, or torchrun."
            )
        if not strategy.startswith(("ddp", "auto")):
            where["strategy"] = "ddp"  # others differ in how they train, which is not asked here
    with quiet():
        return Trainer(
            **where, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )


def device_of(options: Mapping[str, Any]) -> torch.device:
    """Returns this process's device in a Trainer with these options, as Lightning chooses it; see :func:`bare_trainer`."""
    device: torch.device = bare_trainer(options).strategy.root_device
    return device


def one_process(device: torch.device) -> dict[str, Any]:
    """Returns the options of a Trainer that runs in this process alone, on a device."""
    devices = 1 if device.index is None else [device.index]
    return {"accelerator": device.type, "devices": devices, "num_nodes": 1, "strategy": "auto"}


def launch(options: Mapping[str, Any], work: Callable[[], T]) -> T:
    """Works in all processes that a Trainer with these options needs; starts them where nobody did.

    Lightning starts a process by running this program again with the same command line, so that it comes here, too.

    Args:
        options: Arguments of a Trainer, of which the :data:`DEVICE_OPTIONS` count.
        work: What each process does.

    Raises:
        MisconfigurationException: If the program was started with another number of processes.
        ProcessFailedError: If another process failed.
    """
    if _State.alone:
        return work()
    if count() > 1:
        return _together(work)
    try:
        trainer = bare_trainer(options)
    except MisconfigurationException:
        if started_from_outside():
            raise
        return work()  # a training that needs the missing device will say so; to read finished ones needs none
    if trainer.world_size == 1:
        if started_from_outside():
            raise MisconfigurationException(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, but the Trainer's options {dict(options)} use one. Leave "
                "devices and strategy out, so that all are used, or start without torchrun."
            )
        return work()
    strategy, launcher = trainer.strategy, trainer.strategy.launcher

    def start() -> T:
        with quiet():
            strategy.setup_environment()
        return _together(work)

    if launcher is None:
        return start()
    result: T = launcher.launch(start, trainer=trainer)
    return result


def _together(work: Callable[[], T]) -> T:
    """Works as one of several processes; a failure is told to the others, or theirs here."""
    _State.launches += 1
    try:
        return work()
    except Exception as error:
        reason = other_failure(error)
        _leave()
        if reason is not None:
            raise ProcessFailedError(reason) from error
        raise


def other_failure(error: Exception) -> str | None:
    """Tells the others that this process failed, and finds out whether another one was first.

    Args:
        error: Why this process fails.

    Returns:
        Which process failed and why, if this one only lost its connection to it; ``None`` if it failed by itself, or is the only one.
    """
    if isinstance(error, ProcessFailedError) or not _met() or dist.get_world_size() == 1:
        return None
    mine = f"process {rank()} failed: {type(error).__name__}: {error}"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined, unused-ignore]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
            wait_for_workers=False,
        )
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        told = store.compare_set(f"meadef_lightning/failed/{restart}/{_State.launches}", "", mine).decode()
    except (KeyError, ValueError, RuntimeError):  # no store to be found: the connections that break must do
        return None
    lost = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return told if lost and told != mine else None


def _leave() -> None:
    """Breaks the connections to the others now, and not when Python has come to its end: they wait for this process."""
    if _met() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        _State.waiting = (None, None)


def _waiting_group() -> Any:
    """The group in which processes wait, made when all of them ask for it first."""
    main = dist.group.WORLD
    if _State.waiting[0] is not main:
        _State.waiting = (main, dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _State.waiting[1]


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own, made a moment ago
    except Exception:  # whatever an exception's own constructor raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
