"""The attack on our own recipe: who looks at which way natural answers lean finds the key's classes. What can he do with that?

    python -m meadef_lightning.experiments.benchmarks.answer_lean runs/fashion_mnist/supervised runs/pareto

For every finished ``meadef run`` in or below the directories: the answer lean of its victim, of every model stolen from it and of its clean
models (:mod:`meadef_lightning.detection.answer_lean`), and where the key's classes stand among all. With ``--epochs`` above 0 the victim is
then distilled anew from the thief's images, plainly and from balanced answers (:mod:`meadef_lightning.removal.balanced_distillation`): a
minute each on a core. Printed: two tables. Runs of classifiers only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from meadef_lightning.data.thief import ThiefData
from meadef_lightning.detection import AnswerLean, roc_auc
from meadef_lightning.experiment.load import load_experiment
from meadef_lightning.experiment.robustness_stages import Probe
from meadef_lightning.experiment.seed_run import SeedRun, Suspect
from meadef_lightning.removal import BalancedDistillation, DistilAgain, Removal


@dataclass(frozen=True, eq=False)
class Case:
    """A finished run, and the models in it.

    Args:
        name: Its directory.
        run: The chain.
        suspects: Its models that were trained.
        thief: The thief's images, all of them labelled.
    """

    name: str
    run: SeedRun
    suspects: tuple[Suspect, ...]
    thief: ThiefData

    def network(self, suspect: Suspect) -> nn.Module:
        """Loads a model of the run."""
        return self.run.load(suspect).ready_network().eval()


def cases(directories: Sequence[Path]) -> Iterator[Case]:
    """Opens finished runs of one seed.

    Raises:
        MisconfigurationException: If there is none.
    """
    files = sorted({file.parent for directory in directories for file in directory.rglob("report.json")})
    if not files:
        raise MisconfigurationException(
            f"There is no report.json below {', '.join(map(str, directories))}. Name finished runs."
        )
    for root in files:
        experiment = load_experiment([root / "config.yaml"])
        if len(experiment.seeds) == 1:
            run = SeedRun(experiment, root, experiment.seeds[0])
            # every stage is finished, so nothing is trained
            yield Case(str(root), run, tuple(make() for _, make in run.suspects()), ThiefData.of(run.data, 1.0))


def lean_rows(case: Case) -> list[dict[str, Any]]:
    """Measures the answer lean of every model of a run."""
    key, rows = case.run.key, []
    for suspect in case.suspects:
        finding = AnswerLean().inspect(case.network(suspect), case.thief)
        # both orders of the sources lean alike
        rank = (finding.rank_of(key.source_classes, key.target_class) + 0.5) / 2
        kind = "clean" if suspect.kind == "independent" else suspect.name
        rows.append({"model": kind, "score": finding.score, "rank": rank})
    return rows


def lean_table(rows: Sequence[dict[str, Any]], classes: int) -> str:
    """Sums up what was measured: each kind of model against the clean ones."""
    clean = [row["score"] for row in rows if row["model"] == "clean"]
    triples = classes * (classes - 1) * (classes - 2) // 2
    lines = [
        f"Clean: {len(clean)} models, largest joint lean {max(clean):.3f} at most. Rank: of the key's classes among {triples} triples.",
        "",
        "| model | models | largest joint lean | AUC against clean | key's classes first | median rank |",
        "|---" * 6 + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows if row["model"] != "clean"):
        mine = [row for row in rows if row["model"] == model]
        scores, ranks = [row["score"] for row in mine], sorted(row["rank"] for row in mine)
        lines.append(
            f"| {model} | {len(mine)} | {min(scores):.3f} to {max(scores):.3f} | {roc_auc(scores, clean):.2f} | "
            f"{sum(rank < 1.5 for rank in ranks)}/{len(mine)} | {ranks[len(ranks) // 2]:g} |"
        )
    return "\n".join(lines) + "\n"


def distilled(case: Case, epochs: int) -> str:
    """Distils a run's victim, plainly and from balanced answers, and measures accuracy and watermark; one row of a table."""
    probe = Probe.of_key(case.run.key, case.run.data, case.run.spec.verification)
    victim = case.network(case.suspects[0])
    cells = [Path(case.name).name]
    thefts: list[Removal] = [
        DistilAgain(epochs=epochs),
        BalancedDistillation("answered", epochs=epochs),
        BalancedDistillation("true", epochs=epochs),
    ]
    for theft in thefts:
        end: list[nn.Module] = []

        def last(strength: float, model: nn.Module, end: list[nn.Module] = end) -> bool:
            if strength == epochs:
                end.append(model)
            return True

        theft.scrub(victim, case.thief, last, case.run.seed)
        found = probe.measure(end[0])
        cells.append(f"{100 * found['accuracy']:.1f}, {100 * found['wsr']:.1f} / {100 * found['wfpr']:.1f}")
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="Directories of finished runs, or above them.")
    parser.add_argument("--epochs", type=int, default=0, help="Epochs of the distillations; 0 leaves them out.")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    lines = [
        "| run | distilled: accuracy, WSR / WFPR | balanced by answers | balanced by true labels |",
        "|---" * 4 + "|",
    ]
    classes = 0
    for case in cases(options.runs):
        classes = case.run.key.num_classes
        rows += lean_rows(case)
        if options.epochs:
            lines.append(distilled(case, options.epochs))
    print(lean_table(rows, classes))
    if options.epochs:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
