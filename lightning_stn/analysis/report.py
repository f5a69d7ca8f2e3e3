"""Results as tables: base class of all results, and their text."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from lightning_stn.schedule.tables import describe

Cell = float | str
"""A number, or text."""


class Report(ABC):
    """Base class of the results of an analysis.

    `pandas.DataFrame(result.table())` is the table as a data frame; `print(result)` shows a summary, which notebooks
    render.
    """

    @abstractmethod
    def table(self) -> list[dict[str, Cell]]:
        """The result as rows, each a dictionary with the same keys."""

    def summary(self) -> list[dict[str, Cell]]:
        """The rows that `print` shows, by default the whole table."""
        return self.table()

    def __str__(self) -> str:
        """The summary as a table in Markdown."""
        return markdown(self.summary())

    def _repr_markdown_(self) -> str:
        """The summary, for notebooks."""
        return str(self)


def markdown(rows: Sequence[Mapping[str, Cell]]) -> str:
    """A table in Markdown with aligned columns; numbers have four digits.

    Args:
        rows: one or more dictionaries with the same keys, which become the header.

    Example:
        >>> print(markdown([{"hyperparameter": "dropout", "loss": 0.123456}, {"hyperparameter": "noise", "loss": 2}]))
        | hyperparameter |   loss |
        |----------------|-------:|
        | dropout        | 0.1235 |
        | noise          |      2 |
    """
    columns = list(rows[0])
    numeric = {column: not any(isinstance(row[column], str) for row in rows) for column in columns}
    texts = [columns, *([describe(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for cells in texts:
        padded = (
            cell.rjust(width) if numeric[column] else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|".join(
        "-" * (width + 1) + (":" if numeric[column] else "-") for width, column in zip(widths, columns, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
