"""The schedule of a run: recorded row by row, saved, loaded, and read at any step."""

import bisect
import math
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

from lightning_stn.arguments import is_whole
from lightning_stn.named import check_specifications
from lightning_stn.schedule import csv_form, json_form, tables
from lightning_stn.schedule.columns import Cell, Columns
from lightning_stn.schedule.plot import plot
from lightning_stn.schedule.row import Row
from lightning_stn.schedule.text_file import ENCODING, read_text
from lightning_stn.schedule.unspecified import Unspecified
from lightning_stn.specifications import Hyperparameter, Value

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Interpolation = Literal["step", "linear"]
"""How values between two rows are read: those of the row before, or on a line between both, in unconstrained units."""

MOST_NAMES = 5
"""Names that the short form of a schedule lists."""


@dataclass(repr=False)
class Schedule:
    """Values and perturbation scales of every hyperparameter over a run, with the losses beside them.

    Args:
        specifications: name to `Float`, `Integer`, `Categorical` or another kind.
        rows: the recorded rows, in order of the step.
        warmup: training batches before the first hyperparameter step; None while there was none.

    Raises:
        TypeError: `specifications` is not a mapping of hyperparameters.
        ValueError: there are none, two columns would be equal or ambiguous, or a field is not what JSON holds.

    Example:
        >>> from lightning_stn import Float
        >>> schedule = Schedule({"dropout": Float(0.0, 0.9)})
        >>> for step, rate in ((0, 0.1), (100, 0.3)):
        ...     schedule.append(Row(step, 0, {"dropout": rate}, {"dropout": 0.5}))
        >>> schedule
        Schedule of dropout: 2 rows, steps 0 to 100
        >>> schedule.at(50), schedule.at(50, "linear")
        ({'dropout': 0.1}, {'dropout': 0.18})
    """

    specifications: Mapping[str, Hyperparameter]
    rows: list[Row] = field(default_factory=list)
    warmup: int | None = None

    def __post_init__(self) -> None:
        """Check that every form of the schedule can be read back."""
        check_specifications(self.specifications, ())
        if not self.specifications:
            raise ValueError("Schedule: expected at least one hyperparameter, got none; give {name: specification}.")
        if self.warmup is not None and not is_whole(self.warmup, 0):
            raise ValueError(
                f"Schedule: expected warmup to be a number of training batches, or None, got {self.warmup!r}."
            )
        if not isinstance(self.rows, list) or not all(isinstance(row, Row) for row in self.rows):
            raise ValueError(f"Schedule: expected rows to be a list of Row(...), got {reprlib.repr(self.rows)}.")
        self.specifications = dict(self.specifications)
        for name, specification in self.specifications.items():
            json_form.check_plain(name, specification.to_plain())
        self._columns = Columns(self.specifications)
        given, self.rows = self.rows, []
        for row in given:
            self.append(row)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hyperparameters."""
        return tuple(self.specifications)

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Names of the perturbation scales: `<name>`, `<name>_<choice>` of a choice, `<name>.<part>` of a part."""
        return tuple(self._columns.scales)

    @property
    def csv_columns(self) -> list[str]:
        """The header of the CSV form: `step, epoch, <name>..., <scale name>_scale...`."""
        return list(self._columns.csv)

    @property
    def columns(self) -> list[str]:
        """All columns: those of the CSV form, `train_loss`, `valid_loss`, and `<name>.unrounded` of whole numbers."""
        return list(self._columns.all)

    def __len__(self) -> int:
        return len(self.rows)

    def append(self, row: Row) -> None:
        """Add a row.

        Raises:
            ValueError: the step is not later than that of the last row, names differ, a choice is unknown, or a number
                is not rounded to its value.
        """
        if self.rows and row.step <= self.rows[-1].step:
            raise ValueError(f"Expected a step after {self.rows[-1].step}, got {row.step}; rows are recorded in order.")
        self._columns.check(row)
        self.rows.append(row)

    def cells(self, row: Row) -> list[Cell]:
        """A row in the order of `columns`; None where a loss or a number before rounding is not known."""
        return self._columns.cells(row)

    def row(self, cells: Sequence[Cell]) -> Row:
        """The row with these cells, in the order of `columns` or `csv_columns`; numbers may be text.

        Raises:
            ValueError: the number of cells is wrong, or a cell is not a finite number where one is expected.
        """
        return self._columns.row(cells)

    def at(self, step: float, interpolation: Interpolation = "step") -> dict[str, Value]:
        """The values at a step; before the first row those of the first, after the last row those of the last.

        Args:
            step: number of finished training batches.
            interpolation: "step" for the last row up to the step; "linear" for numbers on the line between the rows
                before and after it, in unconstrained units (of a whole number, before rounding).

        Raises:
            ValueError: the schedule is empty, the step is not a number, or the interpolation is unknown.
        """
        if not isinstance(step, int | float) or step != step:
            raise ValueError(
                f"Schedule.at: expected step to be a number of training batches, got {step!r}; give an int."
            )
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"Schedule.at: expected interpolation='step' or 'linear', got {interpolation!r}.")
        if not self.rows:
            raise ValueError("The schedule is empty; record or load one first.")
        index = max(bisect.bisect_right(self.rows, step, key=lambda row: row.step) - 1, 0)
        before = self.rows[index]
        if interpolation == "step" or step <= before.step or index + 1 == len(self.rows):
            return dict(before.values)
        after = self.rows[index + 1]
        share = (step - before.step) / (after.step - before.step)
        return {name: self._between(name, before, after, share) for name in self.names}

    def _between(self, name: str, before: Row, after: Row, share: float) -> Value:
        ends = [row.unrounded.get(name, row.values[name]) for row in (before, after)]
        if any(isinstance(end, str) for end in ends):
            return before.values[name]
        return self.specifications[name].between(float(ends[0]), float(ends[1]), share)

    @property
    def final(self) -> dict[str, Value]:
        """The values of the last row.

        Raises:
            ValueError: the schedule is empty.
        """
        return self.at(math.inf)

    def thin(self) -> None:
        """Remove every second row, but neither the first nor the last one."""
        self.rows[:] = [*self.rows[:-1:2], *self.rows[-1:]]

    @property
    def head(self) -> str:
        """The text of the JSON form before the rows."""
        plain = {name: specification.to_plain() for name, specification in self.specifications.items()}
        return json_form.head(plain, self.warmup, self.columns)

    def write_json(self, file: TextIO) -> None:
        """Write the JSON form."""
        file.write(self.head)
        for index, row in enumerate(self.rows):
            file.write(json_form.row_text(self.cells(row), first=not index))
        file.write(json_form.TAIL)

    def save(self, path: str | Path) -> None:
        """Save the schedule: as JSON, which holds all of it, or as CSV if the name of the file ends in `.csv`.

        The CSV form holds steps, values and scales, but neither ranges nor losses.
        """
        with open(path, "w", newline="", encoding=ENCODING) as file:
            if Path(path).suffix.lower() == ".csv":
                csv_form.write(self.csv_columns, map(self._columns.csv_cells, self.rows), file)
            else:
                self.write_json(file)

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Load a schedule from JSON or CSV, whatever the name of the file.

        Raises:
            ValueError: the file is not a schedule, or is cut off; the message gives the line or the key.
            TypeError: the path is neither a string nor a `Path`.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"Schedule.load: expected path to be a string or a Path, got {path!r}; give the file.")
        text = read_text(Path(path))
        return cls._from_json(Path(path), text) if text.lstrip().startswith("{") else cls._from_csv(Path(path), text)

    @classmethod
    def _from_json(cls, path: Path, text: str) -> "Schedule":
        document = json_form.parse(path, text)
        specifications = {}
        for name, plain in document.hyperparameters.items():
            try:
                specifications[name] = Hyperparameter.from_plain(plain)
            except ValueError as error:
                raise ValueError(f"{path}: hyperparameters.{name}: {error}") from error
        try:
            schedule = cls(specifications, warmup=document.warmup)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if document.columns != schedule.columns:
            raise ValueError(
                f"{path}: expected columns to be {schedule.columns}, got "
                f"{reprlib.repr(document.columns)}; correct them."
            )
        schedule._extend((f"{path}: rows[{index}]", cells) for index, cells in enumerate(document.rows))
        return schedule

    @classmethod
    def _from_csv(cls, path: Path, text: str) -> "Schedule":
        (names, choices, parts), lines = csv_form.read(path, text)
        unknown = {name: Unspecified(choices=choices.get(name, ()), names=parts.get(name, ())) for name in names}
        schedule = cls(unknown)
        schedule._extend((f"{path}, line {number}", cells) for number, cells in lines)
        rows = schedule.rows
        return cls({name: one.observe([row.values[name] for row in rows]) for name, one in unknown.items()}, rows)

    def _extend(self, lines: Iterable[tuple[str, Any]]) -> None:
        """Append the rows with these cells; an error begins with the place that stands beside them."""
        for place, cells in lines:
            try:
                if not isinstance(cells, list):
                    raise ValueError(f"expected a list of cells, got {reprlib.repr(cells)}; give one")
                self.append(self.row(cells))
            except ValueError as error:
                raise ValueError(f"{place}: not a row of a schedule ({error}).") from error

    def plot(
        self,
        *others: "Schedule",
        labels: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        group: bool | None = None,
    ) -> tuple["Figure", list["Axes"]]:
        """Draw the losses, and below them every hyperparameter in natural units over the training batches.

        The warm-up is shaded. A number with a range has a band, one perturbation scale to each side. Whole numbers and
        choices are drawn as steps.

        Args:
            *others: schedules of the same hyperparameters, such as those of other seeds, drawn over this one.
            labels: names of the schedules in the legend, this one first; None for "run 1", "run 2", ...
            names: the hyperparameters to draw; None for all.
            group: whether hyperparameters with the same unit, range and scale share a panel; None for more than nine.

        Returns:
            The figure, and its axes: the losses, where there are any, then the panels.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: a schedule is empty or has other hyperparameters, the number of labels is wrong, or a name is
                unknown.
        """
        return plot((self, *others), labels, names, group)

    def to_pandas(self) -> "pandas.DataFrame":
        """A `pandas.DataFrame` with a row for each row, and all `columns`.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return tables.to_pandas(self.columns, map(self.cells, self.rows))

    def __repr__(self) -> str:
        """One line, however long the schedule is."""
        names = ", ".join(self.names[:MOST_NAMES]) + (", ..." if len(self.names) > MOST_NAMES else "")
        span = f", steps {self.rows[0].step} to {self.rows[-1].step}" if self.rows else ""
        return f"Schedule of {names}: {len(self)} row{'s' * (len(self) != 1)}{span}"

    def _repr_html_(self) -> str:
        """A table for notebooks: range, start, end and extremes of each hyperparameter."""
        return tables.to_html(repr(self), tables.extremes(self.specifications, [row.values for row in self.rows]))
