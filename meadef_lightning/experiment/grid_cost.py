"""What an experiment will cost, estimated before it runs: floating-point operations of its trainings.

A training costs ``3 · forward · images · epochs`` (a backward pass is about two forward ones), counted by torch's own FLOP counter on
the meta device: nothing is computed and no data is read. Left out is everything else: verdicts, searches, what interim students cost,
and what the watermark adds to a step. Seconds come from the stages that are done, whose time per operation includes all of that on the
machine at hand, so they get better as the grid goes on. It is an estimate, not a promise: small networks are slower an operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.experiment.load import Experiment
from meadef_lightning.experiment.spec import ExperimentSpec
from meadef_lightning.victims.module import NetworkModule

_BACKWARD = 3
"""Operations of a training step, in those of a forward pass."""


def forward_flops(module: NetworkModule, data: Any) -> int | None:
    """Operations of one forward pass of one image.

    Args:
        module: A fresh module, whose network is built here, without memory, as its training will build it.
        data: The data module, which tells the sizes; no data is opened.

    Returns:
        The operations; ``None`` for a network that cannot be built or run without weights.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"):
            told = {name: getattr(data, source, None) for name, source in module.sizes.items()}
            module.build({name: size[0] if isinstance(size, tuple) else size for name, size in told.items()})
            network = module.ready_network().to("meta").eval()
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                network(torch.empty(1, *data.image_shape))
            return int(counter.get_total_flops())
    except (
        MisconfigurationException,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        OSError,
    ):
        return None  # some networks, and data that must be opened to be known, cannot be looked at like this


def seen(images: float, options: Mapping[str, Any], batch_size: int) -> float:
    """Images that a training sees in all: epochs × images, cut by the Trainer's limits."""
    limit = options.get("limit_train_batches")
    if isinstance(limit, int) and not isinstance(limit, bool):
        images = min(images, limit * batch_size)
    elif isinstance(limit, float):
        images *= limit
    epochs: int = options.get("max_epochs") or 0
    steps: int = options.get("max_steps", -1)
    total = images * max(epochs, 0)
    if steps < 0:
        return total
    return min(total, steps * batch_size) if total else steps * batch_size


def _asked(queries: Any, attacker: int | None, spec: ExperimentSpec) -> tuple[float | None, int]:
    """Images in an epoch of a theft, and its batch size, from its data module's arguments."""
    arguments = queries.get("init_args") or {} if isinstance(queries, Mapping) else {}
    batch = arguments.get("batch_size") or spec.data.batch_size
    if arguments.get("iterations_per_epoch"):
        return arguments["iterations_per_epoch"] * batch, batch
    if arguments.get("seeds") and arguments.get("rounds"):
        return arguments["seeds"] * 2 ** arguments["rounds"], batch
    given = arguments.get("blends") or arguments.get("queries")
    if given:
        return given, batch
    return (None if attacker is None else attacker * arguments.get("views", 1)), batch


def work_of(experiment: Experiment) -> dict[str, float | None]:
    """Operations of every training of an experiment.

    Args:
        experiment: The experiment.

    Returns:
        Operations for one seed by the stage's name; ``None`` where they cannot be told (sizes left to the data, unusual networks).
    """
    spec = experiment.build()
    victim, attacker = spec.data.sizes["victim"], spec.data.sizes["attacker"]

    def training(module: NetworkModule, options: Mapping[str, Any], images: float | None, batch: int) -> float | None:
        flops = None if images is None else forward_flops(module, spec.data)
        return None if flops is None or images is None else _BACKWARD * flops * seen(images, options, batch)

    batch = spec.data.batch_size
    own = training(spec.victim.model, spec.victim.trainer, victim, batch)
    work: dict[str, float | None] = dict.fromkeys((*spec.reference_names, "victim", "clean"), own)
    for other in spec.other_references:
        work |= dict.fromkeys(other.names, training(other.model, other.trainer, victim, batch))
    one_pass = {"victim": forward_flops(spec.victim.model, spec.data)}
    for attack, config in zip(spec.extraction, experiment.config("extraction"), strict=True):
        images, batch_size = _asked(config["queries"], attacker, spec)
        work[attack.name] = training(attack.student, attack.trainer, images, batch_size)
        one_pass[attack.name] = forward_flops(attack.student, spec.data)
    for control in spec.independent:
        work |= dict.fromkeys(control.names, training(control.model, control.trainer, attacker, batch))
    if spec.patched.model is not None:
        work["patched"] = training(spec.patched.model, spec.patched.trainer, victim, batch)
        one_pass["patched"] = forward_flops(spec.patched.model, spec.data)
    for removal in spec.removal:
        epochs = getattr(removal.method, "epochs", 0)  # those that train nothing have none
        for of in removal.of:
            flops = one_pass.get(of)
            known = flops is not None and attacker is not None
            work[f"{of}.{removal.name}"] = (
                _BACKWARD * flops * epochs * removal.share * attacker if known else None  # type: ignore[operator]
            )
    return work


def seconds_per_operation(done: Iterable[tuple[float, float | None]]) -> float | None:
    """Seconds that an operation of a training takes, everything around it included.

    Args:
        done: Seconds and operations of finished stages; ``None`` for stages that are no training, or unknown.

    Returns:
        All seconds over all operations; ``None`` if no training is done yet.
    """
    seconds, operations = 0.0, 0.0
    for spent, work in done:
        seconds += spent
        operations += work or 0.0
    return seconds / operations if operations > 0 else None


def duration(seconds: float) -> str:
    """Seconds for people: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
