"""The stages of a thief who fights back: removals and detections on the victim, on stolen models, and on a positive control."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection.base import Finding, InputDetector, ModelDetector, roc_auc
from meadef_lightning.detection.mixture_scan import MixtureFinding
from meadef_lightning.experiment.artifacts import (
    file_sha256,
    is_rank_zero,
    make_directory,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from meadef_lightning.experiment.robustness_figures import trigger_pictures
from meadef_lightning.experiment.spec import DetectionSpec, RemovalSpec, VerificationSpec
from meadef_lightning.experiment.stage_directory import Stage
from meadef_lightning.experiment.stages import RESULT
from meadef_lightning.experiment.tracking import Track, untracked
from meadef_lightning.experiment.weights import MODEL
from meadef_lightning.protection.patch import PatchVictim
from meadef_lightning.removal.base import AccuracyBudget, accuracy, classes_of
from meadef_lightning.verification import VerificationDataModule
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.watermark import WatermarkKey

TRIGGERS = "triggers.png"


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """What an owner watches while his watermark is attacked; the thief sees none of it.

    Args:
        x: Natural test samples, ``(N, C, H, W)``.
        y: Their classes, int64 ``(N,)``.
        trigger: Watermark samples, ``(n, C, H, W)``.
        control: Their matched controls, ``(m, C, H, W)``.
        target: The class that is asked for.
    """

    x: Tensor
    y: Tensor
    trigger: Tensor
    control: Tensor
    target: int

    @classmethod
    def of_key(cls, key: WatermarkKey, data: SplitDataModule, options: VerificationSpec) -> Probe:
        """Takes the samples that a verification with these options would ask."""
        settings = {name: value for name, value in asdict(options).items() if name != "alpha"}
        asked = VerificationDataModule(key, data, **settings)
        asked.setup("predict")
        trigger, control = (torch.cat([x for x, _ in loader]) for loader in asked.predict_dataloader()[:2])
        return cls(*data.tensors("test"), trigger, control, key.target_class)

    @classmethod
    def of_patch(cls, victim: PatchVictim, data: SplitDataModule) -> Probe:
        """Stamps the test samples of other classes; the same samples unstamped are the controls."""
        x, y = data.tensors("test")
        others = x[y != victim.target_class]
        return cls(x, y, victim.trigger(others), others, victim.target_class)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Returns accuracy, WSR and WFPR of a model, in ``[0, 1]``."""
        hits = [float((classes_of(model, x) == self.target).float().mean()) for x in (self.trigger, self.control)]
        return {"accuracy": accuracy(model, self.x, self.y), "wsr": hits[0], "wfpr": hits[1]}


def removal_stage(
    directory: Path,
    spec: RemovalSpec,
    inputs: Mapping[str, str],
    load: Callable[[], Classifier],
    data: SplitDataModule,
    probe: Callable[[], Probe],
    seed: int,
    model_config: Mapping[str, Any],
    track: Track = untracked,
) -> dict[str, Any]:
    """Scrubs a model until the thief's accuracy budget is spent.

    Args:
        directory: The stage's directory.
        spec: The attack.
        inputs: Digests of what the result depends on.
        load: Loads the model, which is scrubbed on the device that it lies on; called only if there is something to do.
        data: The data splits; the thief sees the attacker's only.
        probe: Makes what the owner measures along the path; called likewise.
        seed: Seed of the attack.
        model_config: The model's configuration, for ``config.yaml``.
        track: Follows the stage.

    Returns:
        What ``result.json`` holds: ``{"unit": …, "points": …, "chosen": …, "curve": […], "gains": {…}, "sha256": …}``.
    """
    with Stage(directory, directory.name, inputs) as stage, track(stage):
        if not stage.done:
            model, watched = load(), probe()
            network = _network(model)
            thief = ThiefData.of(data, spec.share, seed=seed)
            budget = AccuracyBudget(network, thief, spec.points, to_the_end=spec.method.from_scratch)
            curve = [{"strength": 0.0, **watched.measure(network)}]

            def observe(strength: float, scrubbed: nn.Module) -> bool:
                curve.append({"strength": float(strength), **watched.measure(scrubbed)})
                return budget(strength, scrubbed)

            spec.method.scrub(network, thief, observe, seed)
            model.network = budget.best
            if is_rank_zero():
                if (
                    budget.strength == 0 or spec.method.prepare(network) is network
                ):  # only then does the configuration describe what is saved
                    text = yaml.safe_dump({"model": dict(model_config)}, sort_keys=False)
                    write_text_atomic(directory / "config.yaml", text)
                weights = io.BytesIO()
                torch.save({"state_dict": {name: value.cpu() for name, value in model.state_dict().items()}}, weights)
                make_directory((directory / MODEL).parent)
                write_bytes_atomic(directory / MODEL, weights.getvalue())
                result = {
                    "unit": spec.method.unit,
                    "points": spec.points,
                    "chosen": budget.strength,
                    "curve": curve,
                    "gains": spec.method.gains(budget.best, thief),
                    "sha256": file_sha256(directory / MODEL),
                }
                write_json_atomic(directory / RESULT, result)
        found: dict[str, Any] = read_json(directory / RESULT)
        return found


def detection_stage(
    directory: Path,
    spec: DetectionSpec,
    inputs: Mapping[str, str],
    load: Callable[[], Classifier],
    data: SplitDataModule,
    probe: Callable[[], Probe],
    seed: int,
    track: Track = untracked,
    key: WatermarkKey | None = None,
) -> dict[str, Any]:
    """Searches one model, or screens the watermark samples among the queries that it is asked.

    Args:
        directory: The stage's directory.
        spec: The search.
        inputs: Digests of what the result depends on.
        load: Loads the model, which is searched on the device that it lies on; called only if there is something to do.
        data: The data splits; the searcher sees the attacker's only.
        probe: Makes what holds the watermark samples among the queries; called only for a detector of inputs.
        seed: Seed of the search.
        track: Follows the stage.
        key: The model's mark, which a method that ranks keys is asked for; ``None`` where it is none, as of a patched model.

    Returns:
        What ``result.json`` holds: score, threshold, decision; for inputs auc, true_rate and false_rate; for models the classes' scores,
        those flagged, and from a method that ranks keys the rank of this one.
    """
    with Stage(directory, directory.name, inputs) as stage, track(stage):
        if not stage.done:
            network, thief = _network(load()), ThiefData.of(data, spec.share, seed=seed)
            if isinstance(spec.method, ModelDetector):
                finding = spec.method.inspect(network, thief, seed)
                result = _of_model(finding)
                if isinstance(finding, MixtureFinding) and key is not None:
                    result["key_rank"] = key_rank(finding, key)
                if finding.pictures is not None and is_rank_zero():
                    trigger_pictures(
                        finding.pictures, finding.classes, finding.flagged, data.class_names, data.mean, data.std,
                        directory / "figures" / TRIGGERS,
                    )  # fmt: skip
            else:
                result = _of_inputs(spec.method, network, thief, probe(), seed)
            if is_rank_zero():
                write_json_atomic(directory / RESULT, result)
        found: dict[str, Any] = read_json(directory / RESULT)
        return found


def _of_model(finding: Finding) -> dict[str, Any]:
    return {
        "score": _finite(finding.score),
        "threshold": _finite(finding.threshold),
        "decision": bool(finding.decision),
        "classes": [_finite(float(value)) for value in finding.classes],
        "flagged": [int(label) for label in finding.flagged],
    }


def key_rank(finding: MixtureFinding, key: WatermarkKey) -> float:
    """Says where a key's classes stand among all that a search has scored, 1 for the most suspicious.

    Of a method that cannot tell the order of the two sources, every score is there twice: pairs without an order are counted.
    """
    rank = finding.rank_of(key.source_classes, key.target_class)
    return (rank + 0.5) / 2 if torch.equal(finding.pairs, finding.pairs.transpose(0, 1)) else rank


def _of_inputs(
    detector: InputDetector, network: nn.Module, thief: ThiefData, probe: Probe, seed: int
) -> dict[str, Any]:
    """Screens watermark samples mixed with natural ones, in random order, since some detectors score queries together."""
    detector.fit(network, thief, seed)
    x = torch.cat([probe.trigger, probe.x])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    scores = torch.empty(len(x))
    scores[order] = detector.score(x[order]).float().cpu()
    marked, natural = scores[: len(probe.trigger)], scores[len(probe.trigger) :]
    true_rate = float((marked > detector.threshold).float().mean())
    return {
        "score": _finite(float(marked.mean())),
        "threshold": _finite(detector.threshold),
        "decision": true_rate > 0.5,
        "auc": roc_auc(marked, natural),
        "true_rate": true_rate,
        "false_rate": float((natural > detector.threshold).float().mean()),
    }


def _network(model: Classifier) -> nn.Module:
    if model.network is None:
        raise ValueError("The model has no network; load its weights first.")
    return model.network.eval()


def _finite(value: float) -> float:
    """Infinite scores (a deviation of 0) become the largest number, since JSON has no infinity."""
    return float(np.nan_to_num(value, nan=0.0, posinf=1e300, neginf=-1e300))
