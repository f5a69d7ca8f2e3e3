"""The schedules that a run leaves behind: recorded row by row, saved, loaded, read at any step."""

import bisect
import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Value = float | str
"""A hyperparameter in natural units: a number, whole or real, or the name of a choice."""


@dataclass(frozen=True)
class Row:
    """The hyperparameters at one moment.

    Args:
        step: training batches finished.
        epoch: zero-based epoch.
        values: natural units, or the choice, by name.
        scales: perturbation scale in unconstrained units, by entry: `<name>`, or `<name>_<choice>`.
    """

    step: int
    epoch: int
    values: Mapping[str, Value]
    scales: Mapping[str, float]


@dataclass
class Schedule:
    """The course of every hyperparameter over a run.

    Args:
        names: the hyperparameters.
        rows: what was recorded, in order of the step.
        choices: for each hyperparameter that is one of several choices, the names of these.

    Raises:
        ValueError: there are no names, or columns of the CSV form would be equal, or could not be told apart.
    """

    names: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the columns can be read back, and keep names and choices as tuples."""
        names: Any = self.names
        if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"Schedule: expected names to be one or more strings, got {names!r}; give a tuple of them."
            )
        unknown = sorted(set(self.choices) - set(names))
        if unknown:
            raise ValueError(f"Schedule: expected choices of {list(names)}, got choices of {unknown}; name them, too.")
        self.names = tuple(names)
        self.choices = {name: tuple(choices) for name, choices in self.choices.items()}
        columns = self.columns
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise ValueError(
                f"A name collides with another column of schedule.csv: {twice} would appear twice; rename a "
                "hyperparameter or a choice."
            )
        if _read_header(columns) != (self.names, self.choices):
            raise ValueError(
                f"A name collides with a choice: in schedule.csv nobody could tell which hyperparameter each of "
                f"{columns[2 + len(self.names) :]} belongs to; rename a hyperparameter or a choice."
            )

    @property
    def entries(self) -> tuple[str, ...]:
        """What has a perturbation scale of its own: `<name>` of a number, `<name>_<choice>` of each choice."""
        return tuple(
            entry
            for name in self.names
            for entry in ([f"{name}_{choice}" for choice in self.choices[name]] if name in self.choices else [name])
        )

    @property
    def columns(self) -> list[str]:
        """The header of the CSV form: `step, epoch, <name>..., <entry>_scale...`."""
        return ["step", "epoch", *self.names, *(f"{entry}_scale" for entry in self.entries)]

    def append(self, row: Row) -> None:
        """Add a row.

        Raises:
            ValueError: its step is not later than the last one's, its names are others, or a choice is unknown.
        """
        if self.rows and row.step <= self.rows[-1].step:
            raise ValueError(f"Expected a step after {self.rows[-1].step}, got {row.step}; rows are recorded in order.")
        if tuple(row.values) != self.names or tuple(row.scales) != self.entries:
            raise ValueError(
                f"Expected values of {list(self.names)} and scales of {list(self.entries)}, "
                f"got {list(row.values)} and {list(row.scales)}; give all of them, in this order."
            )
        for name, choices in self.choices.items():
            if row.values[name] not in choices:
                raise ValueError(
                    f"Expected {name} to be one of {list(choices)}, got {row.values[name]!r}; name the choice."
                )
        self.rows.append(row)

    def cells(self, row: Row) -> list[Value]:
        """A row in the order of `columns`."""
        return [row.step, row.epoch, *row.values.values(), *row.scales.values()]

    def row(self, cells: Sequence[Value]) -> Row:
        """The row with these cells, in the order of `columns`; numbers may be text.

        Raises:
            ValueError: there are too few or too many of them, or one is not a number and should be.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"Expected {len(self.columns)} cells, got {len(cells)}.")
        named = dict(zip(self.columns, cells, strict=True))
        values = {name: named[name] if name in self.choices else _number(named[name]) for name in self.names}
        scales = {entry: _number(named[f"{entry}_scale"]) for entry in self.entries}
        return Row(int(_number(named["step"])), int(_number(named["epoch"])), values, scales)

    def at(self, step: int) -> dict[str, Value]:
        """The values in force at a step: those of the last row up to it, or of the first row before that.

        Raises:
            ValueError: nothing is recorded, or the step is no number.
        """
        if not isinstance(step, int | float) or math.isnan(step):
            raise ValueError(
                f"Schedule.at: expected step to be a number of training batches, got {step!r}; give an int."
            )
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
        found = _read_header(header)
        if found is None:
            raise ValueError(
                f"{path}: expected the columns step, epoch, <name>..., <name>_scale... (<name>_<choice>_scale for each "
                f"choice of a categorical one), got {header}; give the "
                "schedule.csv of a run."
            )
        schedule = cls(found[0], choices=found[1])
        for number, line in enumerate(lines[1:], start=2):
            try:
                schedule.append(schedule.row(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a row of a schedule ({error}).") from error
        return schedule


def _number(cell: Value) -> float:
    """A cell as a number; whole where it is written so."""
    if isinstance(cell, str):
        return int(cell) if re.fullmatch(r"-?\d+", cell) else float(cell)
    return cell


def _read_header(header: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]] | None:
    """The names and choices whose columns these are, or None."""
    columns = header[2:]
    if list(header[:2]) != ["step", "epoch"]:
        return None
    # A name owns at least one scale, so that the scales begin in the middle or before it.
    for count in range(len(columns) // 2, 0, -1):
        names = tuple(columns[:count])
        choices = _read_scales(names, columns[count:])
        if choices is not None:
            return names, choices
    return None


def _read_scales(names: Sequence[str], columns: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """The choices that the scale columns speak of, by name; None if they are not the scales of these names, in order.

    A column belongs to the longest name that it begins with.
    """
    owners, owned = [], {name: list[str]() for name in names}
    for column in columns:
        fitting = [name for name in names if column.startswith(f"{name}_") and column.endswith("_scale")]
        if not fitting:
            return None
        owners.append(max(fitting, key=len))
        owned[owners[-1]].append(column[len(owners[-1]) + 1 : -len("_scale")])
    if list(dict.fromkeys(owners)) != list(names) or owners != sorted(owners, key=list(names).index):
        return None
    if any(labels != [""] and ("" in labels or len(labels) < 2) for labels in owned.values()):
        return None
    return {name: tuple(labels) for name, labels in owned.items() if labels != [""]}
