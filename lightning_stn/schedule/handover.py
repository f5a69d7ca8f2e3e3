"""The schedule of a run in processes that `trainer.fit` starts, handed over to the process that called it."""

import multiprocessing
import os
import tempfile
import uuid
import weakref
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

from lightning_stn.schedule.schedule import Schedule


class Handover:
    """The schedule of a run, for the process that has called `trainer.fit`.

    With `strategy="ddp_spawn"`, `"ddp_fork"` or `"ddp_notebook"` copies of module and callback train in started
    processes. Lightning brings the weights back from there, but nothing else of them. The started process writes the
    schedule to a temporary file, and the process that started it reads the file.

    Args:
        path: the file; None for a new name.
        reader: the process that reads it; None for this one.
    """

    def __init__(self, path: Path | None = None, reader: int | None = None) -> None:
        self._path = path or Path(tempfile.gettempdir(), f"lightning_stn-{uuid.uuid4().hex}.json")
        self._reader = os.getpid() if reader is None else reader
        self._received: Schedule | None = None
        weakref.finalize(self, _remove, self._path, self._reader)

    def __reduce__(self) -> Any:
        """A process that is being started gets this file; any other copy gets a new one."""
        arguments = () if get_spawning_popen() is None else (self._path, self._reader)
        return Handover, arguments, {"_received": self._received}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handover":
        """A new file, and the same schedule: whoever copies a module to train it on does not change the record."""
        copied = Handover()
        copied._received = self._received
        return copied

    @property
    def file(self) -> Path | None:
        """The file, in a process that was started by the one that reads it; None in any other."""
        parent = multiprocessing.parent_process()
        return None if parent is None or parent.pid != self._reader else self._path

    def keep(self, schedule: Schedule) -> None:
        """Keep the schedule of a run in this process, for `receive`."""
        self._received = schedule

    def receive(self) -> Schedule | None:
        """The schedule of the last run, kept or written by started processes; None if there was no such run."""
        if os.getpid() == self._reader and self._path.exists():
            self._received = Schedule.load(self._path)
            self._path.unlink()
        return self._received

    def forget(self) -> None:
        """Forget the schedule of an earlier run."""
        self._received = None


def _remove(path: Path, reader: int) -> None:
    """Remove a file that was not read, but not from a forked process, which has a copy of the object."""
    if os.getpid() == reader:
        path.unlink(missing_ok=True)
