"""A thief who fights back, for one seed: which models are scrubbed and searched, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from meadef_lightning.detection.base import ModelDetector, roc_auc
from meadef_lightning.experiment.render import ReportFigure
from meadef_lightning.experiment.robustness_stages import TRIGGERS, Probe, detection_stage, removal_stage
from meadef_lightning.experiment.rows import DetectionRow, PathPoint, RemovalRow
from meadef_lightning.experiment.seed_run import SeedRun, Suspect
from meadef_lightning.experiment.spec import DetectionSpec
from meadef_lightning.experiment.training import derived_seed
from meadef_lightning.experiment.weights import build_network
from meadef_lightning.protection.patch import PatchVictim
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.downstream import DownstreamClassifier, EncoderClassifier
from meadef_lightning.victims.encoder import Encoder

Finding = tuple[str, str, dict[str, Any]]
"""Name of a search, name of the model, and what ``detection_stage`` returned, with the mark's ``target`` class."""


class Robustness:
    """Removals and detections on the models of one seed.

    Args:
        run: The chain whose models are attacked.
        made: Its suspects by name, all of them trained.
    """

    def __init__(self, run: SeedRun, made: Mapping[str, Suspect]) -> None:
        self.run = run
        self.spec = run.spec
        self.models = dict(made)
        targets = [name for item in self.spec.removal for name in item.of]
        targets += [name for item in self.spec.detection for name in item.of]
        if "patched" in targets:
            self.models["patched"] = run.patched()
        self.clean = [name for name, suspect in made.items() if suspect.kind == "independent"]

    @cached_property
    def _key_probe(self) -> Probe:
        return Probe.of_key(self.run.key, self.run.data, self.spec.verification)

    @cached_property
    def _patch_probe(self) -> Probe:
        patched = self.run.load(self.models["patched"])
        if not isinstance(patched, PatchVictim):
            raise TypeError(f"The positive control is a {type(patched).__name__} and has no patch.")
        return Probe.of_patch(patched, self.run.data)

    def _probe(self, name: str) -> Probe:
        return self._patch_probe if name == "patched" else self._key_probe

    def _inputs(self, config: Any, share: float, target: str) -> dict[str, str]:
        hashed = self.run.experiment.hash_of
        settings = self.run.experiment.config("verification")
        return {
            **self.run.base,
            "config": hashed(config, share),
            "model": self.models[target].sha256,
            "probe": hashed(settings, self.run.key.commitment()),
        }

    # ---- removal

    def removals(self) -> list[tuple[str, int, str]]:
        """Returns the stage's name, the removal's position and the target of every removal, in order."""
        return [(f"{of}.{spec.name}", i, of) for i, spec in enumerate(self.spec.removal) for of in spec.of]

    def remove(self, name: str, index: int, of: str) -> tuple[RemovalRow, Suspect | None]:
        """Runs one removal; returns its path, and what is to be judged: nothing for the positive control."""
        spec, config = self.run.fresh().removal[index], self.run.experiment.config("removal")[index]
        target, directory = self.models[of], self.run.root / name
        model = yaml.safe_load((target.directory / "config.yaml").read_text())["model"]
        result = removal_stage(
            directory,
            spec,
            # not what it acts on besides: adding a target must not run the others again
            self._inputs(config["method"], spec.share, of) | {"points": self.run.experiment.hash_of(spec.points)},
            lambda: self._whole(target),
            self.run.data,
            lambda: self._probe(of),
            derived_seed(self.run.seed, name),
            model,
            self.run.track("remove"),
        )
        attack = type(spec.method).__name__
        curve = tuple(PathPoint(**point) for point in result["curve"])
        row = RemovalRow(name, of, attack, result["unit"], result["points"], result["chosen"], curve, result["gains"])
        if of == "patched":
            return row, None
        suspect = replace(
            target,
            name=name,
            kind="removed",
            attack=attack,
            directory=directory,
            sha256=result["sha256"],
            # within his budget nothing may have been left but the model as it was
            build=lambda: self._scrubbed(target, index, result["chosen"] > 0),
        )
        return row, suspect

    def _whole(self, target: Suspect) -> Classifier:
        """Loads a classifier whose every weight may be attacked, an encoder's below a probe, too."""
        model = self.run.load(target)
        network = model.ready_network()
        if isinstance(network, EncoderClassifier):
            network.freeze = False
            network.requires_grad_(True)
        return model

    def _scrubbed(self, target: Suspect, index: int, changed: bool) -> Classifier:
        built, data = target.build(), self.run.data
        build_network(built, data)
        model = DownstreamClassifier(built, freeze=False) if isinstance(built, Encoder) else built
        build_network(model, data)
        if changed:
            model.network = self.run.fresh().removal[index].method.prepare(model.ready_network())
        return model

    # ---- detection

    def searches(self) -> list[tuple[str, int, str]]:
        """Returns the stage's name, the detector's position and the model of every search.

        Detectors of models search the clean ones, too: without them, no score says anything. Detectors of inputs have natural images for
        controls, and see the key's samples at a clean model where it is named.
        """
        todo = []
        for i, spec in enumerate(self.spec.detection):
            controls = self.clean if isinstance(spec.method, ModelDetector) else []
            todo += [(f"search-{spec.name}-{of}", i, of) for of in [*spec.of, *controls]]
        return todo

    def search(self, name: str, index: int, of: str) -> Finding:
        """Runs one search."""
        spec: DetectionSpec = self.run.fresh().detection[index]
        config = self.run.experiment.config("detection")[index]
        result = detection_stage(
            self.run.root / name,
            spec,
            self._inputs(config["method"], spec.share, of),
            lambda: self.run.load(self.models[of]),
            self.run.data,
            lambda: self._probe(of),
            derived_seed(self.run.seed, name),
            self.run.track("detect"),
            None if of == "patched" else self.run.key,
        )
        # not the stage's to keep: finished searches know what they flagged, and need not be run again
        return spec.name, of, {**result, "target": self._target(of)}

    def _target(self, of: str) -> int:
        """Returns the class that a model's mark asks for; of a clean one the key's, which it knows nothing of."""
        patched = self.spec.patched.model
        return patched.target_class if of == "patched" and patched is not None else self.run.key.target_class

    def trigger_figures(self) -> Iterator[ReportFigure]:
        """Yields the pictures of inverted triggers."""
        for name, index, of in self.searches():
            path = self.run.root / name / "figures" / TRIGGERS
            if path.exists():
                attack = self.spec.detection[index].name
                yield ReportFigure(
                    path,
                    f"{attack} on {of}: inverted triggers and their scores",
                    f"A picture for every class: the trigger that {attack} inverted, and its score; flagged classes are marked.",
                )


def detection_rows(findings: list[Finding], clean: list[str]) -> list[DetectionRow]:
    """Joins what was found over all seeds, and compares marked models with clean ones.

    Args:
        findings: All searches.
        clean: Names of the models that are negative controls.

    Returns:
        One row for every detector and attacked model, and for every clean one whose inputs were screened; rates and AUC are over seeds
        (models), or means over seeds (inputs).
    """
    rows = []
    for attack, target in dict.fromkeys((attack, target) for attack, target, _ in findings):
        mine = [found for a, t, found in findings if (a, t) == (attack, target)]
        level = "inputs" if "auc" in mine[0] else "model"
        if level == "model" and target in clean:
            continue
        flagged = float(np.mean([found["decision"] for found in mine]))
        named, ranks = None, [found.get("key_rank") for found in mine]
        if level == "inputs":
            auc, true_rate, false_rate = (
                float(np.mean([found[name] for found in mine])) for name in ("auc", "true_rate", "false_rate")
            )
        else:
            controls = [found for a, t, found in findings if a == attack and t in clean]
            auc = roc_auc([found["score"] for found in mine], [found["score"] for found in controls])
            true_rate, false_rate = flagged, float(np.mean([found["decision"] for found in controls]))
            named = float(np.mean([found["target"] in found["flagged"] for found in mine]))
        rows.append(
            DetectionRow(
                attack=attack,
                target=target,
                level=level,  # type: ignore[arg-type]
                score=float(np.median([found["score"] for found in mine])),
                threshold=float(np.median([found["threshold"] for found in mine])),
                decision=flagged > 0.5,
                auc=auc,
                true_rate=true_rate,
                false_rate=false_rate,
                named_target=named,
                # a median of those seeds that have one would be of other seeds than the rest of the row
                key_rank=None if None in ranks else float(np.median(ranks)),  # type: ignore[arg-type]
            )
        )
    return rows
