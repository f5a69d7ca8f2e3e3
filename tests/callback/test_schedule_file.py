"""`schedule.json` under a full disk and in the hands of others: the run goes on, and the file is whole at its end."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support import LitSmall, fit, loader, trainer

from lightning_stn import Float, Schedule, STNCallback
from lightning_stn.callback.schedule_file import ScheduleFile
from lightning_stn.schedule import Row


def add_rows(schedule: Schedule, count: int = 1) -> None:
    for _ in range(count):
        step = len(schedule.rows)
        schedule.append(Row(step, 0, {"rate": step / 7}, {"rate": 0.5}))


@pytest.fixture
def schedule() -> Schedule:
    schedule = Schedule({"rate": Float(0.0, None, init=1.0)})
    add_rows(schedule, 3)
    return schedule


@pytest.fixture
def file(tmp_path: Path, schedule: Schedule) -> ScheduleFile:
    """A file of three rows in a new folder."""
    file = ScheduleFile(tmp_path / "log" / "schedule.json", schedule)
    file.update()
    return file


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_are_appended(file: ScheduleFile, schedule: Schedule, tmp_path: Path) -> None:
    path = tmp_path / "log" / "schedule.json"
    node = path.stat().st_ino
    for _ in range(3):
        add_rows(schedule)
        file.update()
        assert Schedule.load(path) == schedule
    assert path.stat().st_ino == node
    assert os.listdir(path.parent) == ["schedule.json"]


@pytest.mark.parametrize("room", [0, 10, 100])
def test_full_disk_is_reported_once_and_the_file_is_whole_when_there_is_space(
    file: ScheduleFile, schedule: Schedule, tmp_path: Path, room: int
) -> None:
    path = tmp_path / "log" / "schedule.json"
    size = path.stat().st_size

    def add_and_write() -> None:
        for _ in range(10):
            add_rows(schedule)
            file.update()

    with full_disk(size + room), pytest.warns(UserWarning, match="cannot be written") as caught:
        add_and_write()
    assert len(caught) == 1
    assert "free space" in str(caught[0].message)
    assert os.listdir(path.parent) == ["schedule.json"]
    add_rows(schedule)
    file.update()
    assert Schedule.load(path) == schedule


def truncate(path: Path) -> None:
    os.truncate(path, 40)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def replace_by_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere.csv")


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        truncate,
        overwrite,
        replace_by_a_link,
        replace_by_a_pipe,
        remove_folder,
        lambda path: path.write_text("other"),
        lambda path: path.write_text(path.read_text() + "1,0"),
    ],
)
def test_file_that_others_spoil_is_restored(
    file: ScheduleFile, schedule: Schedule, tmp_path: Path, spoil: Callable[[Path], Any]
) -> None:
    path = tmp_path / "log" / "schedule.json"
    (tmp_path / "elsewhere.csv").write_text("mine")
    spoil(path)
    add_rows(schedule)
    file.update()
    assert Schedule.load(path) == schedule
    assert not path.is_symlink()
    assert (tmp_path / "elsewhere.csv").read_text() == "mine"


@pytest.mark.parametrize("name", ["schedule.json.new", "schedule.json"])
def test_links_are_not_followed(schedule: Schedule, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / name).symlink_to(target)
    ScheduleFile(folder / "schedule.json", schedule).update()
    assert target.read_text() == "mine"
    assert os.listdir(folder) == ["schedule.json"]
    assert Schedule.load(folder / "schedule.json") == schedule


class SwapFolder(L.Callback):
    """Puts a file in the place of the log folder for some batches, so that nothing can be written there."""

    def __init__(self, folder: Path, batches: range) -> None:
        self.folder = folder
        self.batches = batches

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batches.start:
            self.folder.rename(self.folder.with_suffix(".away"))
            self.folder.write_text("")
        elif trainer.global_step == self.batches.stop:
            self.folder.unlink()
            self.folder.with_suffix(".away").rename(self.folder)


class ElsewhereCSVLogger(CSVLogger):
    """Writes no metrics, so that `schedule.json` alone is in its folder."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def save(self) -> None:
        pass


def test_run_goes_on_while_its_schedule_cannot_be_written(tmp_path: Path) -> None:
    logger = ElsewhereCSVLogger(tmp_path, name="run", version=0)
    folder = Path(logger.log_dir)
    stn = STNCallback(train_steps=2, warmup=0, lr=0.05, seed=1)
    run = trainer(stn, SwapFolder(folder, range(2, 4)), logger=logger)
    with pytest.warns(UserWarning, match="The run goes on and keeps its schedule") as caught:
        run.fit(LitSmall(), loader(24), loader(16, seed=1))
    assert sum("cannot be written" in str(warning.message) for warning in caught) == 1
    assert run.global_step == 6
    assert Schedule.load(folder / "schedule.json") == stn.schedule


@pytest.mark.filterwarnings("ignore:.*ckpt_path")
def test_exception_checkpoint_is_written_while_the_schedule_cannot_be(tmp_path: Path) -> None:
    class Fails(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 4:
                raise ZeroDivisionError
            return super().training_loss(batch, batch_idx)

    logger = ElsewhereCSVLogger(tmp_path / "logs", name="run", version=0)
    stn = STNCallback(train_steps=2, warmup=0, lr=0.05, seed=1)
    swap = SwapFolder(Path(logger.log_dir), range(2, 9))
    run = trainer(stn, swap, OnExceptionCheckpoint(tmp_path, "failed"), logger=logger, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="cannot be written"), pytest.raises(ZeroDivisionError):
        run.fit(Fails(), loader(24), loader(16, seed=1))
    assert (tmp_path / "failed.ckpt").exists()
    assert [row.step for row in stn.schedule.rows] == [0, 1, 2, 3, 4]


def test_whole_run_writes_the_same_file_as_its_schedule_saves(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0)
    _, stn = fit(LitSmall(), logger=logger)
    stn.schedule.save(tmp_path / "saved.json")
    assert (Path(logger.log_dir) / "schedule.json").read_bytes() == (tmp_path / "saved.json").read_bytes()
