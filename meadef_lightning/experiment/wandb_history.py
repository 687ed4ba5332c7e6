"""The rows of a W&B run that several attempts at a training write together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from meadef_lightning.experiment.metrics_log import row_identity

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

STEP = "trainer/global_step"


class History:
    """The rows of one run, numbered through all attempts; those that the run has already are not sent.

    Args:
        run: The run; its ``step`` is the number of rows that it has.
        earlier: Rows of metrics that earlier attempts wrote to their CSV files.
    """

    def __init__(self, run: Run, earlier: Iterable[Mapping[str, str]] = ()) -> None:
        self.run, self.rows, self.arrived = run, 0, run.step
        self.seen: set[Any] = set()
        for row in earlier:
            self.metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))

    def metrics(self, values: Mapping[str, float], step: int | None) -> None:
        """Logs the metrics of a training step, unless an earlier attempt did."""
        identity = row_identity({**values, "step": step or 0})
        if identity not in self.seen:
            self.seen.add(identity)
            self.log({**values, STEP: step or 0})

    def log(self, values: Mapping[str, Any]) -> None:
        """Logs the next row."""
        if self.rows >= self.arrived:
            self.run.log(dict(values), step=self.rows)
        self.rows += 1


class StageLogger(WandbLogger):
    """Lightning's logger on a run that is already there; what an earlier attempt logged is not logged again.

    Args:
        run: The run.
        history: Its rows.
    """

    def __init__(self, run: Run, history: History) -> None:
        super().__init__(experiment=run, project=run.project)
        self._history = history

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs metrics of a step."""
        self._history.metrics(metrics, step)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # type: ignore[override, unused-ignore]
        """Logs nothing: the run has the whole configuration."""
