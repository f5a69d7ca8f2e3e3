"""What the progress bar shows of a run, and what it leaves alone."""

from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from support import LitSmall, fit, loader, random_gates, trainer

from lightning_stn import Float, ScheduleReplay, STNCallback
from lightning_stn.callback.bar import MOST

NAMES = ("dropout", "noise", "length")


class Bar(ProgressBar):
    """Keeps what it would show after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, Any]] = []

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {"own": 1.0, **super().get_metrics(*arguments)}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.shown.append(self.get_metrics(trainer, pl_module))


class Fails(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise KeyError("interrupted")


def run_with(module: LitSmall, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    run = trainer(STNCallback(train_steps=2, warmup=0, lr=0.05), *callbacks, enable_progress_bar=True, **settings)
    run.fit(module, loader(24), loader(16, seed=1))
    return run


def test_bar_shows_the_current_values_and_keeps_those_of_the_user() -> None:
    module, bar = LitSmall(), Bar()
    random_gates(module, 0.1)
    run_with(module, bar, max_epochs=3)
    assert {name: bar.shown[-1][name] for name in NAMES} == pytest.approx(module.hyperparameters.values())
    assert bar.shown[0]["dropout"] != bar.shown[-1]["dropout"]
    assert all(shown["own"] == 1.0 for shown in bar.shown)


def test_values_on_the_bar_reach_no_metric_and_no_logger() -> None:
    run = run_with(LitSmall(), Bar())
    assert not set(NAMES) & {*run.callback_metrics, *run.progress_bar_metrics, *run.logged_metrics}


def test_bar_is_as_before_when_the_run_is_over() -> None:
    bar = Bar()
    run = run_with(module := LitSmall(), bar)
    assert bar.get_metrics(run, module).keys() & {"own", *NAMES} == {"own"}
    assert "get_metrics" not in vars(bar)


def test_bar_is_as_before_after_an_exception() -> None:
    bar = Bar()
    with pytest.raises(KeyError, match="interrupted"):
        run_with(LitSmall(), bar, Fails())
    assert "get_metrics" not in vars(bar)


def test_what_others_have_put_on_a_bar_stays() -> None:
    bar = TQDMProgressBar()
    before = vars(bar)["get_metrics"] = lambda *_: {"other": 2.0}
    run_with(LitSmall(), bar)
    assert vars(bar)["get_metrics"] is before


@pytest.mark.filterwarnings("ignore:Nothing read the hyperparameters")
def test_of_many_hyperparameters_the_first_are_shown() -> None:
    names = [f"rate{n}" for n in range(MOST + 3)]
    hyperparameters = {"dropout": Float(0.0, 0.9), "noise": Float(0.0, 1.0), "length": Float(0.0, 4.0)}
    bar = Bar()
    run_with(LitSmall({**hyperparameters, **{name: Float(0.0, 1.0) for name in names}}), bar)
    assert bar.shown[0].keys() & {*hyperparameters, *names} == {*hyperparameters, *names[: MOST - 3]}


def test_run_without_a_bar_shows_nothing() -> None:
    run, callback = fit(LitSmall())
    assert run.progress_bar_callback is None
    assert len(callback.schedule.rows) > 1


def test_bar_shows_the_values_of_a_replay() -> None:
    bar, replay = Bar(), ScheduleReplay({"dropout": 0.2, "noise": 0.3, "length": 1})
    run = trainer(replay, bar, enable_progress_bar=True)
    run.fit(module := LitSmall(), loader(24), loader(16, seed=1))
    assert {name: bar.shown[0][name] for name in NAMES} == {"dropout": 0.2, "noise": 0.3, "length": 1}
    assert bar.get_metrics(run, module).keys() & {"own", *NAMES} == {"own"}
