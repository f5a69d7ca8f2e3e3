"""The schedule of a run: recorded row by row, saved as CSV, loaded, and read at any step."""

import bisect
import contextlib
import csv
import io
import itertools
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Value = float | str
"""Value of a hyperparameter in natural units: a number, whole or real, or the name of a choice."""

ENCODING = "utf-8"
"""Of the CSV form, on every system."""

_SCALE = "_scale"


@dataclass(frozen=True)
class Row:
    """The hyperparameters at one step.

    Args:
        step: number of finished training batches.
        epoch: zero-based epoch.
        values: natural units, or the choice, by name.
        scales: perturbation scales in unconstrained units, by the schedule's `scale_names`.
    """

    step: int
    epoch: int
    values: Mapping[str, Value]
    scales: Mapping[str, float]


@dataclass
class Schedule:
    """Values and perturbation scales of every hyperparameter over a run.

    Args:
        names: names of the hyperparameters.
        rows: the recorded rows, in order of the step.
        choices: by name, the choices of each hyperparameter whose value is the name of a choice.
        parts: by name, the parts of each number with several unconstrained entries.

    Raises:
        ValueError: there are no names, or two columns of the CSV form would be equal or ambiguous.
    """

    names: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the columns can be read back, and keep names, choices and parts as tuples."""
        names: Any = self.names
        if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"Schedule: expected names to be one or more strings, got {names!r}; give a tuple of them."
            )
        for kind, given in (("choices", self.choices), ("parts", self.parts)):
            if not _are_labels(given):
                raise ValueError(
                    f"Schedule: expected {kind} as a dictionary from names to tuples of strings, got {given!r}; give "
                    "one, or leave it out."
                )
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise ValueError(
                    f"Schedule: expected {kind} of {list(names)}, got {kind} of {unknown}; add them to names."
                )
        self.names = tuple(names)
        self.choices = {name: tuple(choices) for name, choices in self.choices.items()}
        self.parts = {name: tuple(parts) for name, parts in self.parts.items()}
        columns = self.columns
        twice = sorted(column for column, count in Counter(columns).items() if count > 1)
        if twice:
            raise ValueError(
                f"A name collides with another column of schedule.csv: {twice} would appear twice; rename a "
                "hyperparameter or a choice."
            )
        if _read_header(columns) != (self.names, self.choices, self.parts):
            raise ValueError(
                "A name collides with a choice: the header of schedule.csv would not say which hyperparameter each of "
                f"{columns[2 + len(self.names) :]} belongs to; rename a hyperparameter or a choice."
            )

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Names of the perturbation scales: `<name>`, `<name>_<choice>` of a choice, `<name>.<part>` of a part."""
        return tuple(f"{name}{suffix}" for name in self.names for suffix in self._suffixes(name))

    def _suffixes(self, name: str) -> list[str]:
        if name in self.choices:
            return [f"_{choice}" for choice in self.choices[name]]
        return [f".{part}" for part in self.parts[name]] if name in self.parts else [""]

    @property
    def columns(self) -> list[str]:
        """The header of the CSV form: `step, epoch, <name>..., <scale name>_scale...`."""
        return ["step", "epoch", *self.names, *(f"{name}{_SCALE}" for name in self.scale_names)]

    def append(self, row: Row) -> None:
        """Add a row.

        Raises:
            ValueError: the step is not later than that of the last row, names differ, or a choice is unknown.
        """
        if self.rows and row.step <= self.rows[-1].step:
            raise ValueError(f"Expected a step after {self.rows[-1].step}, got {row.step}; rows are recorded in order.")
        if tuple(row.values) != self.names or tuple(row.scales) != self.scale_names:
            raise ValueError(
                f"Expected values of {list(self.names)} and scales of {list(self.scale_names)}, "
                f"got {list(row.values)} and {list(row.scales)}; give all of them, in this order."
            )
        for name, choices in self.choices.items():
            if row.values[name] not in choices:
                raise ValueError(
                    f"Expected {name} to be one of {list(choices)}, got {row.values[name]!r}; give one of them."
                )
        self.rows.append(row)

    def cells(self, row: Row) -> list[Value]:
        """A row in the order of `columns`."""
        return [row.step, row.epoch, *row.values.values(), *row.scales.values()]

    def row(self, cells: Sequence[Value]) -> Row:
        """The row with these cells, in the order of `columns`; numbers may be text.

        Raises:
            ValueError: the number of cells is wrong, or a cell is not a finite number where one is expected.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"Expected {len(self.columns)} cells, got {len(cells)}; give one for each column.")
        named = dict(zip(self.columns, cells, strict=True))
        values = {name: named[name] if name in self.choices else _number(name, named[name]) for name in self.names}
        scales = {name: _number(f"{name}{_SCALE}", named[f"{name}{_SCALE}"]) for name in self.scale_names}
        return Row(_count("step", named["step"]), _count("epoch", named["epoch"]), values, scales)

    def at(self, step: int) -> dict[str, Value]:
        """The values at a step: those of the last row up to it, or of the first row for an earlier step.

        Raises:
            ValueError: the schedule is empty, or the step is not a number.
        """
        if not isinstance(step, int | float) or step != step:
            raise ValueError(
                f"Schedule.at: expected step to be a number of training batches, got {step!r}; give an int."
            )
        if not self.rows:
            raise ValueError("The schedule is empty; record or load one first.")
        index = bisect.bisect_right([row.step for row in self.rows], step) - 1
        return dict(self.rows[max(index, 0)].values)

    def write(self, file: TextIO) -> None:
        """Write the CSV form."""
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.cells(row) for row in self.rows)

    def save(self, path: str | Path) -> None:
        """Save as CSV."""
        with open(path, "w", newline="", encoding=ENCODING) as file:
            self.write(file)

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Load from CSV.

        Raises:
            ValueError: the file is not a schedule, or its last line is cut off; the message gives the line.
            TypeError: the path is neither a string nor a `Path`.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"Schedule.load: expected path to be a string or a Path, got {path!r}; give the file.")
        lines = list(_read_lines(Path(path)))
        header = lines[0][1] if lines else []
        found = _read_header(header)
        if found is None:
            raise ValueError(
                f"{path}: expected the columns step, epoch, <name>..., <name>_scale... (<name>_<choice>_scale for each "
                f"choice of a categorical hyperparameter), got {reprlib.repr(header)}; give the schedule.csv of a run."
            )
        names, choices, parts = found
        schedule = cls(names, choices=choices, parts=parts)
        for number, cells in lines[1:]:
            try:
                schedule.append(schedule.row(cells))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a row of a schedule ({error}).") from error
        return schedule


def _read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Cells of each row of a CSV file, with the number of the row's last line.

    Raises:
        ValueError: the file is not text, not CSV, or its last line has no end.
    """
    content = path.read_bytes()
    try:
        text = content.decode(ENCODING).removeprefix("\ufeff")  # spreadsheets write this mark
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {number}: expected text in UTF-8, got the byte 0x{content[error.start]:02x}; save the "
            "file in UTF-8."
        ) from error
    if text and not text.endswith(("\n", "\r")):
        last = text.count("\n") + 1
        raise ValueError(
            f"{path}, line {last}: expected a line end, got the end of the file, so that the last row "
            "may be cut off; delete this row, or complete it with a line end."
        )
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: not CSV ({error}); give the schedule.csv of a run."
        ) from error


def _number(column: str, cell: Value) -> float:
    """A cell as a finite number: an int if it is written as one, otherwise a float.

    Raises:
        ValueError: the cell is not a finite number.
    """
    number: Any = cell
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(cell, str):
            number = int(cell) if re.fullmatch(r"-?[0-9]+", cell) else float(cell)
        if isinstance(number, int | float) and math.isfinite(number):
            return number
    raise ValueError(f"Expected {column} to be a finite number, got {reprlib.repr(cell)}; correct the cell.")


def _count(column: str, cell: Value) -> int:
    """A cell as a whole number of at least 0.

    Raises:
        ValueError: the cell is not one.
    """
    number = _number(column, cell)
    if number < 0 or not isinstance(number, int):
        raise ValueError(
            f"Expected {column} to be a whole number of at least 0, got {reprlib.repr(cell)}; correct the cell."
        )
    return number


def _are_labels(given: Any) -> bool:
    return isinstance(given, Mapping) and all(
        isinstance(name, str) and isinstance(labels, tuple | list) and all(isinstance(label, str) for label in labels)
        for name, labels in given.items()
    )


_Labels = dict[str, tuple[str, ...]]


def _read_header(header: Sequence[str]) -> tuple[tuple[str, ...], _Labels, _Labels] | None:
    """Names, choices and parts of the schedule with this header; None if there is no such schedule."""
    columns = header[2:]
    if list(header[:2]) != ["step", "epoch"]:
        return None
    # Each name has at least one scale, so the names are at most half of the columns.
    most = len(columns) // 2
    places = {name: place for place, name in reversed(list(enumerate(columns[:most])))}
    for count in range(most, 0, -1):
        labels = _read_scales(columns, count, places)
        if labels is not None:
            return tuple(columns[:count]), *labels
    return None


def _read_scales(columns: Sequence[str], count: int, places: Mapping[str, int]) -> tuple[_Labels, _Labels] | None:
    """Choices and parts in the scale columns, by name; None if these are not the scales of the names, in order.

    Args:
        columns: first the names, then their scales.
        count: number of names.
        places: the place of each name, and of columns behind the names, which do not count.
    """
    suffixes: list[list[str]] = []
    for column in itertools.islice(columns, count, None):
        owner = _owner(column, count, places)
        if owner is None or owner[0] not in (len(suffixes) - 1, len(suffixes)):
            return None
        if owner[0] == len(suffixes):
            suffixes.append([])
        suffixes[-1].append(owner[1])
    if len(suffixes) < count:
        return None
    choices, parts = {}, {}
    for name, own in zip(columns, suffixes, strict=False):
        if len(own) > 1 and all(suffix.startswith("_") for suffix in own):
            choices[name] = tuple(suffix[1:] for suffix in own)
        elif all(suffix.startswith(".") for suffix in own):
            parts[name] = tuple(suffix[1:] for suffix in own)
        elif own != [""]:
            return None
    return choices, parts


def _owner(column: str, count: int, places: Mapping[str, int]) -> tuple[int, str] | None:
    """Place of the name that a scale column belongs to, the longest that it begins with, and what follows the name."""
    if not column.endswith(_SCALE):
        return None
    label = column.removesuffix(_SCALE)
    ends = (match.start() for match in re.finditer(r"[_.](?=.)", label, re.DOTALL))
    for end in (len(label), *reversed(list(ends))):
        if places.get(label[:end], count) < count:
            return places[label[:end]], label[end:]
    return None
