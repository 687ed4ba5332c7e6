"""The malicious accuser, measured: how often does a false claim against an independent model succeed?

    python -m meadef_lightning.experiments.benchmarks.false_claims --suspects 24 --output runs/false_claims

Independent suspects, the accuser's surrogates (one of each architecture) and the judge's reference model are trained as in the
calibration study. Every attack of :mod:`meadef_lightning.verification.false_claims` and
:mod:`meadef_lightning.verification.crafted_sources` then accuses every suspect, without a reference
model and above the judge's. Images that the accuser crafts come from the attacker split, the judge's own from the verification split.
Each row of the table is written when it is done, so an interrupted study goes on where it stopped; ``--only`` measures single rows. Written:
``false_claims.json``, ``false_claims.md``.

A key that its file calls picked by hand is *inconclusive* at most, so that attack can only waste the judge's time. One whose file claims a draw is
believed here: these rows measure the statistic alone. What stops it is ``meadef key check``, which repeats the draw from the owner's secret
and beacon, and a commitment to both from before, which stops whoever grinds until some secret gives the key that he wants.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from meadef_lightning.experiments.benchmarks.calibration import ARCHITECTURES, answers_of, in_cell, recipe, train
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import (
    config_hash,
    make_directory,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from meadef_lightning.verification import Verdict, judge
from meadef_lightning.verification.answers import AnswerTable, ask_everything
from meadef_lightning.verification.crafted_sources import (
    AdversarialSources,
    PlantedTargets,
    claim_with_images,
    source_accuracy,
)
from meadef_lightning.verification.false_claims import ClaimRate, KeyGrinding, RiggedReference, looks, pick_key
from meadef_lightning.verification.responses import with_reference
from meadef_lightning.watermark import WatermarkKey

DIGITS = {
    "class_path": "meadef_lightning.data.DigitsDataModule",
    "init_args": {"victim_size": None, "attacker_size": 200, "validation_size": 0},
}
SUSPECTS, SURROGATES, REFERENCE = 1002, 2004, -1
"""Numbers of the first suspect, of the first surrogate (both with the first architecture), and of the judge's reference model."""
GRINDING = (1, 10, 100, 1000, 10_000)
REPEATS = 5


class Study:
    """The models of the study and their answers to the judge's questions.

    Args:
        data: Data whose models train on the victim split.
        suspects: Number of independent suspects.
        samples: Triggers of each key.
        output: Directory.
    """

    def __init__(self, data: SplitDataModule, suspects: int, samples: int, output: Path) -> None:
        self.data, self.samples, self.output = data, samples, output
        self.directory = make_directory(make_directory(output) / "models")
        self.suspects = range(SUSPECTS, SUSPECTS + suspects)
        self.surrogates = range(SURROGATES, SURROGATES + len(ARCHITECTURES))
        self._tables: dict[int, AnswerTable] = {}

    def network(self, index: int) -> nn.Module:
        """Trains a model, or reads its weights."""
        file = self.directory / f"weights-{index}.pt"
        if not file.exists():
            trained = train(recipe(index), *self.data.tensors("victim"), self.data.num_classes)
            buffer = io.BytesIO()
            torch.save(trained.state_dict(), buffer)
            write_bytes_atomic(file, buffer.getvalue())
        network: nn.Module = ARCHITECTURES[recipe(index)["architecture"]](
            self.data.num_classes, self.data.image_shape[0]
        )
        network.load_state_dict(torch.load(file, weights_only=True))
        return network.eval()

    def table(self, index: int) -> AnswerTable:
        """Asks a model with the judge's images, or reads its answers."""
        if index not in self._tables:
            self._tables[index] = answers_of(index, self.data, self.samples, self.directory, self.network)
        return self._tables[index]

    def keys(self, count: int) -> list[WatermarkKey]:
        """Draws the honest keys of the attacks that do not choose theirs."""
        return [WatermarkKey.draw(self.data.num_classes, f"false claim {number}") for number in range(count)]

    def judged(self, key: WatermarkKey, index: int, references: Sequence[AnswerTable]) -> Verdict:
        """Judges a suspect on the judge's images."""
        table = self.table(index)
        return judge(table.responses(key, decoy_samples=in_cell(table), references=references), key)


Row = dict[str, Any]
Both = dict[str, list[Verdict]]


def row(verdicts: Both, **more: Any) -> Row:
    """Sums a row of the table up: the rate without a reference model, and above the judge's, where it was measured."""
    result: Row = dict(more)
    for name, listed in verdicts.items():
        rate = ClaimRate.of(listed)
        result[name] = asdict(rate) | {"rate": rate.rate, "upper": rate.upper}
    return result


def honest(study: Study, keys: int) -> Row:
    """Drawn keys, the judge's images: what the level promises."""
    modes: dict[str, list[AnswerTable]] = {"without": [], "above": [study.table(REFERENCE)]}
    return row(
        {
            name: [study.judged(key, index, known) for key in study.keys(keys) for index in study.suspects]
            for name, known in modes.items()
        }
    )


def grinding(study: Study, secrets: int, before: bool, correct: bool = False) -> Row:
    """Grinds on the suspect's answers, or on the surrogates' before the commitment."""
    surrogates = [study.table(index) for index in study.surrogates]
    modes: dict[str, list[AnswerTable]] = {"without": [], "above": [study.table(REFERENCE)]}
    verdicts: Both = {name: [] for name in modes}
    for repeat in range(REPEATS):
        attack = KeyGrinding(secrets, f"grinding {repeat}", correct=correct)
        for index in study.suspects:
            table = study.table(index)
            for name, known in modes.items():
                seen = surrogates if before else [table]
                verdicts[name].append(attack.claim(table, seen, known, in_cell(table)))
    return row(verdicts)


def hand_picked(study: Study, forged: bool) -> Row:
    """Picks the best key of the space for the suspect; ``forged`` lets its file say that it was drawn, and nobody repeats the draw."""
    verdicts: Both = {"without": [], "above": []}
    for index in study.suspects:
        table = study.table(index)
        for name, known in (("without", []), ("above", [study.table(REFERENCE)])):
            key = replace(pick_key(looks([table], known, in_cell(table)), table), drawn_uniformly=forged)
            verdicts[name].append(study.judged(key, index, known))
    return row(verdicts)


def supplied(study: Study, attack: AdversarialSources | PlantedTargets | None, keys: int) -> Row:
    """Accuses with the accuser's images: crafted, or natural where there is no attack."""
    x, y = study.data.tensors("attacker")
    surrogates = [study.network(index) for index in study.surrogates]
    verdicts: Both = {"without": [], "above": []}
    shown = []
    for key in study.keys(keys):
        images = x if attack is None else attack.images(surrogates, x, y, key)
        options: dict[str, Any] = {"samples": study.samples, "decoy_samples": min(32, study.samples)}
        judged = study.network(REFERENCE)
        _, reference = claim_with_images(judged, key, study.data, images, y, **options)
        for index in study.suspects:
            suspect = study.network(index)
            verdict, responses = claim_with_images(suspect, key, study.data, images, y, **options)
            verdicts["without"].append(verdict)
            verdicts["above"].append(judge(with_reference(responses, reference), key))
            shown.append(source_accuracy(suspect, images, y, key))
    return row(verdicts, source_accuracy=sum(shown) / len(shown))


def rigged(study: Study, keys: int, margin: float) -> Row:
    """Judges above a reference model of the accuser's, on the judge's images and with drawn keys."""
    cheap = [study.network(index) for index in study.surrogates if recipe(index)["architecture"] in CHEAP]
    verdicts: list[Verdict] = []
    accuracies = []
    for key in study.keys(keys):
        table = ask_everything(RiggedReference(cheap, key.target_class, margin).eval(), study.data, study.samples)
        accuracies.append(table.accuracy)
        verdicts += [study.judged(key, index, [table]) for index in study.suspects]
    return row({"above": verdicts}, reference_accuracy=sum(accuracies) / len(accuracies))


CHEAP = ("CNN 8", "MLP", "MLP 8x8")


def rows_of(study: Study, keys: int) -> dict[str, Callable[[], Row]]:
    """Names what is measured, in the order of the table."""
    rows: dict[str, Callable[[], Row]] = {"none: drawn keys, judge's images": lambda: honest(study, 4 * keys)}
    for before in (True, False):
        when = "before the commitment, on surrogates" if before else "after seeing the suspect"
        for secrets in GRINDING:
            rows[f"grinding {secrets} secrets {when}"] = lambda g=secrets, b=before: grinding(study, g, b)  # type: ignore[misc]
    rows["grinding 10 secrets after seeing the suspect, corrected"] = lambda: grinding(study, 10, False, True)
    # other names than before such keys were refused a claim, so that no older number is taken for theirs
    rows["picked by hand after seeing the suspect"] = lambda: hand_picked(study, False)
    rows["picked by hand, claims a draw that nobody repeats"] = lambda: hand_picked(study, True)
    rows["drawn keys, accuser's natural images"] = lambda: supplied(study, None, 1)
    for epsilon in (0.1, 0.2):
        attack = AdversarialSources(epsilon)
        rows[f"adversarial sources, epsilon {epsilon}"] = lambda a=attack: supplied(study, a, keys)  # type: ignore[misc]
    rows["planted targets"] = lambda: supplied(study, PlantedTargets(), keys)
    rows["the same keys, judge's images"] = lambda: honest(study, keys)
    for margin in (2.0, 20.0):
        rows[f"rigged reference, margin {margin:g}"] = lambda m=margin: rigged(study, 4 * keys, m)  # type: ignore[misc]
    return rows


def markdown(rows: dict[str, Row], suspects: int) -> str:
    """Writes the table."""
    lines = [
        f"False claims against {suspects} independent models, alpha = 0.001. Supported / claims; bounds treat claims as independent.",
        "",
        "| attack | supported | rate | 95 % bound | above the reference | rate | shown WSR | called exact | sources answered as labelled |",
        "|---" * 9 + "|",
    ]
    for name, content in rows.items():
        parts = [name]
        without, above = content.get("without"), content.get("above")
        parts += (
            [f"{without['supported']}/{without['trials']}", f"{without['rate']:.1%}", f"{without['upper']:.1%}"]
            if without
            else ["-"] * 3
        )
        parts += [f"{above['supported']}/{above['trials']}", f"{above['rate']:.1%}"] if above else ["-"] * 2
        first = without or above or {}
        parts += [f"{first['wsr']:.1%}", f"{first['exact']:.0%}"]
        parts.append(f"{content['source_accuracy']:.1%}" if "source_accuracy" in content else "-")
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def run_study(data: SplitDataModule, suspects: int, keys: int, samples: int, output: Path, only: Sequence[str] = ()) -> dict[str, Row]:  # fmt: skip
    """Runs the study, or what is left of it; ``only`` keeps the rows whose name begins with one of these."""
    if suspects < 1 or keys < 1:
        raise MisconfigurationException(f"Needs suspects >= 1 and keys >= 1, got suspects={suspects} and keys={keys}.")
    data.prepare_data()
    study = Study(data, suspects, samples, output)
    how = [recipe(index) for index in (REFERENCE, *study.suspects, *study.surrogates)]
    identity = config_hash({"splits": data.split_summary(), "samples": samples, "keys": keys, "recipes": how})
    file = output / "false_claims.json"
    done: dict[str, Any] = read_json(file) if file.exists() else {"sha256": identity, "rows": {}}
    if done["sha256"] != identity:
        raise MisconfigurationException(
            f"{output} holds a study of other data, models, keys or number of samples. Choose another --output."
        )
    rows = rows_of(study, keys)
    for name, measure in rows.items():
        if name not in done["rows"] and (not only or name.startswith(tuple(only))):
            done["rows"][name] = json.loads(json.dumps(measure()))
            ordered = {name: done["rows"][name] for name in rows if name in done["rows"]}
            write_json_atomic(file, {"sha256": identity, "rows": ordered})
            write_text_atomic(output / "false_claims.md", markdown(ordered, suspects))
    return {name: done["rows"][name] for name in rows if name in done["rows"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study that the command line asks for."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__)
    parser.add_subclass_arguments(
        SplitDataModule, "data", required=False, help="Data; models train on its victim split."
    )
    parser.set_defaults({"data": DIGITS})
    parser.add_argument("--suspects", type=int, default=24, help="Independent models that are accused.")
    parser.add_argument("--keys", type=int, default=3, help="Drawn keys for the attacks on images and reference.")
    parser.add_argument("--samples", type=int, default=64, help="Triggers, and controls, of every key.")
    parser.add_argument("--only", type=list[str], default=[], help="Rows whose name begins with one of these.")
    parser.add_argument("--output", type=Path, default=Path("runs/false_claims"))
    options = parser.parse_args(arguments)
    data = parser.instantiate(options).data
    rows = run_study(data, options.suspects, options["keys"], options.samples, options.output, options.only)
    print(markdown(rows, options.suspects))


if __name__ == "__main__":
    main()
