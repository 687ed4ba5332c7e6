"""What an encoder's features are worth while it trains: a linear classifier and nearest neighbours, from outside the module.

**Source.** Linear evaluation as in SimCLR (Chen et al., 2020, §2.3), trained along with the encoder; weighted k-NN of Wu et al.,
"Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018, §3.4), by lightly.

**Cost.** One forward without gradients a batch for the linear probe (``every_n_steps`` makes it rarer), one per stored sample and
validation for k-NN.

**Pitfalls.** Both need labels, in batches of an otherwise unlabelled training. They watch; the figures to report come from a
classifier trained on the finished encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.watermark.batches import Key, pick
from meadef_lightning.watermark.feature_objective import encode
from meadef_lightning.watermark.tilt import evaluating


class _Probe(Callback):
    """What both probes share: where samples, labels and features are.

    Args:
        num_classes: Number of classes; by default the data module's.
        encoder_key: Submodule or method that makes the features; ``None`` for the module's ``forward``.
        input_key: Where a batch keeps its samples; of several views the first is taken.
        target_key: Where a batch keeps its labels.
    """

    def __init__(self, num_classes: int | None, encoder_key: str | None, input_key: Key, target_key: Key) -> None:
        super().__init__()
        self.num_classes, self.encoder_key = num_classes, encoder_key
        self.input_key, self.target_key = input_key, target_key

    def classes(self, trainer: Trainer) -> int:
        """Returns the number of classes.

        Raises:
            MisconfigurationException: If nobody knows it.
        """
        count = self.num_classes or getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if count is None:
            raise MisconfigurationException(
                f"{type(self).__name__} needs num_classes, which was not given, and no data module with num_classes is attached. Give "
                f"{type(self).__name__}(num_classes=…), or train with a data module."
            )
        return int(count)

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns a batch's samples and labels."""
        x, y = pick(batch, self.input_key, "input_key"), pick(batch, self.target_key, "target_key")
        x = x[0] if isinstance(x, (list, tuple)) else x
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.is_floating_point() or y.shape != x.shape[:1]:
            raise MisconfigurationException(
                f"{type(self).__name__} needs batches of samples and integer labels, one each. Set input_key and target_key to where "
                "they are."
            )
        return x, y.long()

    def features(self, trainer: Trainer, module: LightningModule, x: Tensor) -> Tensor:
        """Returns float32 features of unit length, as the finished encoder would make them, without gradients."""
        # no Trainer method is used in eval mode here, so no metric or hook of the user's runs
        with evaluating(module), trainer.precision_plugin.val_step_context():
            features = encode(module, self.encoder_key, x)
        return F.normalize(features.float(), dim=1)


class OnlineLinearProbe(_Probe):
    """Trains a linear classifier on an encoder's features beside it, and logs ``probe_accuracy`` in validation.

    The encoder does not notice: features carry no gradients, the classifier starts at zero (no random numbers), and neither it
    nor its optimiser (Adam) belongs to the module. Checkpoints keep both.

    Args:
        num_classes: Number of classes; by default the data module's.
        lr: Learning rate.
        every_n_steps: Train the probe on every n-th batch.
        encoder_key: Submodule or method that makes the features; ``None`` for the module's ``forward``.
        input_key: Where a batch keeps its samples; of several views the first is taken.
        target_key: Where a batch keeps its labels.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        lr: float = 0.02,
        every_n_steps: int = 1,
        encoder_key: str | None = None,
        input_key: Key = 0,
        target_key: Key = 1,
    ) -> None:
        super().__init__(num_classes, encoder_key, input_key, target_key)
        if not lr > 0 or every_n_steps < 1:
            raise ValueError(f"lr={lr} must be positive and every_n_steps={every_n_steps} at least 1.")
        self.lr, self.every_n_steps = lr, every_n_steps
        self.classifier: nn.Linear | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._restored: Mapping[str, Any] | None = None

    def _build(self, trainer: Trainer, features: Tensor) -> tuple[nn.Linear, torch.optim.Optimizer]:
        if self.classifier is None or self.optimizer is None:
            # built empty and filled with zeros: drawing weights would change the encoder's random numbers
            layer = nn.Linear(features.shape[1], self.classes(trainer), device="meta", dtype=torch.float32)
            layer = layer.to_empty(device=features.device)
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
            self.classifier, self.optimizer = layer, torch.optim.Adam(layer.parameters(), self.lr)
            if self._restored is not None:
                self.classifier.load_state_dict(self._restored["classifier"])
                self.optimizer.load_state_dict(self._restored["optimizer"])
                self._restored = None
        return self.classifier, self.optimizer

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the classifier on the batch's features."""
        if trainer.fit_loop.total_batch_idx % self.every_n_steps:
            return
        x, y = self.parts(batch)
        features = self.features(trainer, pl_module, x)
        classifier, optimizer = self._build(trainer, features)
        with torch.enable_grad():
            # unit vectors have small entries; √D gives them the size that learning rates are made for
            loss = F.cross_entropy(classifier(features * features.shape[1] ** 0.5), y)
        parameters = list(classifier.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = trainer.strategy.reduce(gradient, reduce_op="mean")  # one classifier on all processes
        optimizer.step()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Logs ``probe_accuracy`` on the first validation loader, once the classifier has been trained at all."""
        if dataloader_idx > 0 or trainer.sanity_checking or self.classifier is None:
            return
        x, y = self.parts(batch)
        with torch.no_grad():
            features = self.features(trainer, pl_module, x)
            right = self.classifier(features * features.shape[1] ** 0.5).argmax(dim=1) == y
        pl_module.log(
            "probe_accuracy",
            right.float().mean(),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(x),
            prog_bar=True,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the classifier and its optimiser."""
        if self.classifier is None or self.optimizer is None:
            return {} if self._restored is None else dict(self._restored)
        return {"classifier": self.classifier.state_dict(), "optimizer": self.optimizer.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the number of features is known."""
        self.classifier = self.optimizer = None
        self._restored = state_dict or None


class KNNProbe(_Probe):
    """Logs ``knn_accuracy`` in validation: how many samples are of the class of their nearest training samples' features.

    The last training samples that came by are kept, and encoded anew at each validation. They are not in checkpoints: the first
    validation after a resumption knows only the samples since.

    Args:
        num_classes: Number of classes; by default the data module's.
        neighbours: Neighbours that vote, weighed by ``exp(cosine / temperature)``.
        temperature: Temperature of the votes.
        bank_size: Training samples kept.
        encoder_key: Submodule or method that makes the features; ``None`` for the module's ``forward``.
        input_key: Where a batch keeps its samples; of several views the first is taken.
        target_key: Where a batch keeps its labels.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        neighbours: int = 20,
        temperature: float = 0.1,
        bank_size: int = 1024,
        encoder_key: str | None = None,
        input_key: Key = 0,
        target_key: Key = 1,
    ) -> None:
        super().__init__(num_classes, encoder_key, input_key, target_key)
        if neighbours < 1 or bank_size < 1 or not temperature > 0:
            raise ValueError(
                f"neighbours={neighbours} and bank_size={bank_size} must be at least 1, temperature={temperature} positive."
            )
        self.neighbours, self.temperature, self.bank_size = neighbours, temperature, bank_size
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._bank: tuple[Tensor, Tensor] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with an empty bank."""
        self._kept, self._bank = [], None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch, the oldest giving way."""
        self._kept.append(tuple(part.detach().clone() for part in self.parts(batch)))  # type: ignore[arg-type]
        while sum(len(y) for _, y in self._kept[1:]) >= self.bank_size:
            del self._kept[0]

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Encodes the kept samples."""
        self._bank = None
        if self._kept and not trainer.sanity_checking:
            with torch.no_grad():
                features = torch.cat([self.features(trainer, pl_module, x) for x, _ in self._kept])
            self._bank = (
                features[-self.bank_size :].T.contiguous(),
                torch.cat([y for _, y in self._kept])[-self.bank_size :],
            )

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Logs ``knn_accuracy`` on the first validation loader."""
        if dataloader_idx > 0 or self._bank is None:
            return
        from lightly.utils.benchmarking import knn_predict

        x, y = self.parts(batch)
        with torch.no_grad():
            bank, labels = self._bank
            features = self.features(trainer, pl_module, x)
            neighbours = min(self.neighbours, len(labels))
            votes = knn_predict(features, bank, labels, self.classes(trainer), neighbours, self.temperature)
        pl_module.log(
            "knn_accuracy",
            (votes[:, 0] == y).float().mean(),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(x),
        )
