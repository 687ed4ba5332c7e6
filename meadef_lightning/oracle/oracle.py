"""The only door to a victim in this process: answers under a policy, counted and paid for."""

import hashlib
import itertools

import torch
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.modes import evaluation_mode
from meadef_lightning.oracle.base import BlackBox
from meadef_lightning.oracle.ledger import QueryLedger
from meadef_lightning.oracle.policies import AnswerKind, Policy, Soft, update_digest
from meadef_lightning.watermark.batches import Key, pick


class Oracle(BlackBox):
    """A black box around a victim. Attacks and verification see nothing but `BlackBox.query`.

    The victim is neither copied nor changed: it answers in eval mode, in full precision and without gradients, and every
    training flag is put back. Inputs go to where the victim lies, answers come back to where the input lay.

    Args:
        victim: Any module that maps ``(B, C, H, W)`` inputs, in its own (normalised) input space, to ``(B, K)`` logits, or an
            encoder that maps them to ``(B, D)`` features.
        policy: What is given away; `Soft` by default. An encoder needs `Features`.
        ledger: Counts, budget and cache; by default without a limit, in memory. It is tied to this victim and policy.
        batch_size: Most inputs forwarded at once, and the unit that is paid for and stored as a whole.
        device: Where to move the victim, once and for good. By default it stays where it is.
        output_key: Where the logits are if the victim returns more than a tensor: index of a tuple, key of a mapping or name of
            an attribute, or a function of the output.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(
        self,
        victim: nn.Module,
        policy: Policy | None = None,
        ledger: QueryLedger | None = None,
        batch_size: int = 512,
        device: torch.device | str | None = None,
        output_key: Key | None = None,
    ) -> None:
        super().__init__(ledger, batch_size)
        self.victim = victim if device is None else victim.to(device)
        self.policy = Soft() if policy is None else policy
        self.output_key = output_key
        self._fingerprint = ""
        self._state: tuple[tuple[int, int], ...] | None = None

    @property
    @override
    def labels(self) -> AnswerKind:
        return self.policy.kind

    @override
    def fingerprint(self) -> str:
        """SHA-256 over the victim's structure and weights, the output key, and the policy, as 64 hexadecimal digits.

        It is computed again only when a weight was written to since (as PyTorch's version counters tell; writes through
        ``.data`` go unnoticed), so asking often is cheap and a victim that was trained further is not mistaken for the old one.
        """
        tensors = dict([*self.victim.named_parameters(), *self.victim.named_buffers()])
        state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors.values())
        if self._state != state:
            sha = hashlib.sha256(f"{self.policy.digest()}|{_name(self.output_key)}".encode())
            for name, module in self.victim.named_modules():
                sha.update(f"{name}|{type(module).__qualname__}|".encode())
            update_digest(sha, tensors)
            self._fingerprint, self._state = sha.hexdigest(), state
        return self._fingerprint

    @override
    def _answer(self, x: Tensor) -> Tensor:
        """Forward rows that are new to the ledger, and check what comes back."""
        weights = itertools.chain(self.victim.parameters(), self.victim.buffers())
        like = next((tensor for tensor in weights if tensor.is_floating_point()), x)
        # no_grad and not inference_mode: what a victim caches while it answers must stay usable in its own training.
        # No autocast: an answer must not depend on the precision of the attack that asks.
        with evaluation_mode(self.victim), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            logits = _logits(self.victim(x.to(like)), self.output_key)
            if logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
                raise ValueError(
                    f"The victim answered {len(x)} inputs with {logits.dtype} of shape {tuple(logits.shape)}, expected floating "
                    f"point logits of shape ({len(x)}, K). If they are a part of its output, name it with output_key."
                )
            broken = len(x) - int(logits.isfinite().all(dim=-1).sum())
            if broken:
                raise ValueError(
                    f"The victim answered {broken} of {len(x)} inputs with NaN or infinity; none of the batch was stored. Check "
                    "its weights, and that the inputs are normalised as in its training."
                )
            answers: Tensor = self.policy.to(logits.device)(logits)
        hard = self.labels == "hard"
        if answers.shape[:1] != x.shape[:1] or answers.ndim != (1 if hard else 2) or not answers.isfinite().all():
            raise ValueError(
                f"The policy {self.policy} gave {tuple(answers.shape)} {self.labels} answers for {len(x)} inputs, or some that "
                "are not finite. A policy must give one finite row per input."
            )
        return answers.to(torch.int64 if hard else torch.float32)


def _logits(output: object, key: Key | None) -> Tensor:
    """The logits within a victim's output."""
    logits = pick(output, key, "output_key")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"The victim's output is no tensor but a {type(output).__name__}, with a {type(logits).__name__} at "
            f"output_key={key!r}. Set output_key to the index or name of its logits, or to a function that returns them."
        )
    return logits


def _name(key: Key | None) -> str:
    """A name of the output key that stays the same between runs, which the address in a function's repr does not."""
    return f"{key.__module__}.{getattr(key, '__qualname__', type(key).__qualname__)}" if callable(key) else repr(key)
