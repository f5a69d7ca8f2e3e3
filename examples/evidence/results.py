"""The file of results: one run a line, in JSON, appended as soon as the run has ended.

| field | meaning |
|---|---|
| `task`, `what`, `seed`, `trial` | the key of the run; `trial` is 0 but for searches |
| `hyperparameters` | the constants of a plain run, or the start values of a converted one, natural units |
| `settings`, `response` | arguments of `STNCallback`, and of `STNModule`; of a converted run only |
| `correlation` | median correlation over the run between the hypergradients of two hyperparameters |
| `first_direction` | share of the first principal direction of these correlations |
| `hypergradient` | mean and standard deviation over the run of each hypergradient, unconstrained units |
| `epochs`, `pruned` | length of a whole run, and whether a pruner ended this one early |
| `best_epoch`, `best_val_loss`, `last_val_loss` | lowest validation loss, its epoch, and the loss of the last epoch |
| `test` | loss and metric on the test data at the best epoch, read once; None if no validation loss was finite |
| `cpu_seconds` | of training on one thread, validation included, test excluded |
| `machine` | label of the machine; seconds of two machines cannot be compared |
| `curve` | for each epoch its number, its validation loss, and the CPU seconds so far |
| `values_at_best`, `final` | hyperparameters at the best and after the last epoch; None for a plain run |
| `versions`, `date` | versions of the packages, commit of the clone, and day of the run |

The unit of cost is one plain run of the same task without regularisation, `none`, on the same machine. So `none` may
stand in the file once for each machine.
"""

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
"""The fields of one run; `training.Run` and `run.train` write them."""


class Key(NamedTuple):
    """What identifies a run."""

    task: str
    what: str
    seed: int
    trial: int = 0


def key(row: Row) -> Key:
    """The key of a row."""
    return Key(row["task"], row["what"], row["seed"], row["trial"])


UNIT = "none"
"""The entry whose runs are the unit of cost."""


def lines(path: Path) -> list[Row]:
    """All runs in the file; a line that was cut off while it was written is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read(path: Path) -> dict[Key, Row]:
    """The first run of each key; `unit` is the mean of `cpu_seconds` of its plain runs, None if there are none."""
    found = lines(path)
    seconds: dict[tuple[str, str], list[float]] = {}
    for row in found:
        if row["what"] == UNIT:
            seconds.setdefault((row["task"], machine(row)), []).append(row["cpu_seconds"])
    rows: dict[Key, Row] = {}
    for row in found:
        plain = seconds.get((row["task"], machine(row)))
        rows.setdefault(key(row), {**row, "unit": statistics.mean(plain) if plain else None})
    return rows


def machine(row: Row) -> str:
    """The label of the machine, empty where none was given."""
    return str(row.get("machine", ""))


def plain_runs(row: Row, seconds: float | None = None) -> float:
    """The cost of a run, or of some seconds of it, in plain runs; nan if their cost on its machine is not known."""
    seconds = row["cpu_seconds"] if seconds is None else seconds
    return float(seconds / row["unit"]) if row["unit"] else math.nan


def append(path: Path, row: Row) -> None:
    """Append a run, and return when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_finite(row)) + "\n"
    with open(path, "a+b") as file:
        if file.tell() and _last_byte(file) != b"\n":
            line = "\n" + line  # a run was cut off within its line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    byte: bytes = file.read(1)
    return byte


def _finite(value: Any) -> Any:
    """Numbers that JSON has not, as None."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trials(rows: Iterable[Row], task: str, what: str, seed: int) -> list[Row]:
    """Runs of one search, in the order of their trials, up to the first that is missing."""
    own = {row["trial"]: row for row in rows if (row["task"], row["what"], row["seed"]) == (task, what, seed)}
    return list(_consecutive(own))


def _consecutive(own: dict[int, Row]) -> Iterator[Row]:
    number = 0
    while number in own:
        yield own[number]
        number += 1
