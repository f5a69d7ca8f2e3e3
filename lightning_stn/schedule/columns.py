"""The columns of a schedule, and rows as cells in their order."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_stn.schedule import csv_form
from lightning_stn.schedule.cells import number, number_or_none, whole_number
from lightning_stn.schedule.row import Row
from lightning_stn.specifications import Hyperparameter, Value

Cell = Value | None
"""A number, a choice, or None where something was not recorded."""

_UNROUNDED = ".unrounded"


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of a schedule of hyperparameters.

    Args:
        specifications: of the hyperparameters, by name.

    Raises:
        ValueError: two columns would be equal or ambiguous.
    """

    specifications: Mapping[str, Hyperparameter]

    def __post_init__(self) -> None:
        """Check that the header of the CSV form can be read back."""
        twice = sorted(column for column, count in Counter(self.all).items() if count > 1)
        if twice:
            raise ValueError(
                f"A name collides with another column of a schedule: {twice} would appear twice; rename a "
                "hyperparameter or a choice."
            )
        parts = {name: s.parts for name, s in self.specifications.items() if s.is_number and s.parts}
        if csv_form.read_header(self.csv) != (tuple(self.specifications), self._choices, parts):
            raise ValueError(
                "A name collides with a choice: the header of schedule.csv would not say which hyperparameter each of "
                f"{self.csv[2 + len(self.specifications) :]} belongs to; rename a hyperparameter or a choice."
            )

    @cached_property
    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {name: s.parts for name, s in self.specifications.items() if not s.is_number}

    @cached_property
    def scales(self) -> dict[str, str]:
        """The columns of the perturbation scales, by the names of the scales."""
        names = [f"{name}{suffix}" for name, s in self.specifications.items() for suffix in _suffixes(s)]
        return {name: f"{name}{csv_form.SCALE}" for name in names}

    @cached_property
    def _unrounded(self) -> dict[str, str]:
        return {name: f"{name}{_UNROUNDED}" for name, s in self.specifications.items() if s.is_rounded}

    @cached_property
    def csv(self) -> list[str]:
        """The columns of the CSV form."""
        return ["step", "epoch", *self.specifications, *self.scales.values()]

    @cached_property
    def all(self) -> list[str]:
        """Those of the CSV form, the losses, and the numbers before rounding."""
        return [*self.csv, "train_loss", "valid_loss", *self._unrounded.values()]

    def check(self, row: Row) -> None:
        """Check that a row belongs to these columns.

        Raises:
            ValueError: names differ, a choice is unknown, or a number is not rounded to its value.
        """
        if list(row.values) != list(self.specifications) or list(row.scales) != list(self.scales):
            raise ValueError(
                f"Expected values of {list(self.specifications)} and scales of {list(self.scales)}, "
                f"got {list(row.values)} and {list(row.scales)}; give all of them, in this order."
            )
        for name, choices in self._choices.items():
            if row.values[name] not in choices:
                raise ValueError(
                    f"Expected {name} to be one of {list(choices)}, got {row.values[name]!r}; give one of them."
                )
        for name, real in row.unrounded.items():
            if abs(real - float(row.values[name])) > 0.5 + 1e-9 * abs(real):
                raise ValueError(
                    f"Expected {name}{_UNROUNDED} to be rounded to {row.values[name]}, got {real!r}; correct one."
                )

    def csv_cells(self, row: Row) -> list[Value]:
        """A row in the order of `csv`."""
        return [row.step, row.epoch, *row.values.values(), *row.scales.values()]

    def cells(self, row: Row) -> list[Cell]:
        """A row in the order of `all`; None where a loss or a number before rounding is not known."""
        unrounded = [row.unrounded.get(name) for name in self._unrounded]
        return [*self.csv_cells(row), row.train_loss, row.valid_loss, *unrounded]

    def row(self, cells: Sequence[Cell]) -> Row:
        """The row with these cells, in the order of `all` or `csv`; numbers may be text.

        Raises:
            ValueError: the number of cells is wrong, or a cell is not a finite number where one is expected.
        """
        if len(cells) not in (len(self.all), len(self.csv)):
            raise ValueError(f"Expected {len(self.all)} cells, got {len(cells)}; give one for each column.")
        named = dict(zip(self.all, cells, strict=False))
        values: dict[str, Any] = {
            name: named[name] if name in self._choices else number(name, named[name]) for name in self.specifications
        }
        return Row(
            whole_number("step", named["step"]),
            whole_number("epoch", named["epoch"]),
            values,
            {name: number(column, named[column]) for name, column in self.scales.items()},
            train_loss=number_or_none("train_loss", named.get("train_loss")),
            valid_loss=number_or_none("valid_loss", named.get("valid_loss")),
            unrounded={
                name: number(column, named[column])
                for name, column in self._unrounded.items()
                if named.get(column) is not None
            },
        )


def _suffixes(specification: Hyperparameter) -> list[str]:
    """What follows the name of a hyperparameter in the names of its scales."""
    sign = "." if specification.is_number else "_"
    return [f"{sign}{part}" for part in specification.parts] or [""]
