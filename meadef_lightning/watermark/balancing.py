"""How the watermark's terms are weighed against the main task.

Each rule is a small module called with the task's loss and the watermark's terms; it returns the one scalar to minimise.
Measured on a ResNet-18 step on CPU: :class:`Fixed` is free, :class:`MGDA` costs two more backward passes over the network
(about 2.1 times a plain step when done on every step), :class:`LastLayerMGDA` 1.07 times, with somewhat other weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._functorch import config as functorch_config

Terms = Mapping[str, Tensor]


class Balancing(nn.Module):
    """Base of the balancing rules.

    Attributes:
        weights: Weight of each term (``"ver"``, ``"com"``, ``"eva"``); a term of weight 0 is not even computed.
        needs_gradients: Whether the rule takes gradients itself, which sharded parameters (FSDP) do not allow.
    """

    needs_gradients = False

    def __init__(self, ver: float = 1.0, com: float = 0.0, eva: float = 1.0) -> None:
        super().__init__()
        self.weights = {"ver": float(ver), "com": float(com), "eva": float(eva)}
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"The weight {name}={weight} must be a finite number of at least 0.")
        if self.weights["ver"] == 0:
            raise ValueError("ver=0 would leave out the verification loss, and with it the watermark.")

    def forward(self, task_loss: Tensor, terms: Terms, module: nn.Module) -> Tensor:
        """Combines the losses.

        Args:
            task_loss: The main task's loss, a scalar.
            terms: The watermark's terms, scalars by name.
            module: The network whose parameters the losses share.

        Returns:
            The scalar to minimise.
        """
        raise TypeError(f"{type(self).__name__} must implement forward(task_loss, terms, module).")


class Fixed(Balancing):
    """``task + ver·L_ver + com·L_com + eva·L_eva`` with constant weights.

    The defaults suit the last third of a training. A larger ``ver`` costs the task more; a larger ``eva`` lowers false positives, and
    with them what a thief takes along. How much any of it costs depends on the key (see the tuning page beside this file).

    Args:
        ver: Weight of the verification loss, above 0.
        com: Weight of the combination loss.
        eva: Weight of the evasion loss.
    """

    def __init__(self, ver: float = 0.2, com: float = 0.0, eva: float = 0.1) -> None:
        super().__init__(ver, com, eva)

    def forward(self, task_loss: Tensor, terms: Terms, module: nn.Module) -> Tensor:
        """Adds the weighted terms to the task's loss."""
        return task_loss + sum((self.weights[name] * value for name, value in terms.items()), task_loss.new_zeros(()))


def _processes(module: nn.Module) -> int:
    """How many processes train a module together: its Trainer's, which may be one alone among others, or without a Trainer all there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    trainer = getattr(module, "_trainer", None)
    return torch.distributed.get_world_size() if trainer is None else int(trainer.world_size)


class MGDA(Balancing):
    """The paper's rule (Eq. 9–11): the convex combination of smallest gradient norm.

    ``α1·task + α2·(ver·L_ver + com·L_com) + α3·eva·L_eva`` with ``α = argmin ‖Σ αᵢ∇lᵢ‖²``, ``α ≥ 0``, ``Σα = 1`` (Désidéri 2012;
    Sener & Koltun 2018). The solver is TorchJD's ``MGDAWeighting`` on the Gramian of the gradients. Under DDP the gradients
    are averaged over the Trainer's ranks first, so that every rank finds the same weights.

    Args:
        ver: Weight β2 of the verification loss inside the watermark loss, above 0.
        com: Weight β1 of the combination loss inside the watermark loss.
        eva: Weight of the evasion loss before balancing.
        every_n_steps: Solve anew only on every n-th call and keep the weights in between.
        normalize: Scale the gradients before solving: ``"none"`` (the paper), ``"l2"`` (unit length) or ``"loss+"``
            (divided by loss times length), both from Sener & Koltun's code.
    """

    needs_gradients = True
    alphas: Tensor
    calls: Tensor

    def __init__(
        self,
        ver: float = 1.0,
        com: float = 1.0,
        eva: float = 1.0,
        every_n_steps: int = 1,
        normalize: Literal["none", "l2", "loss+"] = "none",
    ) -> None:
        super().__init__(ver, com, eva)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1.")
        if normalize not in ("none", "l2", "loss+"):
            raise ValueError(f"normalize={normalize!r} is not one of 'none', 'l2', 'loss+'.")
        self.every_n_steps, self.normalize = every_n_steps, normalize
        self.register_buffer("alphas", torch.zeros(0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device="cpu"))

    def parameters_to_balance(self, module: nn.Module) -> list[nn.Parameter]:
        """Returns the parameters whose gradients are compared: all that are trained."""
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def forward(self, task_loss: Tensor, terms: Terms, module: nn.Module) -> Tensor:
        """Weighs the task, the watermark and the evasion loss."""
        watermark = sum((self.weights[n] * terms[n] for n in ("ver", "com") if n in terms), task_loss.new_zeros(()))
        losses = [task_loss, watermark]
        if "eva" in terms:
            losses.append(self.weights["eva"] * terms["eva"])
        if len(self.alphas) != len(losses) or int(self.calls) % self.every_n_steps == 0:
            self.alphas = self.solve(losses, module)
        self.calls += 1
        alphas = self.alphas.to(task_loss.device)
        return torch.stack([alpha * loss for alpha, loss in zip(alphas.unbind(), losses, strict=True)]).sum()

    def solve(self, losses: Sequence[Tensor], module: nn.Module) -> Tensor:
        """Returns the min-norm weights of ``losses``, shape ``(len(losses),)``, without touching any ``.grad``."""
        from torchjd.aggregation import MGDAWeighting

        parameters = self.parameters_to_balance(module)
        device = losses[0].device.type
        # a constant factor leaves the weights alone, and keeps half-precision gradients from vanishing
        scale = 1024.0 if torch.is_autocast_enabled(device) else 1.0
        with torch.autocast(device, enabled=False):  # which would make the Gramian half-precision, too
            rows = []
            for loss in losses:
                gradients = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
                rows.append(
                    torch.cat(
                        [
                            (torch.zeros_like(parameter) if gradient is None else gradient).flatten().float()
                            for parameter, gradient in zip(parameters, gradients, strict=True)
                        ]
                    )
                )
            matrix = torch.stack(rows) / scale
            if (together := _processes(module)) > 1:
                torch.distributed.all_reduce(matrix)
                matrix /= together
            # on the CPU: the solver looks at values all the time, so wait for the device only once
            gramian = (matrix @ matrix.T).cpu()
            if self.normalize != "none":
                length = gramian.diagonal().sqrt()
                if self.normalize == "loss+":
                    length = length * torch.stack([loss.detach().float() for loss in losses]).cpu()
                length = length.clamp_min(torch.finfo(length.dtype).tiny)
                gramian = gramian / length / length[:, None]  # one by one: the square of a vanishing length would be 0
            if not gramian.isfinite().all():
                # an overflow, whose step AMP skips anyway, must not live on in weights that are kept for n steps
                return gramian.new_full((len(losses),), 1 / len(losses))
            weights: Tensor = MGDAWeighting()(gramian)
            return weights.detach()


class LastLayerMGDA(MGDA):
    """:class:`MGDA` on the gradients of the last linear layer only: nearly free, with somewhat other weights.

    Args:
        ver: As in :class:`MGDA`.
        com: As in :class:`MGDA`.
        eva: As in :class:`MGDA`.
        every_n_steps: As in :class:`MGDA`.
        normalize: As in :class:`MGDA`.
        layer: Name of the layer (as in ``named_modules()``); ``None`` takes the last ``nn.Linear``.
    """

    def __init__(
        self,
        ver: float = 1.0,
        com: float = 1.0,
        eva: float = 1.0,
        every_n_steps: int = 1,
        normalize: Literal["none", "l2", "loss+"] = "none",
        layer: str | None = None,
    ) -> None:
        super().__init__(ver, com, eva, every_n_steps, normalize)
        self.layer = layer

    def parameters_to_balance(self, module: nn.Module) -> list[nn.Parameter]:
        """Returns the last layer's trained parameters.

        Raises:
            ValueError: If the layer does not exist or has no trained parameters.
        """
        layers = dict(module.named_modules())
        name = self.layer
        if name is None:
            name = next((n for n in reversed(layers) if isinstance(layers[n], nn.Linear)), None)
        if name is None or name not in layers:
            linear = [n for n in layers if isinstance(layers[n], nn.Linear)]
            raise ValueError(
                f"LastLayerMGDA(layer={self.layer!r}) finds no such layer; the module's linear layers are {linear}."
            )
        parameters = [parameter for parameter in layers[name].parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"The layer {name!r} has no trained parameters to balance on; name another with layer=….")
        return parameters


def check_gradients(balancing: Balancing, strategy: Strategy, module: nn.Module) -> None:
    """Refuses a set-up in which ``balancing`` cannot take the gradients it needs.

    Raises:
        MisconfigurationException: If ``strategy`` shards the gradients, or ``module`` is compiled in a way that allows one backward
            pass only, which would else come out when the watermark's turn comes.
    """
    if not balancing.needs_gradients:
        return
    name = type(balancing).__name__
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"{name} needs whole gradients, which {type(strategy).__name__} shards. Use balancing=Fixed(...) with this strategy."
        )
    marks = ("_compiled_call_impl", "_compiler_ctx")  # of module.compile() and of Trainer.fit(torch.compile(module))
    if getattr(functorch_config, "donated_buffer", False) and any(
        isinstance(layer, OptimizedModule) or any(getattr(layer, mark, None) is not None for mark in marks)
        for layer in module.modules()
    ):
        raise MisconfigurationException(
            f"{name} needs several backward passes over one graph, but this module is compiled, and torch.compile gives buffers away "
            "in the first. Set torch._functorch.config.donated_buffer = False before the training, or use balancing=Fixed(...)."
        )
