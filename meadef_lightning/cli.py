"""``meadef``: the commands. Heavy imports wait until a command needs them, so that ``meadef --help`` is quick."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from meadef_lightning.__about__ import __version__

_HELP = f"""meadef {__version__}: prove that a neural network was stolen through its API

usage: meadef COMMAND [arguments]; "meadef COMMAND --help" explains each

the whole story
  demo       run the embedded experiment on handwritten digits: watermark, steal, judge (minutes, no download)
  run        run an experiment YAML, or what is left of it: meadef run experiments/fashion_mnist/supervised.yaml
  verify     judge one suspect model with a watermark key
  grid       run every cell of a grid of experiments, list them with their cost, merge their results
             (all four log to Weights & Biases, too, with --wandb: offline unless WANDB_MODE=online)
  key        draw a key from a secret, show what is public of it, commit to it before training
  evidence   bundle a verdict for a judge, and check such a bundle offline or with other images
  serve      put a model behind HTTP, with API keys, budgets and a policy; HTTPOracle(URL) asks it

single trainings (LightningCLI)
  fit        train any LightningModule; add the watermark with -c experiments/overlays/watermark.yaml
  validate   run its validation
  test       run its test
  predict    run its prediction

set MEADEF_DEBUG=1 for full tracebacks
"""


def _lightning(arguments: list[str]) -> None:
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    import meadef_lightning.data
    import meadef_lightning.extraction
    import meadef_lightning.victims
    import meadef_lightning.watermark  # noqa: F401  so that bare class names resolve
    from meadef_lightning.experiment.messages import LightningParser
    from meadef_lightning.experiment.save_config import RunConfig

    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunConfig,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_class=LightningParser,
        args=arguments,
    )


def _run(arguments: list[str], files: Sequence[str] = (), program: str = "meadef run") -> None:
    from meadef_lightning.experiment.checks import check_files
    from meadef_lightning.experiment.load import Experiment, experiment_parser
    from meadef_lightning.experiment.tracking import Tracking, default_output

    parser = experiment_parser(
        prog=program,
        usage=f"{program} {'' if files else 'EXPERIMENT.yaml [MORE.yaml ...] '}[--output DIR] [--OPTION VALUE ...]",
        description="Runs an experiment: trains the victim and its clean twin, steals it, trains independent models, judges all of "
        "them, writes report.json, report.html and summary.csv. Finished stages are skipped, interrupted ones resumed. Later "
        "files and options override earlier ones, e.g. --victim.trainer.max_epochs 5 --seeds [0,1,2]. --trainer.OPTION is for the Trainer "
        f"of every stage: {program} … --trainer.accelerator gpu --trainer.devices 2 --trainer.strategy ddp. Or let torchrun start the "
        f"processes, and all are used: torchrun --nproc-per-node 2 -m meadef_lightning {program.split()[-1]} …; on two machines, which "
        "must share the output directory, on each: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "
        f"FIRST_HOST:29500 -m meadef_lightning {program.split()[-1]} …. batch_size is that of one process; rank zero writes the results.",
    )
    parser.add_argument("--output", type=str, help="Directory of the results (default: runs/EXPERIMENT).")
    Tracking.add_arguments(parser)
    rest = list(arguments)
    chosen = [str(file) for file in files]
    while rest and not rest[0].startswith("-"):
        chosen.append(rest.pop(0))
    given = {part.partition("=")[0] for part in rest}
    if not chosen and not {"-h", "--help", "--config"} & given:
        raise ValueError(
            "Give an experiment file, before all options, e.g. meadef run experiments/digits/supervised.yaml --output results"
        )
    check_files(chosen, whole=bool({"-h", "--help", "--config", "--experiment"} & given))
    config = parser.parse_args([part for file in chosen for part in ("--config", file)] + rest)
    output = Path(config.pop("output") or default_output(config.experiment))
    tracking = Tracking.pop(config)

    from rich.console import Console

    from meadef_lightning.experiment.artifacts import is_rank_zero
    from meadef_lightning.experiment.pipeline import run
    from meadef_lightning.experiment.render import detection_table, summary_table

    report = run(Experiment(parser, config), output, shlex.join([*program.split(), *arguments]), tracking)
    if is_rank_zero():
        # rich takes 80 columns for granted where there is no terminal, too few for the table
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(summary_table(report))
        if report.detection:
            console.print(detection_table(report))
        console.print(
            f"Report: {output / 'report.html'}, {output / 'report.json'}, {output / 'summary.csv'}", soft_wrap=True
        )


def _demo(arguments: list[str]) -> None:
    from importlib.resources import as_file, files

    with as_file(files("meadef_lightning.experiments") / "digits" / "supervised.yaml") as file:
        _run(arguments, [str(file)], "meadef demo")


def _verify(arguments: list[str]) -> None:
    from meadef_lightning.experiment.artifacts import make_directory
    from meadef_lightning.experiment.bundles import record_command
    from meadef_lightning.experiment.judge import judge_suspect, verify_parser
    from meadef_lightning.experiment.lock import locked

    options = verify_parser(prog="meadef verify").parse_args(arguments)
    output = make_directory(options.output)
    with locked(output):
        record_command(output, "meadef verify", arguments)
        judge_suspect(options)


def _grid(arguments: list[str]) -> None:
    from meadef_lightning.experiment.grid_options import parse

    options = parse(arguments)
    from meadef_lightning.experiment.grid_run import grid_command

    grid_command(options)


def _key(arguments: list[str]) -> None:
    from meadef_lightning.experiment.keys import key_command

    key_command(arguments)


def _evidence(arguments: list[str]) -> None:
    from meadef_lightning.experiment.bundles import evidence_command

    evidence_command(arguments)


def _serve(arguments: list[str]) -> None:
    from meadef_lightning.experiment.serve import serve, serve_parser

    serve(serve_parser(prog="meadef serve").parse_args(arguments))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "run": _run,
    "grid": _grid,
    "verify": _verify,
    "key": _key,
    "evidence": _evidence,
    "serve": _serve,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: What follows ``meadef`` on the command line; the process's own by default.

    Raises:
        SystemExit: With 1 and a message after a user's error, 2 for an unknown command, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        sys.stdout.write(_HELP)
        return
    if command == "--version":
        sys.stdout.write(f"meadef {__version__}\n")
        return
    if command in ("fit", "validate", "test", "predict"):
        handler: Callable[[list[str]], None] = _lightning
        passed = arguments
    elif command in _COMMANDS:
        handler, passed = _COMMANDS[command], arguments[1:]
    else:
        sys.exit(
            f"meadef: there is no command {command!r}; it is one of {', '.join([*_COMMANDS, 'fit', 'validate', 'test', 'predict'])}."
        )
    try:
        handler(passed)
    except KeyboardInterrupt:
        _interrupted(command)
    except SystemExit as stop:
        # what Lightning makes of Ctrl-C during a training
        if isinstance(stop.__context__, KeyboardInterrupt):
            _interrupted(command)
        # and of SIGTERM, with which the program would end as if all were done
        if type(stop).__name__ == "SIGTERMException":
            _interrupted(command, 143)
        raise
    except Exception as error:
        _explain(command, error)
        raise


def _interrupted(command: str, status: int = 130) -> NoReturn:
    """Ends the program after Ctrl-C or SIGTERM."""
    kept = "; the same command goes on from here" if command in ("demo", "run", "grid", "verify") else ""
    sys.stderr.write(f"\nmeadef {command}: interrupted{kept}.\n")
    sys.exit(status)


def _explain(command: str, error: Exception) -> None:
    """Ends the program with a message if it is all that a user needs of an error, and does nothing for others."""
    # not before there is an error, so that no command imports more than it needs
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from meadef_lightning.oracle import BudgetExceededError, LedgerError
    from meadef_lightning.processes import ProcessFailedError

    ours = (MisconfigurationException, BudgetExceededError, LedgerError, ProcessFailedError, ValueError, OSError)
    if isinstance(error, ours) and not os.environ.get("MEADEF_DEBUG"):
        rank = getattr(rank_zero_only, "rank", 0)
        from meadef_lightning.experiment.messages import readable

        text = str(error)
        if isinstance(error, OSError) and error.strerror and text.startswith("[Errno"):
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        sys.exit(f"meadef {command}{f' (process {rank})' if rank else ''}: {readable(text)}")


if __name__ == "__main__":
    main()
