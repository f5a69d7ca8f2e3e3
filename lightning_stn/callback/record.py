"""What a run shows and leaves behind: TensorBoard tags and layout, `schedule.csv`, the progress bar."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

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
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.methods.hypergradient import HyperparameterOptimizer
from lightning_stn.schedule import Row, Value


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


class Recorder:
    """Writes the state of the hyperparameters to every logger, to `schedule.csv` and into a `Schedule`.

    Of a `Categorical` loggers get the index of its choice, and how probably the perturbation draws each choice.

    Losses and hypergradients are means over the steps since the last record.

    Args:
        hyperparameters: what is recorded.
        optimizer: what steps them; its rates are recorded too.

    Attributes:
        schedule: all that was recorded so far.
        skipped: hyperparameter steps not taken so far, reported where there are any.
    """

    def __init__(self, hyperparameters: HyperparameterSet, optimizer: HyperparameterOptimizer) -> None:
        self._hyperparameters = hyperparameters
        self._optimizer = optimizer
        self.schedule = hyperparameters.schedule()
        self.train_loss = Mean()
        self.valid_loss = Mean()
        self.hypergradient = Mean()
        self.skipped = 0
        self._file: TextIO | None = None
        self._summarised = False

    def open(self, trainer: Trainer) -> None:
        """Write the layout, and open `schedule.csv` in the folder of the first logger that has one."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout(self._hyperparameters))
        folders = [] if trainer.fast_dev_run else map(_folder, trainer.loggers)  # type: ignore[attr-defined]
        folder = next((folder for folder in folders if folder is not None), None)
        if folder is not None:
            path = folder / "schedule.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            # A file of an earlier run is replaced in one go: killed at any moment, one of the two is whole.
            with open(path.with_suffix(".csv.new"), "w", newline="") as file:
                self.schedule.write(file)
            os.replace(file.name, path)
            self._file = open(path, "a", newline="")  # noqa: SIM115

    def record(self, trainer: Trainer, step: int) -> None:
        """Record the present, once a step."""
        rows = self.schedule.rows
        if rows and rows[-1].step >= step:
            return
        metrics = self._metrics()
        scales = [metrics[f"{SCALE}/{label}"] for label in self._hyperparameters.labels]
        row = Row(
            step,
            trainer.current_epoch,
            self._hyperparameters.values(),
            dict(zip(self.schedule.scale_names, scales, strict=True)),
        )
        self.schedule.append(row)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        if TRAIN_LOSS in metrics and not self._summarised:
            # Not at the start: of several such summaries the first counts, and a user's own is to go before.
            self._summarised = True
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    summarise(self._hyperparameters, logger.experiment)
        if self._file is not None:
            csv.writer(self._file, lineterminator="\n").writerow(self.schedule.cells(row))
            self._file.flush()

    def close(self) -> None:
        """Close `schedule.csv`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> list[list[Value]]:
        """The rows so far, in the order of the columns of `schedule.csv`."""
        return [self.schedule.cells(row) for row in self.schedule.rows]

    def load_state_dict(self, state: list[list[Value]]) -> None:
        """Continue behind saved rows."""
        self.schedule = self._hyperparameters.schedule()
        for cells in state:
            self.schedule.append(self.schedule.row(cells))

    def _metrics(self) -> dict[str, float]:
        hyperparameters = self._hyperparameters
        centre, scale = hyperparameters.unconstrained.cpu().double(), hyperparameters.scale.cpu().double()
        metrics: dict[str, float] = {}
        for name, specification in hyperparameters.specifications.items():
            own = hyperparameters.slices[name]
            curves = specification.curves(name, centre[own], scale[own])
            metrics |= {f"{PREFIX}{tag}": value for tag, value in curves.items()}
        metrics |= _tagged(SCALE, hyperparameters.labels, scale.tolist())
        metrics[ENTROPY] = hyperparameters.entropy().item()
        metrics |= {f"stn/{name}": rate for name, rate in self._optimizer.rates.items()}
        if self.skipped:
            metrics[SKIPPED] = self.skipped
        hypergradient = self.hypergradient.pop()
        if hypergradient is not None:
            metrics |= _tagged(HYPERGRADIENT, hyperparameters.labels, hypergradient[0].tolist())
        for tag, loss in ((TRAIN_LOSS, self.train_loss.pop()), (VALID_LOSS, self.valid_loss.pop())):
            if loss is not None:
                metrics[tag] = loss.item()
        return metrics


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
