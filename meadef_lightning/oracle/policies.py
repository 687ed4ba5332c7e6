"""What a victim gives away of what it knows: small composable modules from logits to answers.

A policy is a chain of stages. Every stage says which values it takes and which it gives, so that a chain is checked when it
is built: ``Compose([Temperature(2.0), TopK(3), Rounded(2)])`` is fine, a stage behind `HardLabel` is not. Where a chain goes
from logits to probabilities without saying so, the softmax is put in; every policy works on its own, too.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

AnswerKind = Literal["soft", "topk", "hard", "feature"]
Domain = Literal["logits", "probabilities", "labels", "features"]

_FIRST: Domain = "logits"  # what a victim gives to the first stage


class Policy(nn.Module):
    """Base of all policies: one stage, or (`Compose`) several.

    A subclass overrides `transform` and the three class attributes. What decides its answers are its public attributes, which
    must be JSON values (or `config` is overridden), and its parameters and buffers.

    Attributes:
        kind: What the answers are. ``"soft"`` and ``"topk"`` are ``(B, K)`` float32 probabilities, ``"hard"`` is ``(B,)`` int64
            classes, ``"feature"`` is ``(B, D)`` float32 features of an encoder.
        takes: Values the stage accepts. A stage that takes probabilities but not logits gets the softmax of logits.
        gives: Values the stage produces; ``None`` for those it was given, as `Rounded`.
    """

    kind: AnswerKind = "soft"
    takes: tuple[Domain, ...] = ("probabilities",)
    gives: Domain | None = "probabilities"

    @property
    def stages(self) -> tuple["Policy", ...]:
        """The chain this policy stands for, first stage first."""
        return (self,)

    def transform(self, values: Tensor) -> Tensor:
        """Apply this stage alone.

        Args:
            values: ``(B, K)`` float32, in one of the domains of `takes`.

        Returns:
            Values in the domain `gives`, one row per row of ``values``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define transform().")

    @override
    def forward(self, logits: Tensor) -> Tensor:
        """Turn logits into the answers a client sees.

        Args:
            logits: The victim's output, ``(B, K)`` floating point: logits, or an encoder's features.

        Returns:
            ``(B, K)`` float32 probabilities or features, or ``(B,)`` int64 classes; see `kind`.
        """
        values, domain = logits.float(), _FIRST
        for stage in self.stages:
            if domain == "logits" and domain not in stage.takes:
                values, domain = values.softmax(dim=-1), "probabilities"
            values, domain = stage.transform(values), stage.gives or domain
        return values.softmax(dim=-1) if domain == "logits" else values

    def config(self) -> dict[str, Any]:
        """What decides the answers of this stage, beside its parameters and buffers: its public attributes."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}

    def digest(self) -> str:
        """SHA-256 over the classes, configurations, parameters and buffers of all stages, as 64 hexadecimal digits.

        Raises:
            TypeError: If the configuration of a stage is not made of JSON values.
        """
        sha = hashlib.sha256()
        for stage in self.stages:
            kind = type(stage)
            try:
                text = json.dumps([kind.__module__, kind.__qualname__, stage.config()], sort_keys=True)
            except TypeError as error:
                raise TypeError(
                    f"The configuration of {kind.__name__} cannot be tied to a ledger: {error}. Make the attribute private and "
                    "override config() to return, as JSON values, what decides the answers."
                ) from error
            sha.update(text.encode())
            update_digest(sha, dict([*stage.named_parameters(), *stage.named_buffers()]))
        return sha.hexdigest()

    @override
    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())


def update_digest(sha: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Feed names, dtypes, shapes and bytes of tensors into a hash, in the mapping's order.

    Args:
        sha: A `hashlib` hash.
        tensors: Tensors of any dtype, shape and device.
    """
    for name, tensor in tensors.items():
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class Soft(Policy):
    """The full softmax, ``(B, K)`` float32 with rows that sum to one: what most published attacks assume."""

    takes = ("logits",)

    @override
    def transform(self, values: Tensor) -> Tensor:
        return values.softmax(dim=-1)


class Temperature(Policy):
    """Divide the logits before the softmax: a served model that is softened (``> 1``) or sharpened (``< 1``).

    Args:
        temperature: Positive, finite divisor of the logits.

    Raises:
        ValueError: If ``temperature`` is not positive and finite.
    """

    takes = ("logits",)
    gives = "logits"

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature!r}; 1.0 is the plain softmax.")
        self.temperature = float(temperature)

    @override
    def transform(self, values: Tensor) -> Tensor:
        return values / self.temperature


class TopK(Policy):
    """Keep the ``k`` largest probabilities of each row and set the others to 0.

    The kept values are *not* renormalised: a row sums to less than one, as with APIs that list their best classes and as in the
    truncation defence of Orekondy et al., "Knockoff Nets" (CVPR 2019, §6). Renormalising is the student's business.

    Args:
        k: Number of probabilities kept, at least 1.

    Raises:
        ValueError: If ``k`` is below 1 or, at the first answer, above the number of classes.
    """

    kind = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k!r}.")
        self.k = k

    @override
    def transform(self, values: Tensor) -> Tensor:
        if self.k > values.shape[-1]:
            raise ValueError(
                f"TopK keeps k={self.k} classes, but the victim has {values.shape[-1]}. Lower k, or use Soft()."
            )
        kept = values.topk(self.k, dim=-1)
        return torch.zeros_like(values).scatter_(-1, kept.indices, kept.values)


class Features(Policy):
    """An encoder's output as it is, ``(B, D)`` float32: what an embedding service answers. Only `Rounded` may follow.

    Args:
        normalise: Whether rows are divided by their L2 norm, as most embedding services do; a row of zeros stays one.
    """

    kind = "feature"
    takes = ("logits",)
    gives = "features"

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = normalise

    @override
    def transform(self, values: Tensor) -> Tensor:
        return F.normalize(values, dim=-1) if self.normalise else values


class Rounded(Policy):
    """Round probabilities, or features, to a number of decimals, half to even.

    Rows of probabilities need not sum to one any more, and with few decimals a row may be all zero: that is what the client gets.

    Args:
        decimals: Decimals kept, 0 to 7 (float32 holds no more).

    Raises:
        ValueError: If ``decimals`` is out of range.
    """

    takes = ("probabilities", "features")
    gives = None

    def __init__(self, decimals: int) -> None:
        super().__init__()
        if not 0 <= decimals <= 7:
            raise ValueError(f"decimals must lie in 0..7, got {decimals!r}.")
        self.decimals = decimals

    @override
    def transform(self, values: Tensor) -> Tensor:
        return values.round(decimals=self.decimals)


class HardLabel(Policy):
    """Only the most likely class, ``(B,)`` int64. In a chain it comes last; among equals the lowest class wins."""

    kind = "hard"
    takes = ("logits", "probabilities")
    gives = "labels"

    @override
    def transform(self, values: Tensor) -> Tensor:
        return values.argmax(dim=-1)


class Compose(Policy):
    """A chain of policies, applied in order; chains within chains are flattened.

    Args:
        policies: At least one policy.

    Raises:
        ValueError: If the chain is empty, or a policy does not take what the one before it gives: `Temperature` and `Soft`
            take logits and come before `TopK` and `Rounded`, `Features` comes first with at most `Rounded` behind it, and nothing
            follows `HardLabel`.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        super().__init__()
        chain = [stage for policy in policies for stage in policy.stages]
        if not chain:
            raise ValueError("Compose needs at least one policy; Soft() is the plain softmax.")
        giver, given = "the victim", _FIRST
        for stage in chain:
            if given not in stage.takes and not (given == "logits" and "probabilities" in stage.takes):
                raise ValueError(
                    f"{stage} takes {' or '.join(stage.takes)}, but {giver} before it gives {given}. Order the policies as "
                    "Temperature, Soft, TopK, Rounded, HardLabel, or as Features, Rounded."
                )
            if stage.gives is not None:
                given = stage.gives
            elif given == "logits":
                given = "probabilities"  # the softmax was put in
            giver = str(stage)
        self._chain = nn.ModuleList(chain)
        self.takes, self.gives = chain[0].takes, given
        kinds = [stage.kind for stage in chain]
        self.kind = next((kind for kind in ("hard", "feature", "topk") if kind in kinds), "soft")

    @property
    @override
    def stages(self) -> tuple[Policy, ...]:
        return tuple(stage for stage in self._chain if isinstance(stage, Policy))

    @override
    def extra_repr(self) -> str:
        return ""
