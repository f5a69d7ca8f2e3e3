"""A schedule of a long run is thinned, so that checkpoints and the file stay small."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from support import LitSmall, loader, trainer

from lightning_stn import Float, HyperparameterSet, ResumableLoader, Schedule, STNCallback
from lightning_stn.callback import record


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_ROWS", 8)


def train(folder: Path, epochs: int, checkpoint: Path | None = None) -> tuple[L.Trainer, STNCallback, LitSmall]:
    """Three batches in an epoch, a record after each."""
    L.seed_everything(0, verbose=False)
    logger = CSVLogger(folder, name="run", version=0)
    stn, module = STNCallback(train_steps=2, warmup=1, lr=0.05, anneal=False, seed=1), LitSmall()
    run = trainer(stn, logger=logger, max_epochs=epochs)
    batches = ResumableLoader(loader(24).dataset, batch_size=8, shuffle=True, seed=0)
    run.fit(module, batches, loader(16, seed=1), ckpt_path=checkpoint)
    return run, stn, module


def steps(stn: STNCallback) -> list[int]:
    return [row.step for row in stn.schedule.rows]


def test_rows_stay_few_evenly_spaced_and_reach_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    _, stn, module = train(tmp_path, 9)
    assert steps(stn) == [0, 4, 8, 12, 16, 20, 24, 27]
    assert stn.schedule.rows[-1].values == module.hyperparameters.values()
    assert Schedule.load(tmp_path / "run" / "version_0" / "schedule.json") == stn.schedule
    assert stn.schedule.warmup == 5


@pytest.mark.parametrize("epochs", range(1, 9))
@pytest.mark.filterwarnings("ignore:.*ends before its first hyperparameter step")
def test_resumed_run_has_the_rows_of_one_run(tmp_path: Path, epochs: int) -> None:
    _, whole, _ = train(tmp_path / "whole", 9)
    first, _, _ = train(tmp_path / "first", epochs)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, stn, _ = train(tmp_path / "second", 9, tmp_path / "half.ckpt")
    assert stn.schedule == whole.schedule
    assert Schedule.load(tmp_path / "second" / "run" / "version_0" / "schedule.json") == whole.schedule


def test_loggers_get_every_record(tmp_path: Path) -> None:
    train(tmp_path, 9)
    lines = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("stn/value/dropout")
    assert sum(bool(line.split(",")[column]) for line in lines[1:]) == 28


def test_state_of_version_1_continues(tmp_path: Path) -> None:
    from lightning_stn.callback.saved_state import check_state, migrated

    _, stn, module = train(tmp_path, 3)
    state: dict[str, Any] = stn.state_dict()
    state["version"] = 1
    plain = len(stn.schedule.csv_columns)
    state["record"] = {name: state["record"][name] for name in ("steps", "completes", "means", "summarised")}
    state["record"]["rows"] = [stn.schedule.cells(row)[:plain] for row in stn.schedule.rows]
    state["surroundings"] = {"generators": [], "metrics": {}, "loaders": [], "gradients": {}, "inexact": ""}
    del state["version"]
    check_state(state, module.hyperparameters, {})
    upgraded = migrated(state)
    assert upgraded["record"]["last"] == state["record"]["rows"][-1]
    other = STNCallback(train_steps=2, warmup=1, lr=0.05, anneal=False, seed=1)
    other.load_state_dict(state)
    trainer(other, max_epochs=2).fit(module, loader(24), loader(16, seed=1))
    kept = [row for row in other.schedule.rows if row.step <= 9]
    assert [(row.step, row.values) for row in kept] == [(row.step, row.values) for row in stn.schedule.rows[::2]]
    assert other.schedule.rows[-1].step == 15


@pytest.mark.parametrize(("count", "rows"), [(1, 4096), (60, 4096), (256, 1016), (3000, 256)])
def test_wider_schedules_have_fewer_rows(monkeypatch: pytest.MonkeyPatch, count: int, rows: int) -> None:
    monkeypatch.setattr(record, "MOST_ROWS", 4096)
    hyperparameters = HyperparameterSet({f"rate{index}": Float(0.0, 1.0) for index in range(count)})
    assert record.Recorder(hyperparameters, None)._most_rows == rows  # type: ignore[arg-type]
