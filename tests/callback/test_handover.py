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
from lightning_stn.schedule import Row
from lightning_stn.schedule.handover import Handover

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


def test_module_has_the_schedule_of_the_callback_that_trained_it() -> None:
    module = LitSmall()
    with pytest.raises(
        RuntimeError, match=r"Expected LitSmall to be trained by STNCallback.*callbacks=\[STNCallback\("
    ):
        module.schedule  # noqa: B018
    _, callback = fit(module)
    assert module.schedule is callback.schedule
    assert len(module.schedule) == 7
    _, second = fit(module)
    assert module.schedule is second.schedule


def test_copy_of_a_trained_module_has_its_schedule() -> None:
    module = LitSmall()
    fit(module)
    assert copy.deepcopy(module).schedule is module.schedule
    assert pickle.loads(pickle.dumps(module)).schedule == module.schedule


def test_module_shows_its_schedule_while_it_trains() -> None:
    class Watches(LitSmall):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            rows.append(len(self.schedule))

    rows: list[int] = []
    fit(Watches(), max_epochs=1)
    assert rows == [2, 3, 4]


def test_module_that_a_checkpoint_resumes_has_the_whole_schedule(tmp_path: Path) -> None:
    run, callback = fit(LitSmall())
    run.save_checkpoint(tmp_path / "last.ckpt")
    module, second = LitSmall(), STNCallback(train_steps=2, warmup=0, lr=0.05, seed=1)
    fit(module, second, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert module.schedule is second.schedule
    assert module.schedule.rows[:7] == callback.schedule.rows
    assert len(module.schedule) == 10


def test_run_that_fails_before_its_first_batch_leaves_no_schedule_of_an_earlier_one() -> None:
    module = LitSmall()
    fit(module)
    with pytest.raises(ValueError, match="limit_val_batches"):
        fit(module, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="trained by STNCallback"):
        module.schedule  # noqa: B018


def test_later_run_in_this_process_replaces_a_schedule_that_was_received(tmp_path: Path) -> None:
    callback: Any = STNCallback(train_steps=1, warmup=0, seed=1)
    with pytest.raises(RuntimeError, match="There is no schedule yet"):
        callback.schedule  # noqa: B018
    callback._handover = Received()
    callback._handover._received = Schedule(RATE)
    assert callback.schedule.names == ("rate",)
    fit(LitSmall(), callback)
    assert callback.schedule.names == ("dropout", "noise", "length")
