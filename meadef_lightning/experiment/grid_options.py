"""The command line of ``meadef grid``, apart from what it does: ``--help`` and a mistyped option need not load torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line of ``meadef grid``.

    Args:
        arguments: What follows ``grid`` on it.

    Returns:
        ``grid``, ``dry_run``, ``merge``, ``output``, ``only``, and ``run_options``: what every ``meadef run`` gets.

    Raises:
        SystemExit: With 0 after ``--help``, with 2 for what it does not know.
    """
    parser = argparse.ArgumentParser(
        prog="meadef grid",
        usage="%(prog)s GRID.yaml [--dry-run | --merge] [--output DIR] [--only CELL ...] [--wandb] [-- OPTIONS OF meadef run]",
        description="Runs every cell of a grid, or what is left of it: one `meadef run` each. Cells that are done are skipped, interrupted "
        "ones resumed; one that fails is reported, and the others go on. At the end results are merged into grid.csv, grid.md and "
        "grid.png. What follows `--` is handed to every `meadef run`, and overrides what the cells say, e.g. `-- --trainer.accelerator gpu "
        "--trainer.precision bf16-mixed`.",
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="The grid, e.g. experiments/digits/grid.yaml.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="Train nothing: check all cells, write their cell.yaml and commands.txt, list them with an estimate of their cost.",
    )
    mode.add_argument("--merge", action="store_true", help="Train nothing: merge the cells that are done.")
    parser.add_argument("--output", type=Path, help="Directory of the results (default: runs/GRID).")
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="CELL",
        help="Only these cells: names, patterns ('cifar10-*') or numbers as in the list.",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="Log every cell to Weights & Biases, too; see `meadef run --help`."
    )
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    options.run_options = ["--wandb"] * options.wandb + arguments[cut + 1 :]
    return options
