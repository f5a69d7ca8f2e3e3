"""The schedules that a run leaves behind: recorded row by row, saved, loaded, read at any step."""

import bisect
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True)
class Row:
    """The hyperparameters at one moment.

    Args:
        step: training batches finished.
        epoch: zero-based epoch.
        values: natural units, by name.
        scales: perturbation scale in unconstrained units, by name.
    """

    step: int
    epoch: int
    values: Mapping[str, float]
    scales: Mapping[str, float]


@dataclass
class Schedule:
    """The course of every hyperparameter over a run.

    Args:
        names: the hyperparameters.
        rows: what was recorded, in order of the step.
    """

    names: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The header of the CSV form: `step, epoch, <name>..., <name>_scale...`."""
        return ["step", "epoch", *self.names, *(f"{name}_scale" for name in self.names)]

    def append(self, row: Row) -> None:
        """Add a row.

        Raises:
            ValueError: its step is not later than the last one's, or its names are others.
        """
        if self.rows and row.step <= self.rows[-1].step:
            raise ValueError(f"Expected a step after {self.rows[-1].step}, got {row.step}; rows are recorded in order.")
        if tuple(row.values) != self.names or tuple(row.scales) != self.names:
            raise ValueError(f"Expected values and scales of {list(self.names)}, got {list(row.values)}.")
        self.rows.append(row)

    def cells(self, row: Row) -> list[float]:
        """A row in the order of `columns`."""
        return [row.step, row.epoch, *row.values.values(), *row.scales.values()]

    def row(self, cells: Sequence[float]) -> Row:
        """The row with these cells, in the order of `columns`.

        Raises:
            ValueError: there are too few or too many of them.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"Expected {len(self.columns)} cells, got {len(cells)}.")
        count = len(self.names)
        values = dict(zip(self.names, cells[2 : 2 + count], strict=True))
        scales = dict(zip(self.names, cells[2 + count :], strict=True))
        return Row(int(cells[0]), int(cells[1]), values, scales)

    def at(self, step: int) -> dict[str, float]:
        """The values in force at a step: those of the last row up to it, or of the first row before that.

        Raises:
            ValueError: nothing is recorded.
        """
        if not self.rows:
            raise ValueError("The schedule is empty; record or load one before it is read.")
        index = bisect.bisect_right([row.step for row in self.rows], step) - 1
        return dict(self.rows[max(index, 0)].values)

    def write(self, file: TextIO) -> None:
        """Write the CSV form."""
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.cells(row) for row in self.rows)

    def save(self, path: str | Path) -> None:
        """Save as CSV."""
        with open(path, "w", newline="") as file:
            self.write(file)

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Load from CSV.

        Raises:
            ValueError: the file is not a schedule; the message names the line.
        """
        with open(path, newline="") as file:
            lines = list(csv.reader(file))
        header = lines[0] if lines else []
        names = tuple(header[2 : 2 + (len(header) - 2) // 2])
        schedule = cls(names)
        if header != schedule.columns or not names:
            raise ValueError(f"{path}: expected the columns step, epoch, <name>..., <name>_scale..., got {header}.")
        for number, line in enumerate(lines[1:], start=2):
            try:
                schedule.append(schedule.row([float(cell) for cell in line]))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a row of a schedule ({error}).") from error
        return schedule
