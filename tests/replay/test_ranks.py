"""Replays on two processes, compared with each other and with one process; `worker.py` defines a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from callback.test_resume import assert_equal_states
from replay.worker import WORKER, Tuned
from strategies.test_strategies import FSDP2
from strategies.worker import BATCHES, EPOCHS, WHOLE_BATCH, dataset, ends, launch
from support import trainer
from torch.utils.data import DataLoader

from lightning_stn import ResumableLoader, Schedule, STNCallback

pytestmark = pytest.mark.slow

SILENT = {"dropout": 0.0}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two processes."""
    folder = tmp_path_factory.mktemp("two")
    noisy = {"noise": 0.3}
    stn = STNCallback(train_steps=1, warmup=0, lr=0.1, seed=1)
    train = ResumableLoader(dataset(0), WHOLE_BATCH)
    trainer(stn, max_epochs=EPOCHS).fit(Tuned(), train, DataLoader(dataset(1), WHOLE_BATCH))
    stn.schedule.save(folder / "schedule.json")
    saved = str(folder / "first" / "step=20.ckpt")
    jobs: list[dict[str, Any]] = [
        {"name": "silent", **SILENT},
        {"name": "file", "values": str(folder / "schedule.json")},
        {"name": "plain", "plain": True, **noisy},
        {"name": "whole", **noisy},
        {"name": "first", "stop": 22, "every": 20, **noisy},
        {"name": "resumed", "checkpoint": saved, "seed": 9, **noisy},
    ]
    assert launch(folder, *jobs, worker=WORKER) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a run on one process, with batches twice as large."""
    folder = tmp_path_factory.mktemp("one")
    assert launch(folder, {"name": "silent", "strategy": "one", **SILENT}, ranks=1, worker=WORKER) == [0]
    (end,) = ends(folder, "silent", ranks=1)
    return end


@pytest.mark.parametrize("name", ["silent", "file", "plain", "whole"])
def test_both_ranks_end_with_the_same_weights_at_the_same_values(two: Path, name: str) -> None:
    first, second = ends(two, name)
    assert_equal_states(first["state"], second["state"])
    assert first["seen"] == second["seen"]
    assert all(first["trains"])
    assert not first["warnings"]


def test_schedule_of_a_tuned_run_has_every_row_in_force_in_new_processes(two: Path) -> None:
    """Recorded and saved here, loaded and replayed there."""
    rows = [row.values for row in Schedule.load(two / "schedule.json").rows]
    assert len(rows) == BATCHES * EPOCHS + 1
    assert len({row["dropout"] for row in rows}) == len(rows)
    for end in ends(two, "file"):
        assert end["seen"] == end["current"] == rows[:-1]


def test_ddp_equals_one_process_on_the_whole_batch(two: Path, one: dict[str, Any]) -> None:
    for end in ends(two, "silent"):
        torch.testing.assert_close(end["state"], one["state"], rtol=0, atol=1e-9)


def test_interrupted_replay_on_two_ranks_continues_bit_for_bit(two: Path) -> None:
    for resumed, whole in zip(ends(two, "resumed"), ends(two, "whole"), strict=True):
        assert_equal_states(resumed["state"], whole["state"])
        assert 0 < len(resumed["seen"]) < len(whole["seen"])
        assert resumed["seen"] == whole["seen"][-len(resumed["seen"]) :]


@FSDP2
def test_fsdp2_equals_one_process_on_the_whole_batch(tmp_path: Path, one: dict[str, Any]) -> None:
    assert launch(tmp_path, {"name": "sharded", "strategy": "fsdp", **SILENT}, worker=WORKER) == [0, 0]
    for end in ends(tmp_path, "sharded"):
        torch.testing.assert_close(end["state"], one["state"], rtol=0, atol=1e-9)
        assert all(end["trains"])
