"""`schedule.json` of a run: a side file, which never ends the run that it describes."""

import os
import stat
import warnings
from pathlib import Path

from lightning_stn.schedule import Row, Schedule
from lightning_stn.schedule.json_form import TAIL, row_text
from lightning_stn.schedule.text_file import ENCODING


class ScheduleFile:
    """Keeps a file equal to a schedule, as long as the file can be written; it is whole JSON after each update.

    New rows take the place of the end of the text, which follows them. Where that fails, or the file is no longer what
    this object left (deleted, replaced, truncated, a link), or the schedule is no longer a longer one (it was thinned,
    or its warm-up has ended), the whole file is written. What cannot be written stays in the schedule; one warning says
    so.

    Args:
        path: the file; its folder is made where it is missing. Links are replaced and never followed.
        schedule: the rows, in memory.
    """

    def __init__(self, path: Path, schedule: Schedule) -> None:
        self._path = path
        self._schedule = schedule
        self._left: tuple[int, ...] | None = None
        self._warmup: int | None = None
        self._written = 0
        self._last: Row | None = None
        self._warned = False

    def update(self) -> None:
        """Write what the file lacks; warn, once, where that fails."""
        try:
            if self._is_as_left() and self._continues():
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

    def _continues(self) -> bool:
        """Whether the schedule begins with all that the file holds."""
        rows = self._schedule.rows
        if len(rows) < self._written or self._warmup != self._schedule.warmup:
            return False
        return not self._written or rows[self._written - 1] is self._last

    def _append(self) -> None:
        rows = self._schedule.rows[self._written :]
        if not rows:
            return
        cells = map(self._schedule.cells, rows)
        text = "".join(row_text(one, first=not self._written and not index) for index, one in enumerate(cells))
        self._left = None  # until all of it is written
        with open(self._path, "r+b", buffering=0, opener=_open_without_following) as file:
            end = os.fstat(file.fileno()).st_size - len(TAIL)
            try:
                file.seek(end)
                _write(file.fileno(), (text + TAIL).encode(ENCODING))
            except OSError:  # the text before was whole, and fits
                file.truncate(end)
                file.seek(end)
                _write(file.fileno(), TAIL.encode(ENCODING))
                raise
        self._note()

    def _replace(self) -> None:
        """Write the whole file in one go: killed at any moment, the file is the one before or the new one."""
        self._left = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f"{self._path.name}.new")
        new.unlink(missing_ok=True)  # of a run that was killed, or a link
        try:
            with open(new, "x", newline="", encoding=ENCODING) as file:
                self._schedule.write_json(file)
            os.replace(new, self._path)
        except OSError:
            new.unlink(missing_ok=True)  # leaves the space to others
            raise
        self._note()

    def _note(self) -> None:
        """Remember the file, which now holds the whole schedule."""
        rows = self._schedule.rows
        self._written, self._last, self._warmup = len(rows), rows[-1] if rows else None, self._schedule.warmup
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


def _write(descriptor: int, content: bytes) -> None:
    """Write all bytes, which one call may not do where space runs out."""
    while content:
        content = content[os.write(descriptor, content) :]


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes where a file is replaced, truncated or written to."""
    return stat.S_IFMT(status.st_mode), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_without_following(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
