"""The JSON form of a schedule: specifications, length of the warm-up, and one line of text for each row."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lightning_stn.arguments import is_whole

FORMAT = "lightning_stn.Schedule"
VERSION = 1
"""Version of the form; raised where an older one has another meaning."""

TAIL = "\n]\n}\n"
"""Ends the text; a row is added in its place."""


class Document(NamedTuple):
    """What the JSON form holds, each part checked for its type only."""

    hyperparameters: Mapping[str, Any]
    warmup: Any
    columns: Sequence[Any]
    rows: Sequence[Any]


_PARTS = {"hyperparameters": dict, "warmup": int | None, "columns": list, "rows": list}


def check_plain(name: str, plain: Mapping[str, Any]) -> None:
    """Check that JSON holds the fields of a hyperparameter.

    Raises:
        ValueError: it does not.
    """
    try:
        _dump(plain)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Schedule: expected the fields of {name!r} to be finite numbers, strings, lists or None, which JSON "
            f"holds, got {plain!r} ({error}); give other fields to its kind."
        ) from error


def head(hyperparameters: Mapping[str, Any], warmup: int | None, columns: Sequence[str]) -> str:
    """All of the text before the rows."""
    parts = {"format": FORMAT, "version": VERSION}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in parts.items()]
    kinds = ",\n".join(f"  {_dump(name)}: {_dump(plain)}" for name, plain in hyperparameters.items())
    lines += [f'"hyperparameters": {{\n{kinds}\n}}', f'"warmup": {_dump(warmup)}', f'"columns": {_dump(columns)}']
    return "{\n" + ",\n".join(lines) + ',\n"rows": ['


def row_text(cells: Sequence[Any], first: bool) -> str:
    """The text of a row; `first` for the first one."""
    return f"{'' if first else ','}\n{_dump(cells)}"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def parse(path: Path, text: str) -> Document:
    """The document in the text of a file.

    Raises:
        ValueError: the text is not JSON, or not a schedule; the message gives the line or the key.
    """
    try:
        found = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        advice = "give the schedule of a run"
        if not text.rstrip().endswith("}"):
            advice = "its end may be cut off: delete the last line and end the text with the lines ] and }"
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); {advice}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the JSON of a schedule ({error}); give the schedule of a run.") from error
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format to be {FORMAT!r}, got {reprlib.repr(found.get('format'))}; give the schedule of "
            "a run."
        )
    if not is_whole(found.get("version"), 1, VERSION):
        raise ValueError(
            f"{path}: expected version to be a whole number up to {VERSION}, got "
            f"{reprlib.repr(found.get('version'))}; read the file with the lightning_stn that wrote it, or a newer one."
        )
    for name, kind in _PARTS.items():
        if name not in found or not isinstance(found[name], kind):
            expected = getattr(kind, "__name__", "int or null")
            raise ValueError(f"{path}: expected {name} as {expected}, got {reprlib.repr(found.get(name))}; correct it.")
    return Document(*(found[name] for name in _PARTS))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys have to differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted({key for key, _ in pairs if [one for one, _ in pairs].count(key) > 1})
        raise ValueError(f"expected each key once, got {reprlib.repr(twice)} twice")
    return found
