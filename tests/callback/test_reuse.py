"""A callback that serves several runs: folds and seeds begin anew, a Trainer that goes on continues."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import LitSmall, loader, trainer

from lightning_stn import Schedule, STNCallback


def build(seed: int = 0) -> LitSmall:
    torch.manual_seed(seed)
    return LitSmall()


def callback() -> STNCallback:
    return STNCallback(train_steps=2, warmup=3, lr=0.05, seed=1)  # epochs


def fit(stn: STNCallback, module: LitSmall, epochs: int = 5, **settings: Any) -> L.Trainer:
    run = trainer(stn, max_epochs=epochs, **settings)
    torch.manual_seed(1)
    run.fit(module, loader(24), loader(16, seed=1))
    return run


def test_second_run_of_a_callback_is_that_of_a_new_one() -> None:
    used, fresh = callback(), callback()
    fit(used, build(5))
    ours, theirs = build(), build()
    fit(used, ours)
    fit(fresh, theirs)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert used.schedule.rows == fresh.schedule.rows
    assert used.schedule.rows[0].step == 0
    assert used.phases == fresh.phases


def test_second_run_after_one_that_failed_begins_anew() -> None:
    class Fails(LitSmall):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.current_epoch == 4:
                raise RuntimeError("stop")

    used, fresh = callback(), callback()
    with pytest.raises(RuntimeError, match="stop"):
        fit(used, Fails())
    ours, theirs = build(), build()
    fit(used, ours)
    fit(fresh, theirs)
    assert torch.equal(ours.hyperparameters.unconstrained, theirs.hyperparameters.unconstrained)
    assert used.schedule.rows == fresh.schedule.rows


def test_trainer_that_goes_on_keeps_the_schedule_and_all_states(tmp_path: Any) -> None:
    stn, module = callback(), build()
    run = fit(stn, module, 4, logger=CSVLogger(tmp_path))
    before = list(stn.schedule.rows)
    steps = stn._phase.optimizer.optimizer.state_dict()["state"][0]["step"]
    run.fit_loop.max_epochs = 6
    run.fit(module, loader(24), loader(16, seed=1))
    rows = stn.schedule.rows
    assert rows[: len(before)] == before
    assert [row.step for row in rows] == sorted({row.step for row in rows})
    assert rows[-1].step == 18
    assert Schedule.load(tmp_path / "lightning_logs/version_0/schedule.json") == stn.schedule
    assert stn._phase.optimizer.optimizer.state_dict()["state"][0]["step"] > steps
    assert stn._phase.stream.consumed == stn._phase.optimizer.optimizer.state_dict()["state"][0]["step"]


def test_trainer_that_goes_on_with_another_module_begins_a_schedule() -> None:
    stn = callback()
    run = fit(stn, build(), 4)
    run.fit_loop.max_epochs = 6
    run.fit(build(1), loader(24), loader(16, seed=1))
    assert stn.schedule.rows[0].step == 0


def test_checkpoint_counts_for_a_callback_that_was_used(tmp_path: Any) -> None:
    whole, first, second = callback(), callback(), callback()
    expected, ours = build(), build()
    fit(whole, expected, 6)
    run = fit(first, ours, 4)
    path = tmp_path / "four.ckpt"
    run.save_checkpoint(path)
    fit(second, build(7))
    resumed = build(9)
    again = trainer(second, max_epochs=6)
    again.fit(resumed, loader(24), loader(16, seed=1), ckpt_path=path)
    assert [row.step for row in second.schedule.rows] == [row.step for row in whole.schedule.rows]
    assert second.schedule.rows[: len(first.schedule.rows) - 1] == first.schedule.rows[:-1]
