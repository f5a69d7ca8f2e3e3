"""The file by which started processes hand their schedule over."""

import copy
import gc
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import LitSmall, fit

from lightning_stn import Float, Schedule, STNCallback
from lightning_stn.callback.handover import Handover
from lightning_stn.schedule import Row

RATE = {"rate": Float(0.0, 1.0)}


def write(handover: Handover, steps: int) -> None:
    """What a started process does."""
    assert handover.file is not None
    rows = [Row(step, 0, {"rate": 0.5}, {"rate": 0.1}) for step in range(steps)]
    Schedule(RATE, rows).save(handover.file)


def started(handover: Handover, steps: int, method: str = "fork") -> None:
    process = multiprocessing.get_context(method).Process(target=write, args=(handover, steps))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_schedule_of_the_last_started_process_is_received() -> None:
    handover = Handover()
    assert handover.receive() is None
    for steps in (3, 2):
        started(handover, steps)
        for _ in range(2):
            received = handover.receive()
            assert received is not None
            assert [row.step for row in received.rows] == list(range(steps))
    handover.forget()
    assert handover.receive() is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("read", [True, False])
def test_file_is_removed_when_it_was_read_or_its_reader_is_gone(read: bool) -> None:
    handover = Handover()
    started(handover, 3)
    path = handover._path
    assert path.exists()
    if read:
        handover.receive()
    else:
        del handover
        gc.collect()
    assert not path.exists()


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copy_in_the_same_process_has_a_file_of_its_own(twice: Callable[[Handover], Handover]) -> None:
    handover = Handover()
    handover._received = Schedule(RATE)
    other = twice(handover)
    assert other._path != handover._path
    assert other.receive() == handover.receive()


def test_process_that_nobody_started_hands_nothing_over() -> None:
    assert Handover().file is None


class Received(Handover):
    """As after a run in started processes."""

    def receive(self) -> Schedule | None:
        return self._received


def test_later_run_in_this_process_replaces_a_schedule_that_was_received(tmp_path: Path) -> None:
    callback: Any = STNCallback(train_steps=1, warmup=0, seed=1)
    with pytest.raises(RuntimeError, match="There is no schedule yet"):
        callback.schedule  # noqa: B018
    callback._handover = Received()
    callback._handover._received = Schedule(RATE)
    assert callback.schedule.names == ("rate",)
    fit(LitSmall(), callback)
    assert callback.schedule.names == ("dropout", "noise", "length")
