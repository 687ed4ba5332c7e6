"""What an experiment YAML says, as typed dataclasses: the parser, its ``--help`` and the checks all follow from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.detection.base import InputDetector, ModelDetector
from meadef_lightning.extraction import DistillationDataModule, Student
from meadef_lightning.extraction.encoder_student import EncoderStudent
from meadef_lightning.oracle import BlackBox, Policy
from meadef_lightning.protection.patch import PatchVictim
from meadef_lightning.removal.base import Removal
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.victims.simclr import SimCLRVictim
from meadef_lightning.victims.supervised import SupervisedVictim
from meadef_lightning.watermark import WatermarkCallback, WatermarkKey, default_combiners

RESERVED = {"victim", "clean", "reference", "patched"}
"""Names that the pipeline gives to its own stages, besides those of further references."""

Model = Classifier | Encoder
"""What a stage trains."""

TrainerOptions = dict[str, Any]
"""Arguments of ``lightning.pytorch.Trainer``, e.g. ``{max_epochs: 30, accelerator: gpu}``."""


@dataclass
class KeySpec:
    """Where the watermark key comes from: exactly one of the first three.

    Args:
        file: A key file, written by ``WatermarkKey.save``.
        secret_env: Environment variable that holds the owner secret from which the key is drawn.
        public_secret: A secret written into the configuration, and so none: for demos and studies only.
        beacon: Public random value that is mixed into a drawn key.
        without: Ways of combining that the key is not drawn from, e.g. ``[PixelBlend]`` for colour photographs.
    """

    file: str | None = None
    secret_env: str | None = None
    public_secret: str | None = None
    beacon: str = ""
    without: list[str] = field(default_factory=list)

    def resolve(self, num_classes: int) -> WatermarkKey:
        """Returns the key for a task of ``num_classes`` classes.

        Raises:
            MisconfigurationException: If not exactly one source is given, the variable is empty, the key is for another
                number of classes, or ``without`` names no way or stands beside a file.
        """
        given = [name for name in ("file", "secret_env", "public_secret") if getattr(self, name)]
        if len(given) != 1:
            raise MisconfigurationException(
                f"The watermark key needs exactly one of file, secret_env and public_secret, got {given or 'none'}."
            )
        if self.file:
            if self.without:
                raise MisconfigurationException(
                    f"without={self.without} says what a key is drawn from, but the key in {self.file} is drawn already. Leave it out, or "
                    "draw another key: meadef key draw --without."
                )
            key = WatermarkKey.load(self.file)
            if key.num_classes != num_classes:
                raise MisconfigurationException(
                    f"The key in {self.file} is for {key.num_classes} classes, but the data has {num_classes}. Draw a key for this data."
                )
            return key
        secret = self.public_secret
        if self.secret_env:
            secret = os.environ.get(self.secret_env)
            if not secret:
                raise MisconfigurationException(
                    f"The environment variable {self.secret_env}, from which the key is to be drawn, is not set. Export it, e.g. "
                    f"{self.secret_env}=$(python -c 'import secrets; print(secrets.token_hex(16))')."
                )
        try:
            combiners = default_combiners(self.without)
        except ValueError as error:
            raise MisconfigurationException(f"The watermark key: {error}") from error
        return WatermarkKey.draw(num_classes, secret or "", self.beacon, combiners)


@dataclass
class VictimSpec:
    """The owner's training; it is run twice, with and without the watermark, from the same seed.

    Args:
        model: The victim: a classifier, or an encoder trained without labels.
        trainer: Arguments of the Trainer.
    """

    model: SupervisedVictim | SimCLRVictim
    trainer: TrainerOptions = field(default_factory=lambda: {"max_epochs": 20})


@dataclass
class WatermarkSpec:
    """How the victim is watermarked.

    Args:
        key: Where the key comes from.
        callback: The callback, called with the key.
    """

    key: KeySpec
    callback: Callable[[WatermarkKey], WatermarkCallback] = WatermarkCallback


@dataclass
class AttackSpec:
    """One theft through the oracle.

    Args:
        name: Unique name, used for directories and in the report.
        student: The thief's model. One that imitates features asks an encoder itself, a classifier what stands on it.
        policy: What the API answers; ``None`` for soft labels. Encoders need ``meadef_lightning.oracle.Features``.
        queries: The attack: makes the thief's data from the oracle and the data splits.
        budget: Most distinct inputs the oracle answers; ``None`` for no limit.
        budgets: Numbers of queries for a curve: the theft is run once for each, as ``NAME-1000`` and so on, with that number as
            the ``queries`` argument of its data module.
        trainer: Arguments of the Trainer.
    """

    name: str
    student: Student | EncoderStudent
    policy: Policy | None = None
    queries: Callable[[BlackBox, SplitDataModule], LightningDataModule] = DistillationDataModule
    budget: int | None = None
    budgets: list[int] = field(default_factory=list)
    trainer: TrainerOptions = field(default_factory=lambda: {"max_epochs": 20})


@dataclass
class TrainedSpec:
    """Models that are trained on true labels and never see the victim.

    Args:
        name: Unique name, used for directories and in the report.
        model: The model.
        trainer: Arguments of the Trainer.
        count: How many, each from its own seed.
    """

    name: str
    model: SupervisedVictim | SimCLRVictim
    trainer: TrainerOptions = field(default_factory=lambda: {"max_epochs": 20})
    count: int = 1

    @property
    def names(self) -> list[str]:
        """The names of its stages: its own, or of several with their numbers from 0."""
        return [self.name] if self.count == 1 else [f"{self.name}-{number}" for number in range(self.count)]


@dataclass
class IndependentSpec(TrainedSpec):
    """A negative control: a model of the thief's means, trained on images of the attacker's split."""


@dataclass
class ReferenceSpec(TrainedSpec):
    """Reference models of another kind than the victim, trained on its images: a thief may choose any network."""


@dataclass
class DownstreamSpec:
    """What stands on an encoder: a linear probe on its frozen features, by which encoders are judged as classifiers are.

    Args:
        split: Whose labelled images it is fitted on, the same for every encoder; neither test nor verification images.
        weight_decay: L2 penalty of its weights.
    """

    split: Literal["attacker", "victim"] = "attacker"
    weight_decay: float = 1e-3


@dataclass
class RemovalSpec:
    """One attack that scrubs a watermark off a model which the thief holds with all its weights.

    Args:
        name: Unique name; what is left of TARGET is the suspect ``TARGET.NAME``.
        method: The attack.
        of: Models it acts on: ``victim``, ``patched`` (the positive control), or names of thefts.
        points: Accuracy on his own images that the thief gives away at most, in ``[0, 1]``.
        share: Share of the attacker's split that he has, in ``(0, 1]``.
    """

    name: str
    method: Removal
    of: list[str] = field(default_factory=lambda: ["victim"])
    points: float = 0.05
    share: float = 1.0


@dataclass
class DetectionSpec:
    """One search for a watermark, in a model or among the queries that it is asked.

    Args:
        name: Unique name.
        method: The detector. One that searches models also searches the clean ones, its negative controls.
        of: Models it acts on, as for removals. One that screens inputs may act on clean ones, too: ``clean``, or names of independent models.
            What stands out there does so without any watermark.
        share: Share of the attacker's split that the searcher has, in ``(0, 1]``.
    """

    name: str
    method: ModelDetector | InputDetector
    of: list[str] = field(default_factory=lambda: ["victim"])
    share: float = 1.0


@dataclass
class PatchedSpec:
    """The positive control of removals and detections: a victim with a plain patch backdoor, which the methods were made for.

    Args:
        model: The victim; ``None`` for no positive control.
        trainer: Arguments of the Trainer.
    """

    model: PatchVictim | None = None
    trainer: TrainerOptions = field(default_factory=lambda: {"max_epochs": 20})


@dataclass
class VerificationSpec:
    """The pre-registered test every suspect goes through.

    Args:
        alpha: Significance level of a *supported* verdict.
        samples: Watermark samples for the success rate.
        decoys: Decoy keys; a key space of at most this size is enumerated.
        decoy_samples: Samples per decoy combination.
        seed: The verifier's seed: choice of decoys and pairing of source images.
        batch_size: Samples per forward.
    """

    alpha: float = 1e-3
    samples: int = 512
    decoys: int = 9999
    decoy_samples: int = 32
    seed: int = 0
    batch_size: int = 512


@dataclass
class ExperimentSpec:
    """A whole experiment: victim, thefts, negative controls, verdicts.

    ``references`` says how many reference models like the victim every suspect is judged above, and ``other_references`` which others; what
    several buy is said in :mod:`~meadef_lightning.verification.responses`.
    """

    experiment: str
    data: SplitDataModule
    victim: VictimSpec
    watermark: WatermarkSpec
    extraction: list[AttackSpec]
    independent: list[IndependentSpec]
    downstream: DownstreamSpec
    patched: PatchedSpec
    removal: list[RemovalSpec]
    detection: list[DetectionSpec]
    verification: VerificationSpec
    references: int
    other_references: list[ReferenceSpec]
    seeds: list[int]

    @property
    def reference_names(self) -> list[str]:
        """The names of the reference models' stages: ``reference``, ``reference-1``, ``reference-2`` and so on, then those of other kinds."""
        # of a file that is still to be checked there may be none
        others = [name for control in self.other_references or [] for name in control.names]
        return ["reference", *(f"reference-{number}" for number in range(1, self.references)), *others]

    @property
    def clean_names(self) -> list[str]:
        """The names of the negative controls: ``clean``, and those of the independent models."""
        # of a file that is still to be checked there may be none
        return ["clean", *(name for control in self.independent or [] for name in control.names)]
