"""A recorded run that is replayed; runs of other lengths; what loggers and `values` show."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from callback.test_loggers import Remembers
from lightning.pytorch.loggers import CSVLogger
from replay.cases import KINDS, Named, Watch, fit, recorded
from support import LitSmall, loader, trainer

from lightning_stn import Categorical, Gaussian, Schedule, ScheduleReplay, STNCallback
from lightning_stn.schedule import Row


def test_replay_of_a_tuned_run_has_the_values_of_every_row_in_force(tmp_path: Path) -> None:
    stn = STNCallback(train_steps=1, warmup=0, lr=0.1, seed=1)
    trainer(stn).fit(LitSmall(), loader(24), loader(16, seed=1))
    stn.schedule.save(tmp_path / "schedule.json")
    replay, module = ScheduleReplay(tmp_path / "schedule.json"), LitSmall()
    watch = Watch(lambda module: (replay.values, module.hyperparameters.values()))
    fit(module, replay, watch)
    rows = [row.values for row in stn.schedule.rows]
    assert len({row["dropout"] for row in rows}) == len(rows) == 7
    assert [*watch.seen, (replay.values, module.hyperparameters.values())] == [(row, row) for row in rows]


@pytest.mark.parametrize(
    ("recorded_over", "steps"), [(6, [0, 1, 2, 3, 4, 5]), (12, [0, 2, 4, 6, 8, 10]), (3, [0, 0, 1, 1, 2, 2])]
)
def test_run_of_another_length_reads_the_schedule_at_its_share(recorded_over: int, steps: list[int]) -> None:
    schedule = recorded(recorded_over)
    replay = ScheduleReplay(schedule)
    watch = Watch(lambda _: replay.values)
    fit(Named(), replay, watch)
    assert watch.seen == [schedule.rows[step].values for step in steps]
    assert replay.values == schedule.final


def test_run_limited_by_steps_is_stretched_to_them() -> None:
    replay = ScheduleReplay(recorded(8))
    watch = Watch(lambda _: replay.values)
    fit(Named(), replay, watch, max_epochs=-1, max_steps=4)
    assert watch.seen == [recorded(8).rows[step].values for step in (0, 2, 4, 6)]


def test_run_of_unknown_length_says_so_and_replays_by_step() -> None:
    replay = ScheduleReplay(recorded(4))
    watch = Watch(lambda _: replay.values)
    with pytest.warns(UserWarning, match=r"length of this run is not known.*stretch=False"):
        fit(Named(), replay, watch, _Ends(6), max_epochs=-1)
    assert watch.seen == [recorded(4).rows[step].values for step in (0, 1, 2, 3, 4, 4)]


class _Ends(L.Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.batches


@pytest.mark.parametrize("values", [recorded(4), {"dropout": 0.3, "length": 2}])
def test_run_of_unknown_length_is_silent_where_length_does_not_matter(values: Any) -> None:
    stretch = isinstance(values, dict)
    fit(Named(), ScheduleReplay(values, stretch=stretch), _Ends(3), max_epochs=-1)


def test_fast_dev_run_replays_the_first_row() -> None:
    replay = ScheduleReplay(recorded(6))
    watch = Watch(lambda _: replay.values)
    fit(Named(), replay, watch, fast_dev_run=True)
    assert watch.seen == [recorded(6).rows[0].values]


def test_values_before_a_run_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"set while trainer\.fit runs"):
        _ = ScheduleReplay({"dropout": 0.3}).values


def test_callback_that_is_used_again_begins_anew() -> None:
    replay = ScheduleReplay(recorded(6))
    watch = Watch(lambda _: replay.values)
    for _ in range(2):
        fit(Named(), replay, watch)
    assert watch.seen[:6] == watch.seen[6:] == [row.values for row in recorded(6).rows[:6]]


def test_second_fit_of_a_trainer_goes_on() -> None:
    replay, module = ScheduleReplay(recorded(6), stretch=False), Named()
    watch = Watch(lambda _: replay.values)
    run = fit(module, replay, watch, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(24), loader(16, seed=1))
    assert watch.seen == [row.values for row in recorded(6).rows[:6]]


def test_loggers_get_the_values_in_force_at_the_steps_of_a_recorded_run() -> None:
    recording, replaying = Remembers(), Remembers()
    stn = STNCallback(train_steps=1, warmup=0, lr=0.1, seed=1)
    trainer(stn, logger=[recording]).fit(LitSmall(), loader(24), loader(16, seed=1))
    fit(LitSmall(), ScheduleReplay(stn.schedule), logger=[replaying])
    for name in stn.schedule.names:
        tag = f"stn/value/{name}"
        ours, theirs = ([(s, m[tag]) for s, m in memory.points if tag in m] for memory in (replaying, recording))
        assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(7))
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=1e-6)


def test_loggers_get_values_every_few_steps_and_at_the_end() -> None:
    memory = Remembers()
    fit(Named(), ScheduleReplay(recorded(6)), logger=[memory], log_every_n_steps=4)
    points = [(step, metrics["stn/value/length"]) for step, metrics in memory.points if "stn/value/length" in metrics]
    assert points == [(step, recorded(6).rows[step].values["length"]) for step in (0, 4, 6)]


def test_loggers_count_the_steps_of_accumulated_batches() -> None:
    memory = Remembers()
    fit(Named(), ScheduleReplay(recorded(6)), logger=[memory], accumulate_grad_batches=2)
    points = [(step, metrics["stn/value/length"]) for step, metrics in memory.points if "stn/value/length" in metrics]
    assert points == [(0, 0), (1, 2), (2, 3), (3, 0), (4, 1)]


def test_loggers_get_noisy_values_and_the_index_of_a_choice(tmp_path: Path) -> None:
    memory = Remembers()
    values = {**KINDS, "operation": Categorical(("none", "mirror"), init="mirror")}
    replay = ScheduleReplay(values, noise=Gaussian(0.01), attributes={"operation": "operation"})
    watch = Watch(lambda _: replay.values)
    module = Named()
    module.operation = "none"
    fit(module, replay, watch, logger=[memory, CSVLogger(tmp_path)])
    logged = [metrics for _, metrics in memory.points if "stn/value/operation" in metrics]
    assert [metrics["stn/value/dropout"] for metrics in logged[:6]] == [values["dropout"] for values in watch.seen]
    assert {metrics["stn/value/operation"] for metrics in logged} == {1}
    assert "stn/value/operation" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_last_values_are_without_noise() -> None:
    replay, module = ScheduleReplay(recorded(6), noise=Gaussian()), Named()
    fit(module, replay)
    assert replay.values == recorded(6).final


def test_values_that_nothing_reads_are_listed_in_a_warning() -> None:
    schedule = Schedule({**KINDS, "idle": KINDS["length"]})
    schedule.append(
        Row(0, 0, {"dropout": 0.3, "length": 1, "idle": 2}, dict.fromkeys(("dropout", "length", "idle"), 1.0))
    )
    with pytest.warns(UserWarning, match=r"nothing reads \['idle'\]"):
        fit(Named(), ScheduleReplay(schedule))
