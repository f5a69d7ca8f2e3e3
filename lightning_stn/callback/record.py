"""What a run records: loggers, `schedule.json`, and the schedule in memory."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from lightning_stn.callback.hyperparameter_phase import HyperparameterPhase, HyperparameterStep
from lightning_stn.callback.logged_steps import LoggedSteps
from lightning_stn.callback.schedule_file import ScheduleFile
from lightning_stn.callback.tensorboard import (
    ENTROPY,
    HYPERGRADIENT,
    PREFIX,
    SCALE,
    SKIPPED,
    TRAIN_LOSS,
    VALID_LOSS,
    layout,
    summarise,
)
from lightning_stn.decimals import shortest
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.schedule import Row
from lightning_stn.schedule.handover import Handover

MOST_ROWS, MOST_CELLS = 4096, 2**19
"""Rows and cells beyond which a schedule is thinned: every second row is removed, and from then on not recorded."""

FEWEST_ROWS = 256
"""Rows that a schedule may have whatever the number of its cells."""


class Mean:
    """Running mean of tensors, kept on their device so that no step waits for it."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def update(self, value: Tensor) -> None:
        """Take in one more value."""
        value = value.detach().float()
        self._total = value.clone() if self._total is None else self._total + value
        self._count += 1

    def pop(self) -> Tensor | None:
        """The mean since the last call, or None if there was no value."""
        mean = None if self._total is None else self._total / self._count
        self._total, self._count = None, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Sum and count since the last record."""
        return {"total": None if self._total is None else self._total.cpu(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a saved state, on the device of the values to come."""
        total, self._count = state["total"], state["count"]
        self._total = None if total is None else total.to(device)


class Recorder:
    """Writes the state of the hyperparameters to every logger, to `schedule.json` and into a `Schedule`.

    Of a `Categorical` loggers get the index of its choice, and how probably the perturbation draws each choice.

    Losses and hypergradients are means over the steps since the last record. Loggers get every record; the schedule has
    at most `MOST_ROWS` rows and `MOST_CELLS` cells, so that neither checkpoints nor the file grow without end.

    Loggers get every value at the step that Lightning counts for `self.log`; see `LoggedSteps`. Rows of the schedule
    count training batches always, as `train_steps` does.

    Args:
        hyperparameters: the set to record.
        phase: steps the set; its learning rates and the number of skipped steps are recorded too.

    Attributes:
        hyperparameters: the set that is recorded.
        schedule: all rows so far.
        train_loss: mean training loss since the last record.
        path: where the schedule is written in this process; None where it is not.
    """

    def __init__(self, hyperparameters: HyperparameterSet, phase: HyperparameterPhase) -> None:
        self.hyperparameters = hyperparameters
        self._phase = phase
        self.schedule = hyperparameters.schedule()
        self.train_loss = Mean()
        self._valid_loss = Mean()
        self._hypergradient = Mean()
        self._last: Row | None = None  # of the last record, which the schedule may have left out
        self._records, self._stride = 0, 1  # records so far, and from one row to the next
        rows = min(MOST_ROWS, max(FEWEST_ROWS, MOST_CELLS // len(self.schedule.columns)))
        self._most_rows = 2 * (rows // 2)  # even, so that thinning keeps the last of one row more
        self._extra = False  # whether the last row is there because a run ended, and goes when the run goes on
        self._steps = LoggedSteps()
        self.path: Path | None = None
        self._files: list[ScheduleFile] = []
        self._summarised: list[str] = []

    def update(self, step: HyperparameterStep, batches: int) -> None:
        """Take in a hyperparameter step, after so many training batches."""
        if self.schedule.warmup is None:
            self.schedule.warmup = batches
        self._valid_loss.update(step.loss)
        if step.hypergradient is not None:
            self._hypergradient.update(step.hypergradient)

    def open(self, trainer: Trainer, handovers: Iterable[Handover]) -> None:
        """Write the layout, and begin `schedule.json` in the folder of the first logger that has one.

        Args:
            trainer: the Trainer of the run.
            handovers: hand the schedule to the process that started this one, if there is such a process.
        """
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout(self.hyperparameters))
        folders = [] if trainer.fast_dev_run else map(_folder, trainer.loggers)  # type: ignore[attr-defined]
        folder = next((folder for folder in folders if folder is not None), None)
        self.path = None if folder is None else folder / "schedule.json"
        paths = (self.path, *(handover.file for handover in handovers))
        self._files = [ScheduleFile(path, self.schedule) for path in paths if path is not None]
        for file in self._files:
            file.update()

    def count(self, trainer: Trainer, batch_idx: int) -> None:
        """Count the step that a batch completes; see `LoggedSteps.count`."""
        self._steps.count(trainer, batch_idx)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether a record is due; see `LoggedSteps.is_due`."""
        return self._steps.is_due(trainer)

    def record(self, trainer: Trainer, batches: int, epoch: int, *, final: bool = False) -> None:
        """Record the present, once after so many training batches; at the end of the run into the schedule as well."""
        if self._last is None or self._last.step < batches:
            losses, statistics = self._losses(), self._phase.statistics.metrics()
            hypergradient = self._hypergradient.pop()
            self._last = self._row(trainer, batches, epoch, losses)
            if self._records % self._stride == 0:
                self._append(self._last)
            self._records += 1
            if trainer.is_global_zero and trainer.loggers:  # last, since a logger may raise
                self._log(trainer, {**self._metrics(hypergradient), **statistics, **losses})
        if final and self.schedule.rows[-1].step < self._last.step:
            self._append(self._last, extra=True)

    def _row(self, trainer: Trainer, batches: int, epoch: int, losses: dict[str, float]) -> Row:
        scales = map(shortest, self.hyperparameters.scale.tolist())
        finite = [_finite(losses.get(tag)) for tag in (TRAIN_LOSS, VALID_LOSS)]
        # Those of the first rank, whose means a checkpoint holds.
        train_loss, valid_loss = trainer.strategy.broadcast(finite) if trainer.world_size > 1 else finite
        return Row(
            batches,
            epoch,
            self.hyperparameters.values(),
            dict(zip(self.schedule.scale_names, scales, strict=True)),
            train_loss=train_loss,
            valid_loss=valid_loss,
            unrounded=self.hyperparameters.unrounded(),
        )

    def _append(self, row: Row, *, extra: bool = False) -> None:
        if self._extra:
            self.schedule.rows.pop()
        self.schedule.append(row)
        self._extra = extra
        if len(self.schedule) > self._most_rows:
            self.schedule.thin()
            self._stride *= 2
        for file in self._files:
            file.update()

    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Give a record to all loggers."""
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._steps.number)
        if TRAIN_LOSS in metrics:
            # Not at the start: of several such summaries the first counts, and a user's own is to go before.
            self._summarise(trainer)

    def _summarise(self, trainer: Trainer) -> None:
        """Write the summary for the tab HPARAMS, once into each folder of a TensorBoard logger."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and logger.log_dir not in self._summarised:
                self._summarised.append(logger.log_dir)
                summarise(self.hyperparameters, logger.experiment)

    def close(self) -> None:
        """Write to the files what could not be written before."""
        for file in self._files:
            file.update()
        self._files = []

    def state_dict(self) -> dict[str, Any]:
        """Rows in the order of the schedule's columns, steps, means, folders with a summary for HPARAMS."""
        return {
            **self._steps.state_dict(),
            "rows": [self.schedule.cells(row) for row in self.schedule.rows],
            "last": None if self._last is None else self.schedule.cells(self._last),
            "records": self._records,
            "stride": self._stride,
            "extra": self._extra,
            "warmup": self.schedule.warmup,
            "means": {name: mean.state_dict() for name, mean in self._means().items()},
            "summarised": list(self._summarised),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.schedule = self.hyperparameters.schedule()
        for cells in state["rows"]:
            self.schedule.append(self.schedule.row(cells))
        self.schedule.warmup = state["warmup"]
        self._last = None if state["last"] is None else self.schedule.row(state["last"])
        self._records, self._stride, self._extra = state["records"], state["stride"], state["extra"]
        self._steps.load_state_dict(state)
        for name, mean in self._means().items():
            mean.load_state_dict(state["means"][name], self.hyperparameters.unconstrained.device)
        self._summarised = list(state["summarised"])

    def _means(self) -> dict[str, Mean]:
        return {
            "train_loss": self.train_loss,
            "valid_loss": self._valid_loss,
            "hypergradient": self._hypergradient,
        }

    def _losses(self) -> dict[str, float]:
        """Mean losses since the last record, by tag; of those that were computed."""
        means = {TRAIN_LOSS: self.train_loss.pop(), VALID_LOSS: self._valid_loss.pop()}
        return {tag: loss.item() for tag, loss in means.items() if loss is not None}

    def _metrics(self, hypergradient: Tensor | None) -> dict[str, float]:
        """What loggers get beside the losses and the statistics of the hypergradients."""
        hyperparameters = self.hyperparameters
        centre, scale = hyperparameters.unconstrained.cpu().double(), hyperparameters.scale.cpu().double()
        metrics: dict[str, float] = {}
        values = hyperparameters.constrain(torch.stack([centre, centre - scale, centre + scale]))
        for name, specification in hyperparameters.specifications.items():
            own = hyperparameters.slices[name]
            curves = specification.curves(name, values[name], centre[own], scale[own])
            metrics |= {f"{PREFIX}{tag}": value for tag, value in curves.items()}
        metrics |= _tagged(SCALE, hyperparameters.labels, scale.tolist())
        metrics[ENTROPY] = hyperparameters.entropy().item()
        metrics |= {f"stn/{name}": rate for name, rate in self._phase.optimizer.rates.items()}
        if self._phase.watch.skipped:
            metrics[SKIPPED] = self._phase.watch.skipped
        if hypergradient is not None:
            metrics |= _tagged(HYPERGRADIENT, hyperparameters.labels, hypergradient[0].tolist())
        return metrics


def _finite(loss: float | None) -> float | None:
    return None if loss is None or not math.isfinite(loss) else shortest(loss)


def _folder(logger: Logger) -> Path | None:
    """Where a logger keeps the files of this run, or None: beside the checkpoints."""
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    if logger.save_dir is None:
        return None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir, str(logger.name), version)


def _tagged(kind: str, labels: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    return {f"{kind}/{label}": value for label, value in zip(labels, values, strict=True)}
