"""Tables of a schedule: for pandas, and for notebooks."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_stn.specifications import Hyperparameter, Value

if TYPE_CHECKING:
    import pandas


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


def to_html(title: str, specifications: Mapping[str, Hyperparameter], values: Sequence[Mapping[str, Value]]) -> str:
    """A table with a line for each hyperparameter: range, first and last value, smallest and largest."""
    lines = []
    for name, specification in specifications.items():
        own = [row[name] for row in values]
        cells = [name, describe_range(specification), *map(describe, [*own[:1], *own[-1:]])]
        cells += map(describe, (min(own), max(own))) if own and specification.is_number else []
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    columns = ("hyperparameter", "range", "first", "last", "smallest", "largest")
    header = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{html.escape(title)}</caption><tr>{header}</tr>{body}</table>"


def describe(value: Value) -> str:
    """A value in at most four digits."""
    return value if isinstance(value, str) else f"{value:.4g}"


def describe_range(specification: Hyperparameter) -> str:
    """The range of a number with its unit, or the choices."""
    if specification.bounds is None:
        return ", ".join(specification.parts)
    low, high = specification.bounds
    unit = f" {specification.unit}" if specification.unit else ""
    return f"{'-∞' if low == -math.inf else describe(low)} to {'∞' if high == math.inf else describe(high)}{unit}"
