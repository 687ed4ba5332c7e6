"""Weights & Biases: one run for every stage, and one for the report.

A stage's run is grouped by experiment, has the stage's kind as job type and its name as name, and holds the whole configuration
(without the key), the metrics of the training, the stage's numbers as summary, its figures, and as artifacts the evidence and the
weights. ``wandb.json`` in a stage's directory keeps the run's id: a stage that was interrupted goes on in the same run, one that
finished without W&B is told afterwards, one that was told is left alone.

A row's number is its place in the whole history, which the CSV files of all attempts keep. When a stage goes on, rows that the run
lacks are told again: online those that never arrived; offline all of them, because W&B's file of a killed process may have lost any,
so that the new file replaces that of the attempt before. Nothing is lost or doubled in either case.

The run knows neither command line, nor terminal output, nor environment: they may hold secrets.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import wandb
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from meadef_lightning.experiment.artifacts import file_sha256, read_json, write_json_atomic, write_text_atomic
from meadef_lightning.experiment.headlines import report_summary, stage_summary, verdict_summary
from meadef_lightning.experiment.metrics_log import logged_rows
from meadef_lightning.experiment.render import ReportFigure, package_versions
from meadef_lightning.experiment.report import Report
from meadef_lightning.experiment.stage_directory import WANDB_FILE, Stage
from meadef_lightning.experiment.stages import RESULT
from meadef_lightning.experiment.tracking import SWEEP_VARIABLES, StageKind, Track, Tracker, public
from meadef_lightning.experiment.wandb_history import STEP, History, StageLogger
from meadef_lightning.experiment.weights import MODEL
from meadef_lightning.verification import Verdict
from meadef_lightning.watermark import WatermarkKey

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

PROJECT = "meadef"
KEY_PICTURES = {"samples", "features"}
"""Figures that name the key's classes."""


@dataclass(frozen=True)
class RunRecord:
    """Content of ``wandb.json``.

    Args:
        id: The W&B run's id.
        told: SHA-256 of the result that was told in full; empty if none was.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    told: str = ""

    @classmethod
    def load(cls, directory: Path) -> RunRecord | None:
        """Reads a directory's record; None where there is none or it is damaged, which costs a new run and nothing else."""
        try:
            values = read_json(directory / WANDB_FILE)
            record = cls(str(values["id"]), str(values["told"]))
            return record if record.id.isalnum() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, directory: Path) -> None:
        """Writes the record."""
        write_json_atomic(directory / WANDB_FILE, asdict(self))


class WandbTracker(Tracker):
    """Tells Weights & Biases what an experiment does.

    Args:
        output: Directory of the results.
        experiment: Name of the experiment.
        config: Its configuration, without secrets.
        many: Whether there are several seeds, to be named apart.
        checkpoints: Whether weights become artifacts.
        samples: Whether pictures that name the key's classes are logged.

    Raises:
        MisconfigurationException: When a run starts, if W&B refuses it or another run is under way in this process.
    """

    def __init__(
        self, output: Path, experiment: str, config: Mapping[str, Any], many: bool, checkpoints: bool, samples: bool
    ) -> None:
        self.output, self.experiment, self.config, self.many = output, experiment, dict(config), many
        self.checkpoints, self.samples = checkpoints, samples
        # a sweep waits for one run, the report's; the stages must not take its place
        self._agent = {name: os.environ.pop(name) for name in SWEEP_VARIABLES if name in os.environ}
        # a sweep's experiments have the same name
        self.group = "/".join([experiment, *filter(None, [self._agent.get("WANDB_RUN_ID")])])
        self.mode = os.environ.get("WANDB_MODE") or ("online" if self._agent else "offline")

    # ---- what is told

    @override
    def stage(self, kind: StageKind, seed: int, key: WatermarkKey) -> Track:
        """Returns what follows a stage in a run of its own."""

        @contextmanager
        def track(stage: Stage) -> Iterator[Sequence[Logger]]:
            directory, name = stage.directory, stage.record.name
            record = RunRecord.load(directory) if stage.done or stage.resumed else None
            if record is not None and record.told and record.told == _digest(directory / RESULT):
                yield ()
                return
            record = record or RunRecord()
            record.save(directory)
            label = f"{name}/seed-{seed}" if self.many else name
            with self._run(record.id, label, kind, {"stage": {"name": name, "kind": kind, "seed": seed}}, key) as run:
                history = History(run, logged_rows(directory / "logs"))
                yield (StageLogger(run, history),)
                self._tell_stage(run, history, directory, label)
            replace(record, told=_digest(directory / RESULT)).save(directory)

        return track

    def _tell_stage(self, run: Run, history: History, directory: Path, label: str) -> None:
        result = read_json(directory / RESULT)
        run.summary.update(stage_summary(result))
        for point in result.get("curve", ()):
            history.log({f"removal/{name}": value for name, value in point.items()})
        self._tell_pictures(history, {path.stem: [(path, label)] for path in sorted(directory.glob("figures/*.png"))})
        self._tell_evidence(run, directory, label)
        if self.checkpoints and (directory / MODEL).exists():
            artifact = wandb.Artifact(
                self._artifact(label, "model"), "model", metadata={"sha256": result.get("sha256")}
            )
            # weights are written once and can be large: no copy of them
            artifact.add_file(str((directory / MODEL).absolute()), MODEL.as_posix(), policy="immutable")
            if (directory / "config.yaml").exists():
                told = yaml.safe_dump(public(yaml.safe_load((directory / "config.yaml").read_text())), sort_keys=False)
                with TemporaryDirectory() as staging:
                    artifact.add_file(str(write_text_atomic(Path(staging) / "config.yaml", told)))
            run.log_artifact(artifact)

    @override
    def report(self, report: Report, figures: Sequence[ReportFigure], directory: Path, key: WatermarkKey) -> None:
        """Tells the report in a run of its own: tables, figures, headline numbers; again only if it changed."""
        record = RunRecord.load(directory) or RunRecord()
        told = _digest(directory / "report.json")
        if record.told == told:
            return
        record.save(directory)
        with self._run(
            record.id, "report", "report", {"stage": {"name": "report", "kind": "report"}}, key, self._agent
        ) as run:
            history = History(run)
            run.summary.update(report_summary(report))
            tables = {
                "suspects": [_suspect(asdict(row)) for row in report.suspects],
                "detection": [asdict(row) for row in report.detection],
                "removal": [
                    {name: value for name, value in asdict(row).items() if name != "curve"} | asdict(point)
                    for row in report.removal
                    for point in row.curve
                ],
            }
            history.log({name: _table(rows) for name, rows in tables.items() if rows})
            pictures: dict[str, list[tuple[Path, str]]] = {}
            for figure in figures:
                pictures.setdefault(Path(figure.path).stem, []).append((Path(figure.path), figure.title))
            self._tell_pictures(history, pictures)
            artifact = wandb.Artifact(self._artifact("report", "files"), "report")
            for name in ("report.json", "summary.csv"):
                artifact.add_file(str(directory / name))
            run.log_artifact(artifact)
            url = None if run.offline else run.url
        replace(record, told=told).save(directory)
        where = url or f"offline in {self.output / 'wandb'}; `wandb sync {self.output / 'wandb'}/offline-run-*` uploads"
        rank_zero_info(f"Weights & Biases: {where}")

    @override
    def verdict(self, suspect: str, verdict: Verdict, directory: Path, key: WatermarkKey) -> None:
        """Tells a single verdict in a new run."""
        with self._run(RunRecord().id, suspect, "verify", {"stage": {"name": suspect, "kind": "verify"}}, key) as run:
            history = History(run)
            numbers = verdict_summary(verdict.to_dict())
            run.summary.update(numbers)
            history.log({"suspects": _table([{"name": suspect, **numbers}])})
            self._tell_pictures(
                history, {path.stem: [(path, suspect)] for path in sorted(directory.glob("figures/*.png"))}
            )
            self._tell_evidence(run, directory, suspect)

    # ---- how it is told

    @contextmanager
    def _run(
        self,
        run_id: str,
        name: str,
        kind: str,
        about: Mapping[str, Any],
        key: WatermarkKey,
        agent: Mapping[str, str] | None = None,
    ) -> Iterator[Run]:
        if wandb.run is not None:
            raise MisconfigurationException(
                f"The W&B run {wandb.run.id} is under way in this process, and every stage needs one of its own. Call wandb.finish() first."
            )
        config = {**self.config, **about, "versions": package_versions()}
        config["key"] = {"commitment": key.commitment(), "drawn_uniformly": key.drawn_uniformly}
        self.output.mkdir(parents=True, exist_ok=True)
        # tables and evidence are staged beside the results, not in the home directory: what is to be uploaded stays together
        staging = (
            {}
            if os.environ.get("WANDB_DATA_DIR")
            else {"WANDB_DATA_DIR": str((self.output / "wandb" / "data").absolute())}
        )
        if agent:
            wandb.teardown()  # so that W&B reads the agent's variables, which it has not seen yet
        with _environment({**staging, **(agent or {})}):
            settings = wandb.Settings(
                console="off", silent=True, save_code=False, x_disable_meta=True,
                x_save_requirements=kind == "report",  # a list of all packages takes longer than all the rest of a start
            )  # fmt: skip
            for superseded in (self.output / "wandb").glob(f"offline-run-*-{run_id}"):
                shutil.rmtree(superseded)
            try:
                run = wandb.init(
                    # an agent has chosen both
                    id=None if agent else run_id,
                    project=None if agent else os.environ.get("WANDB_PROJECT", PROJECT),
                    dir=str(self.output),
                    group=self.group,
                    job_type=kind,
                    name=name,
                    config=config,
                    mode=cast("Any", self.mode),
                    resume="allow",
                    settings=settings,
                )
            except wandb.Error as error:
                raise MisconfigurationException(
                    f"W&B refuses the run {name!r} ({error}). Log in with `wandb login`, or set WANDB_MODE=offline and upload later."
                ) from error
            axis = {"train": STEP, "extract": STEP, "remove": "removal/strength"}.get(kind)
            if axis:
                run.define_metric(axis)
                run.define_metric("*" if axis == STEP else "removal/*", step_metric=axis)
            try:
                yield run
            except BaseException:
                run.finish(exit_code=1)
                raise
            run.finish()
        if agent:
            wandb.teardown()  # and forgets them: what comes next is no run of the agent's

    def _artifact(self, label: str, what: str) -> str:
        return re.sub(r"[^\w.-]", "-", f"{self.experiment}-{label}-{what}")[-128:]

    def _tell_evidence(self, run: Run, directory: Path, label: str) -> None:
        if (directory / "evidence.json").exists():
            artifact = wandb.Artifact(self._artifact(label, "evidence"), "evidence")
            artifact.add_file(str(directory / "evidence.json"))
            run.log_artifact(artifact)

    def _tell_pictures(self, history: History, pictures: Mapping[str, Sequence[tuple[Path, str]]]) -> None:
        shown = {
            f"figures/{name}": [wandb.Image(str(path), caption=caption) for path, caption in found]
            for name, found in pictures.items()
            if self.samples or name not in KEY_PICTURES
        }
        if shown:
            history.log(shown)


def _suspect(row: dict[str, Any]) -> dict[str, Any]:
    row["wsr_low"], row["wsr_high"] = row.pop("wsr_ci")
    return row


def _table(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


def _digest(path: Path) -> str:
    return file_sha256(path) if path.exists() else ""


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
