"""The watermark's training objective for one model: from source samples to weighted loss terms.

:class:`WatermarkObjective` holds what the callback and the mixin share: a pool of source samples,
the choice of combinations for the next step, one concatenated forward, and the balanced sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from meadef_lightning.watermark.balancing import Balancing, Fixed
from meadef_lightning.watermark.batchnorm import BatchNormMode, frozen_batchnorm
from meadef_lightning.watermark.combinations import combine_in_turn
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.losses import combination_loss, evasion_loss, verification_loss
from meadef_lightning.watermark.pool import SourcePool, other_classes
from meadef_lightning.watermark.tilt import FULL, evaluating, influence, penultimate_features, target_mass, tilt_loss

REFRESH = 50
"""Watermarked steps after which the tilt is measured anew: often enough for features that move, and 2 % of a step's time."""


class WatermarkObjective:
    """The loss terms of one key, from a stream of labelled batches.

    Use: :meth:`observe` a batch, :meth:`draw` once for a step, then :meth:`terms` and :meth:`total` as often as the optimiser
    evaluates the step (LBFGS does so several times).

    Args:
        key: The key to embed.
        samples: Watermark samples per step; as many evasion samples are added while their weight is not 0, and twice as
            many source samples while the weight of ``L_com`` is not 0.
        balancing: How the terms are weighed.
        temperature: Temperature of ``L_com``.
        detach_sources: Whether ``L_com`` moves only the outputs on watermark samples.
        batchnorm: With ``"batch"`` the extra samples are normalised among themselves, as in the reference training: on digits the
            victim learnt them (99 %), but as something apart, and no thief did (0 %). Otherwise BatchNorm layers use their
            running statistics on the extra samples, and leave them alone: these samples are learnt under the very normalisation
            that they will be verified under. ``"frozen"`` asks the caller to keep BatchNorm so in the task's forward, too
            (:func:`~meadef_lightning.watermark.batchnorm.frozen_batchnorm` around the step), which the callback does.
        tilt: Most probability that a natural sample of a source class gives to the target, in ``[0, 1)``; 0 leaves natural answers as
            they are. See :mod:`meadef_lightning.watermark.tilt`.
        tilt_from: Share of each source class's samples, those of least influence, that are left as they are, in ``[0, 0.99)``.
        buffer_size: Source samples kept per class.
        pool: The owner's own source samples; batches are then not looked at.
        rank: Added to the key's seed, so that processes draw different samples.
    """

    def __init__(
        self,
        key: WatermarkKey,
        samples: int = 8,
        balancing: Balancing | None = None,
        temperature: float = 1.0,
        detach_sources: bool = True,
        batchnorm: BatchNormMode = "running",
        tilt: float = 0.0,
        tilt_from: float = 0.5,
        buffer_size: int = 128,
        pool: SourcePool | None = None,
        rank: int = 0,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1 watermark sample per step.")
        if batchnorm not in get_args(BatchNormMode):
            raise ValueError(f"batchnorm={batchnorm!r} must be one of {get_args(BatchNormMode)}.")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        if not 0 <= tilt < 1:
            raise ValueError(f"tilt={tilt} is a probability and must lie in [0, 1).")
        if not 0 <= tilt_from < FULL:
            raise ValueError(
                f"tilt_from={tilt_from} is the share of samples that are not tilted and must lie in [0, {FULL})."
            )
        if pool is not None and set(pool.classes) != set(key.source_classes):
            raise ValueError("The given pool does not hold exactly the key's two source classes.")
        self.key = key
        self.samples = samples
        self.balancing = Fixed() if balancing is None else deepcopy(balancing)  # its state belongs to this training
        self.temperature, self.detach_sources, self.batchnorm = temperature, detach_sources, batchnorm
        self.pool = SourcePool(key.source_classes, buffer_size) if pool is None else pool
        self.tilt, self.tilt_from = tilt, tilt_from
        self.steps = 0
        self._combiner = key.combiner.build()
        self._others = [spec.build() for spec in key.control_combiners()]
        self._generator = torch.Generator().manual_seed(key.seed + rank)
        self._groups: dict[str, Tensor] = {}
        self._evasion_labels: Tensor | None = None
        self._tilted: dict[str, Tensor] = {}
        self._natural_rows: Tensor | None = None
        self._checked = False

    def __getstate__(self) -> dict[str, Any]:
        """Turns the generator into bytes: spawned processes (``ddp_spawn``) cannot receive a generator."""
        return {**self.__dict__, "_generator": self._generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, generator included."""
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8))

    def observe(self, x: Any, y: Any) -> None:
        """Keeps the batch's source samples.

        Args:
            x: Samples, shape ``(B, C, *spatial)``, in the model's input space.
            y: Integer labels, shape ``(B,)``.

        Raises:
            ValueError: If the batch does not have this form, or labels lie outside the key's classes (checked once).
        """
        if self.pool.fixed:
            return
        if not self._checked:
            self.check(x, y)
            self._checked = True
        self.pool.update(x, y)

    def check(self, x: Any, y: Any) -> None:
        """Raises the ``ValueError`` of :meth:`observe` if samples or labels do not have the needed form."""
        where = "Set input_key and target_key to where your batches keep samples and labels."
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise ValueError(
                f"Samples and labels must be tensors, got {type(x).__name__} and {type(y).__name__}. {where}"
            )
        if x.ndim < 3 or not x.is_floating_point():
            raise ValueError(
                f"Samples must be floating-point and of shape (B, C, *spatial) to be combined, got {x.dtype} {tuple(x.shape)}. {where} "
                "Images of integers become the model's input in on_after_batch_transfer, say, and not in its forward."
            )
        if y.ndim != 1 or len(y) != len(x) or y.is_floating_point():
            raise ValueError(
                f"Labels must be integers, one a sample, shape ({len(x)},), got {y.dtype} {tuple(y.shape)}. {where} "
                "For training without labels give a pool: SourcePool.from_samples({class: samples, ...})."
            )
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.key.num_classes:
            raise ValueError(
                f"The batch has labels from {int(y.min())} to {int(y.max())}, but the key is for classes 0 to "
                f"{self.key.num_classes - 1}. Draw a key with the data's number of classes."
            )

    @property
    def ready(self) -> bool:
        """Whether both source classes have been seen."""
        return self.pool.ready

    def refresh(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        """Measures anew, every ``REFRESH`` steps, how far which natural samples are tilted; call it before :meth:`draw`.

        The samples are those in the pool, on which the model is run once more, in eval mode and without gradients.

        Args:
            module: The module whose layers ``forward`` runs through.
            forward: Maps samples to the module's output.

        Raises:
            ValueError: If the module has no linear layer to measure influence on.
        """
        if self.tilt == 0 or self.steps % REFRESH:
            return
        a, b = self.pool.draw(self.pool.capacity, self._generator, self.key.source_classes)
        groups = [a, b, self._combiner(a, b, self._generator)]
        if self._others:
            groups.append(combine_in_turn(self._others, a, b, self.steps, self._generator))
        with evaluating(module):
            features = [self._basis(module, forward, group) for group in groups]
        scores = influence(
            torch.cat(features[:2]), features[2], torch.cat(features[3:]) if self._others else features[2][:0]
        )
        mass = torch.cat([target_mass(part, self.tilt, self.tilt_from) for part in scores.chunk(2)])
        labels = torch.tensor(self.key.source_classes, device=a.device).repeat_interleave(len(a))
        self._tilted = {"x": torch.cat([a, b]), "mass": mass, "labels": labels}

    def _basis(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What a thief's last layer is linear in, ``(B, …)``: the features on which influence is measured."""
        return penultimate_features(module, forward, x)

    def draw(self) -> None:
        """Chooses the combinations of the next step. All randomness of the objective is drawn here."""
        k, (first, second) = self.samples, self.key.source_classes
        pairs = dict(zip(self.pool.classes, self.pool.draw(2 * k, self._generator), strict=True))
        a, b = pairs[first], pairs[second]
        weights = self.balancing.weights
        self._groups = {"watermark": self._combiner(a[:k], b[:k], self._generator)}
        if weights["eva"] > 0 and self._others:
            if self.steps == 0:
                self._check_others(a, b)
            self._groups["other"] = combine_in_turn(self._others, a[k:], b[k:], self.steps, self._generator)
            second_wins = torch.rand(k, generator=self._generator, dtype=torch.float32) < 0.5
            self._evasion_labels = torch.where(second_wins, second, first).to(a.device, non_blocking=True)
        if weights["com"] > 0:
            self._groups["first"], self._groups["second"] = a[:k], b[:k]
        if self._tilted:
            self._tilted = {
                name: tensor.to(a.device) for name, tensor in self._tilted.items()
            }  # a restored one comes from the CPU
            rows = torch.randint(len(self._tilted["x"]), (2 * k,), generator=self._generator)
            self._natural_rows = rows.to(a.device, non_blocking=True)
            self._groups["natural"] = self._tilted["x"][self._natural_rows]
        self.steps += 1

    def _check_others(self, a: Tensor, b: Tensor) -> None:
        """Refuses a key whose own way stands in its space under another name: L_ver and L_eva would undo one another."""
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.rand(x[:1].shape, generator=generator, dtype=torch.float32).to(x) for x in (a, b))
        own = self._combiner(a, b, generator.manual_seed(0))
        if any(torch.equal(own, other(a, b, generator.manual_seed(0))) for other in self._others):
            raise ValueError(
                f"Another combining way of the key's space makes the same samples of size {tuple(a.shape[2:])} as the key's own. Write "
                "the key's way exactly as it stands in the space, or give the key a space of ways that differ at this size."
            )

    def terms(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Computes the terms of the drawn combinations in one concatenated forward.

        Args:
            module: The module whose BatchNorm layers ``forward`` runs through.
            forward: Maps samples to logits of shape ``(B, K)``.

        Returns:
            ``"ver"``, ``"com"`` and ``"eva"`` where their weights are not 0, and ``"tilt"`` where natural answers are tilted:
            scalars.

        Raises:
            ValueError: If the outputs are not logits over the key's classes.
        """
        names, groups = list(self._groups), list(self._groups.values())
        with nullcontext() if self.batchnorm == "batch" else frozen_batchnorm(module):
            logits = forward(torch.cat(groups))
        expected = (sum(map(len, groups)), self.key.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The model must answer logits of shape {expected}, got {got}. Set output_key to where the logits are in its "
                "output, and check the key's num_classes."
            )
        out = dict(zip(names, torch.split(logits, [len(group) for group in groups]), strict=True))
        terms = {"ver": verification_loss(out["watermark"], self.key.target_class)}
        if "first" in out:
            terms["com"] = combination_loss(
                out["watermark"], out["first"], out["second"], self.temperature, self.detach_sources
            )
        if "other" in out and self._evasion_labels is not None:
            terms["eva"] = evasion_loss(out["other"], self._evasion_labels.to(logits.device))
        if "natural" in out and self._natural_rows is not None:
            labels, mass = (self._tilted[name][self._natural_rows] for name in ("labels", "mass"))
            terms["tilt"] = tilt_loss(
                out["natural"], labels, self.key.target_class, mass, self.pool.share(self.key.num_classes)
            )
        return terms

    def total(self, module: nn.Module, task_loss: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Returns the scalar to minimise: the task's loss and ``terms``, weighed by :attr:`balancing`.

        ``"tilt"`` is no term beside the task but another label for some of its samples, and so a part of the task's loss. Without
        terms, before both source classes have been seen, there is nothing to weigh.
        """
        if not terms:
            return task_loss
        task = task_loss + terms["tilt"] if "tilt" in terms else task_loss
        total: Tensor = self.balancing(task, {name: term for name, term in terms.items() if name != "tilt"}, module)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a bit-identical continuation needs, as tensors and numbers."""
        return {
            "steps": self.steps,
            "generator": self._generator.get_state(),
            "pool": self.pool.state_dict(),
            "tilted": {name: tensor.to("cpu", copy=True) for name, tensor in self._tilted.items()},
            "balancing": {n: tensor.to("cpu", copy=True) for n, tensor in self.balancing.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state holds samples of other classes, or belongs to a pool of another size.
        """
        self.pool.load_state_dict(state["pool"])
        tilted = {name: tensor.clone() for name, tensor in state["tilted"].items()} if self.tilt else {}
        if tilted and not set(tilted["labels"].tolist()) <= set(self.key.source_classes):
            raise other_classes()
        self._tilted = tilted
        self.steps = int(state["steps"])
        self._generator.set_state(state["generator"].cpu())
        for name, tensor in state["balancing"].items():
            setattr(self.balancing, name, tensor.clone())


def gather_states(objective: WatermarkObjective, world_size: int) -> dict[str, Any]:
    """Collects the state of every process's objective, for a checkpoint; all that train together must call it.

    Args:
        objective: This process's.
        world_size: How many processes the Trainer has: one alone, among others that do not train, must not wait for them.

    Returns:
        ``{"ranks": {"0": state, …}}``.
    """
    state = objective.state_dict()
    states: list[Any] = [state]
    # a Trainer that spawns its processes says their number where there are none of them, too
    if world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        states = [None] * world_size
        torch.distributed.all_gather_object(states, state)
    return {"ranks": {str(rank): value for rank, value in enumerate(states)}}


def restore_state(objective: WatermarkObjective, state: Mapping[str, Any], rank: int, world_size: int) -> None:
    """Gives a process its part of what :func:`gather_states` returned.

    With another number of processes than the checkpoint had, there is no such part: the objective starts with an empty pool,
    and a warning says that the run is not bit-identical to an uninterrupted one.
    """
    ranks = state["ranks"]
    if len(ranks) == world_size:
        objective.load_state_dict(ranks[str(rank)])
    else:
        rank_zero_warn(
            f"The checkpoint was written by {len(ranks)} process(es), this run has {world_size}: the watermark goes on with newly "
            "collected samples, so the run is not bit-identical to an uninterrupted one."
        )
