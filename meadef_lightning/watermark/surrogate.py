"""What a thief would take along, watched while the victim still trains: a small student of the model's own answers.

Success on the victim says nothing about survival, and a theft after every change of a setting is slow. So, every few epochs, a small network
learns from scratch what the model answers to natural samples, as a thief's would, and is asked combinations that it has never seen.

**Source.** Others choose a watermark's samples by what a surrogate learns (DeepTracer, AAAI 2026); watching a training with one is ours. The
student is trained by Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), §2, at temperature 1.

**Cost.** ``epochs`` forward and backward passes of the student over ``samples`` samples, and one forward pass of the model, each time.

**Pitfalls.** The samples are those that the model trains on, as the loader yields them, since a training has no others: a thief's
are disjoint, and a model is surer of its own, so a real theft from few images differs. Compare settings by it; report thefts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.random_state import kept_random_state
from meadef_lightning.watermark.batches import Key
from meadef_lightning.watermark.key import WatermarkKey
from meadef_lightning.watermark.measuring import Measuring
from meadef_lightning.watermark.objective import WatermarkObjective

Labels = Literal["soft", "hard"]


def distil(
    student: nn.Module, queries: Tensor, answers: Tensor, epochs: int = 8, batch_size: int = 128, lr: float = 3e-3
) -> None:
    """Trains a student on a model's answers with AdamW and a learning rate that makes one cycle; leaves it in eval mode.

    Args:
        student: A network that maps samples to logits of shape ``(B, K)``; changed in place.
        queries: Samples, ``(N, C, *spatial)``, on the student's device and in its precision.
        answers: Probabilities, floating point ``(N, K)``, or classes, int64 ``(N,)``.
        epochs: Passes over the queries.
        batch_size: Queries a step. The last step of a pass may have fewer, but never one alone, which BatchNorm would refuse.
        lr: Peak of the learning rate.

    Raises:
        ValueError: If there are fewer than two queries.
    """
    if len(queries) < 2:
        raise ValueError(f"A student learns from two queries at least, got {len(queries)}.")
    whole, rest = divmod(len(queries), batch_size)
    sizes = [batch_size] * whole + [rest] * (rest > 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(sizes))
    student.train()
    for _ in range(epochs):
        order = torch.randperm(len(queries), device=queries.device)
        for rows in torch.split(order[: sum(sizes)], sizes):
            optimizer.zero_grad()
            F.cross_entropy(student(queries[rows]), answers[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    student.eval()


class SurrogateCallback(Measuring):
    """Logs ``watermark/surrogate_wsr``: how much of the watermark a small student of the model's answers learns.

    Beside the callback that embeds: ``Trainer(callbacks=[WatermarkCallback(key), SurrogateCallback(key, network)])``. It changes nothing
    in the training, which stays bit for bit what it is without it, and logs after a validation epoch, on combinations of
    validation samples, also ``watermark/surrogate_wfpr`` (other ways of combining) and ``watermark/surrogate_fidelity`` (agreement
    with the model on these samples of the source classes as they are). Source, cost and pitfalls:
    :mod:`meadef_lightning.watermark.surrogate`.

    Args:
        key: The key, or the path of its file.
        network: Makes the student from the numbers of classes and of input channels. The thief's is unknown: take another than the victim's.
        every_n_epochs: How often: in the first validation after every so many epochs, and in those of the last epoch if ``max_epochs`` says which it is.
        samples: Training samples asked, the latest ones, of every process its own. They are kept where the batches are: 4,096 images 3x32x32 take 50 MB.
        labels: What the student sees: ``"soft"``, probabilities, or ``"hard"``, classes.
        epochs: The student's passes over the samples.
        batch_size: The student's, and of the questions to the model.
        lr: The student's largest learning rate.
        seed: The student's, the same every time: what changes is the model.
        buffer_size: Validation samples kept per source class.
        input_key: Where a batch keeps its samples: index, key, attribute name or function.
        target_key: Where a batch keeps its labels.
        output_key: Where the module's output keeps its logits; ``None`` if the output is the logits.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        key: WatermarkKey | str,
        network: Callable[[int, int], nn.Module],
        every_n_epochs: int = 5,
        samples: int = 4096,
        labels: Labels = "soft",
        epochs: int = 8,
        batch_size: int = 128,
        lr: float = 3e-3,
        seed: int = 0,
        buffer_size: int = 128,
        input_key: Key = 0,
        target_key: Key = 1,
        output_key: Key | None = None,
    ) -> None:
        key = key if isinstance(key, WatermarkKey) else WatermarkKey.load(key)
        super().__init__(key, input_key, target_key, output_key, buffer_size)
        counts = {"every_n_epochs": (every_n_epochs, 1), "epochs": (epochs, 1), "samples": (samples, 2)}
        for name, (value, least) in {**counts, "batch_size": (batch_size, 2)}.items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if labels not in get_args(Labels):
            raise ValueError(f"labels={labels!r} must be one of {get_args(Labels)}.")
        if lr <= 0:
            raise ValueError(f"lr={lr} must be above 0.")
        self.network, self.labels = network, labels
        self.every_n_epochs, self.samples, self.seed = every_n_epochs, samples, seed
        self._training: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
        self.objective = WatermarkObjective(key)  # which samples and labels fit the key; nothing is embedded
        self._queries: deque[Tensor] = deque()
        self._last = 0  # epoch

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts epochs from where the training starts or goes on, and warns if there is no validation to measure in."""
        self._last = trainer.current_epoch
        if not trainer.enable_validation:
            rank_zero_warn(
                f"{self.name}/surrogate_wsr is measured in validation, and this training has none: give it validation data and a "
                "validation_step, and leave limit_val_batches above 0."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch's samples, and lets the oldest go."""
        x = self._parts(batch)[0].detach()
        if self._queries and self._queries[-1].shape[1:] != x.shape[1:]:
            self._queries.clear()  # samples of another size: one network reads no two
        self._queries.append(x)
        while sum(map(len, self._queries)) - len(self._queries[0]) >= self.samples:
            self._queries.popleft()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the samples go."""
        self._queries.clear()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decides whether it is time for a student."""
        super().on_validation_epoch_start(trainer, pl_module)
        epoch = trainer.current_epoch + 1
        # validation may come more seldom than every epoch
        due = epoch // self.every_n_epochs > self._last // self.every_n_epochs or epoch == trainer.max_epochs
        self._measuring = self._measuring and due and sum(map(len, self._queries)) > 1
        if self._measuring:
            self._last = epoch

    @override
    def _measure(
        self, trainer: Trainer, module: LightningModule, groups: Mapping[str, Tensor], samples: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Trains a student, and returns the shares of each group that it answers with the target class, and its fidelity."""
        model = module if trainer.model is None else trainer.model  # as the strategy wraps it
        size = self._training["batch_size"]

        def ask(x: Tensor) -> Tensor:
            return torch.cat([self._forward(model, part) for part in torch.split(x, size)]).float()

        queries = torch.cat(tuple(self._queries))[-self.samples :]
        natural = torch.cat(list(samples.values()))
        answers, truth = ask(queries), ask(natural).argmax(-1)
        # validation runs in inference mode, under the Trainer's precision, and with random numbers that belong to the training
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(queries.device.type, enabled=False),
            kept_random_state(queries.device),
        ):
            torch.manual_seed(self.seed)
            student = self.network(self.key.num_classes, queries.shape[1]).to(queries.device, torch.float32)
            learnt = answers.clone().softmax(-1) if self.labels == "soft" else answers.clone().argmax(-1)
            distil(student, queries.clone().float(), learnt, **self._training)
            with torch.no_grad():
                hits = {
                    name: (student(group.float()).argmax(-1) == self.key.target_class).float().mean()
                    for name, group in groups.items()
                }
                fidelity = (student(natural.float()).argmax(-1) == truth).float().mean()
        return {**{f"surrogate_{name}": value for name, value in hits.items()}, "surrogate_fidelity": fidelity}
