"""Cells of a row, as they stand in a file: numbers, or their text."""

import contextlib
import math
import re
import reprlib
from typing import Any


def number(column: str, cell: Any) -> float:
    """A cell as a finite number: an int if it is written as one, otherwise a float.

    Raises:
        ValueError: the cell is not a finite number.
    """
    found = cell
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(cell, str):
            found = int(cell) if re.fullmatch(r"-?[0-9]+", cell) else float(cell)
        if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
            return found
    raise ValueError(f"Expected {column} to be a finite number, got {reprlib.repr(cell)}; correct the cell.")


def number_or_none(column: str, cell: Any) -> float | None:
    """A cell as a finite float, or None where there is none.

    Raises:
        ValueError: the cell is neither.
    """
    return None if cell is None else float(number(column, cell))


def whole_number(column: str, cell: Any) -> int:
    """A cell as a whole number of at least 0.

    Raises:
        ValueError: the cell is not one.
    """
    found = number(column, cell)
    if found < 0 or not isinstance(found, int):
        raise ValueError(
            f"Expected {column} to be a whole number of at least 0, got {reprlib.repr(cell)}; correct the cell."
        )
    return found
