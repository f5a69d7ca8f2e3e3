"""`schedule.csv` of a run: a side file, which never ends the run that it describes."""

import csv
import os
import stat
import warnings
from pathlib import Path
from typing import Any

from lightning_stn.schedule import ENCODING, Schedule


class ScheduleFile:
    """Keeps a file equal to a schedule, as long as the file can be written.

    New rows are appended. Where that fails, or the file is no longer what this object left (deleted, replaced,
    truncated, a link), the next update writes the whole file. What cannot be written stays in the schedule; one warning
    says so.

    Args:
        path: the file; its folder is made where it is missing. Links are replaced and never followed.
        schedule: the rows, in memory.
    """

    def __init__(self, path: Path, schedule: Schedule) -> None:
        self._path = path
        self._schedule = schedule
        self._left: tuple[int, ...] | None = None
        self._written = 0
        self._warned = False

    def update(self) -> None:
        """Write the rows that the file lacks; warn, once, where that fails."""
        try:
            if self._is_as_left():
                self._append()
            else:
                self._replace()
        except OSError as error:
            self._warn(error)

    def _is_as_left(self) -> bool:
        """Whether the file is the one that the last update finished."""
        try:
            return self._left is not None and _identity(os.lstat(self._path)) == self._left
        except OSError:
            return False

    def _append(self) -> None:
        rows = self._schedule.rows[self._written :]
        if not rows:
            return
        self._left = None  # until all of it is written
        with open(self._path, "a", newline="", encoding=ENCODING, opener=_open_without_following) as file:
            csv.writer(file, lineterminator="\n").writerows(map(self._schedule.cells, rows))
        self._note()

    def _replace(self) -> None:
        """Write the whole file in one go: killed at any moment, the file is the one before or the new one."""
        self._left = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f"{self._path.name}.new")
        new.unlink(missing_ok=True)  # of a run that was killed, or a link
        try:
            with open(new, "x", newline="", encoding=ENCODING) as file:
                self._schedule.write(file)
            os.replace(new, self._path)
        except OSError:
            new.unlink(missing_ok=True)  # leaves the space to others
            raise
        self._note()

    def _note(self) -> None:
        """Remember the file, which now holds all rows."""
        self._written = len(self._schedule.rows)
        self._left = _identity(os.lstat(self._path))

    def _warn(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self._path} cannot be written ({error}). The run goes on and keeps its schedule in memory and in its "
            "checkpoints, and writes the whole file as soon as that succeeds; free space, or restore the folder. "
            "STNCallback.schedule.save(path) saves it elsewhere.",
            stacklevel=2,
        )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes where a file is replaced, truncated or written to."""
    return stat.S_IFMT(status.st_mode), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_without_following(path: Any, flags: int) -> int:
    return os.open(path, (flags & ~os.O_CREAT) | getattr(os, "O_NOFOLLOW", 0))
