"""The CSV form of a schedule: steps, values and scales, without ranges and losses."""

import csv
import io
import itertools
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

SCALE = "_scale"
"""Ends the name of a column of scales."""


def write(columns: Sequence[str], rows: Iterable[Sequence[Any]], file: TextIO) -> None:
    """Write header and rows."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)


def read(path: Path, text: str) -> tuple["Header", list[tuple[int, list[str]]]]:
    """Header and rows of the text of a file, each row with the number of its last line.

    Raises:
        ValueError: the text is not that of a schedule; the message gives the line.
    """
    lines = list(_read_lines(path, text))
    columns = lines[0][1] if lines else []
    header = read_header(columns)
    if header is None:
        raise ValueError(
            f"{path}: expected the columns step, epoch, <name>..., <name>_scale... (<name>_<choice>_scale for each "
            f"choice of a categorical hyperparameter), got {reprlib.repr(columns)}; give the schedule of a run."
        )
    return header, lines[1:]


def _read_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Cells of each row, with the number of the row's last line.

    Raises:
        ValueError: the text is not CSV, or its last line has no end.
    """
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
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error}); give the schedule of a run.") from error


_Labels = dict[str, tuple[str, ...]]


Header = tuple[tuple[str, ...], _Labels, _Labels]
"""Names, choices by name, and parts by name."""


def read_header(header: Sequence[str]) -> Header | None:
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
    if not column.endswith(SCALE):
        return None
    label = column.removesuffix(SCALE)
    ends = (match.start() for match in re.finditer(r"[_.](?=.)", label, re.DOTALL))
    for end in (len(label), *reversed(list(ends))):
        if places.get(label[:end], count) < count:
            return places[label[:end]], label[end:]
    return None
