"""Tables as text, for notebooks and for pandas."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_stn.specifications import Hyperparameter, Value

if TYPE_CHECKING:
    import pandas


Cell = float | str
"""A number, or text."""


def to_pandas(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> "pandas.DataFrame":
    """A data frame.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Schedule.to_pandas needs pandas; run: pip install pandas") from error
    cells = [[math.nan if cell is None else cell for cell in row] for row in rows]
    return pandas.DataFrame(cells, columns=list(columns))


def extremes(
    specifications: Mapping[str, Hyperparameter], values: Sequence[Mapping[str, Value]]
) -> list[dict[str, Cell]]:
    """A row for each hyperparameter: range, first and last of its values, smallest and largest of numbers.

    Args:
        specifications: by name.
        values: natural units by name, in order; none leaves cells empty.
    """
    rows: list[dict[str, Cell]] = []
    for name, specification in specifications.items():
        own = [row[name] for row in values]
        ends = [own[0], own[-1]] if own else ["", ""]
        ends += [min(own), max(own)] if own and specification.is_number else ["", ""]
        cells = zip(("first", "last", "smallest", "largest"), ends, strict=True)
        rows.append({"hyperparameter": name, "range": describe_range(specification), **dict(cells)})
    return rows


def to_html(title: str, rows: Sequence[Mapping[str, Cell]]) -> str:
    """A table in HTML, for notebooks; numbers have four digits.

    Args:
        title: the caption.
        rows: dictionaries with the same keys, which become the header; without rows there is none.
    """
    header = "".join(f"<th>{html.escape(column)}</th>" for row in rows[:1] for column in row)
    lines = ("".join(f"<td>{html.escape(describe(cell))}</td>" for cell in row.values()) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{html.escape(title)}</caption><tr>{header}</tr>{body}</table>"


def describe_span(numbers: Sequence[float]) -> Cell:
    """The only one of equal numbers, otherwise the smallest and the largest as text."""
    low, high = min(numbers), max(numbers)
    return low if low == high else f"{describe(low)} to {describe(high)}"


def markdown(rows: Sequence[Mapping[str, Cell]]) -> str:
    """A table in Markdown with aligned columns; numbers have four digits.

    Args:
        rows: dictionaries with the same keys, which become the header; without rows there is none.

    Example:
        >>> print(markdown([{"hyperparameter": "dropout", "loss": 0.123456}, {"hyperparameter": "noise", "loss": 2}]))
        | hyperparameter |   loss |
        |----------------|-------:|
        | dropout        | 0.1235 |
        | noise          |      2 |
    """
    if not rows:
        return ""
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


def describe(value: Cell) -> str:
    """A value in at most four digits."""
    return value if isinstance(value, str) else f"{value:.4g}"


def describe_range(specification: Hyperparameter) -> str:
    """The range of a number with its unit, or the choices."""
    if specification.bounds is None:
        return ", ".join(specification.parts)
    low, high = specification.bounds
    unit = f" {specification.unit}" if specification.unit else ""
    return f"{'-∞' if low == -math.inf else describe(low)} to {'∞' if high == math.inf else describe(high)}{unit}"
