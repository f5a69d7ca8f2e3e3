"""The report in words at the end of a run."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import LitSmall, fit

from lightning_stn import Categorical, Float, HyperparameterSet, Integer, Schedule
from lightning_stn.callback.report import MOST, report
from lightning_stn.callback.statistics import HypergradientStatistics
from lightning_stn.callback.underfitting import Underfitting
from lightning_stn.schedule import Row
from lightning_stn.specifications import Hyperparameter

THREE = {"rate": Float(0.0, 0.9, init=0.1), "length": Integer(0, 16, init=4), "decay": Float(1e-6, 1e-1, log=True)}


def recorded(hyperparameters: HyperparameterSet, warmup: int | None = 5) -> Schedule:
    """Two rows: the start values, and the present ones."""
    schedule, present = hyperparameters.schedule(), hyperparameters.unconstrained.clone()
    schedule.warmup = warmup
    hyperparameters.reset_parameters()
    for step in (0, 100):
        schedule.append(Row(step, 0, hyperparameters.values(), dict.fromkeys(schedule.scale_names, 0.5)))
        hyperparameters.unconstrained.copy_(present)
    return schedule


def told(
    specifications: dict[str, Hyperparameter], moves: dict[int, float], gradients: Any = (), **arguments: Any
) -> list[str]:
    """Lines of the report of a run that moved entries, and had these hypergradients."""
    hyperparameters = HyperparameterSet(specifications)
    for entry, move in moves.items():
        hyperparameters.unconstrained[entry] += move
    statistics = HypergradientStatistics(hyperparameters)
    for gradient in gradients:
        statistics.update(gradient)
    schedule = recorded(hyperparameters, arguments.pop("warmup", 5))
    recorded_run = SimpleNamespace(hyperparameters=hyperparameters, schedule=schedule, path=arguments.pop("file", None))
    return report(recorded_run, statistics).splitlines()


def noise(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


def test_report_tells_first_and_last_values_and_the_file() -> None:
    lines = told(THREE, {0: 1.0}, noise(100, 3), file=Path("run", "schedule.json"))
    assert lines == [
        "Tuned 3 hyperparameters over 100 training batches: rate 0.1 -> 0.2283, length 4 -> 4, decay 0.0003162 -> "
        "0.0003162.",
        f"Schedule: {Path('run', 'schedule.json')} (Schedule.load(path).plot() draws it)",
    ]


def test_report_names_a_bound_and_does_not_call_it_moving() -> None:
    gradients = noise(100, 3)
    gradients[:, 0] -= 5
    lines = told(THREE, {0: 12.0}, gradients)
    assert lines[1:] == ["Ended at a bound: rate at 0.9. Widen the range if values beyond make sense."]


def test_report_names_what_still_moves_and_what_hardly_matters() -> None:
    gradients = noise(200, 3)
    gradients[:, 1] = 1e-4 * gradients[:, 1]
    gradients[:, 2] += 5
    lines = told(THREE, {}, gradients)
    assert lines[1:] == [
        "Still moving at the end: decay down. Start them further that way, or train for longer.",
        "Hardly mattered for the validation loss: length.",
    ]


def test_report_says_that_one_direction_was_tuned() -> None:
    lines = told(THREE, {}, noise(200, 1).expand(200, 3) + 0.01 * noise(200, 3))
    assert "All pointed the same way (stn/first_direction 1.00): one direction was tuned" in lines[-1]


def test_report_of_a_run_within_its_warmup_says_so() -> None:
    lines = told(THREE, {}, warmup=None)
    assert lines[1:] == [
        "No hyperparameter step was taken: the run ended within the warm-up. Train for longer, or lower warmup."
    ]


def test_report_of_an_underfitting_network_advises_no_wider_range_and_no_other_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cause = Underfitting(["rate"], 0.9, 0.8)
    monkeypatch.setattr("lightning_stn.callback.report.underfitting", lambda schedule, slight: cause)
    gradients = noise(100, 3)
    gradients[:, :2] += 5
    lines = told(THREE, {0: -12.0}, gradients)
    assert lines[1:] == [
        str(cause),
        "Still moving at the end: length down. Start them further that way, or train for longer.",
    ]


def test_report_of_many_hyperparameters_is_short() -> None:
    lines = told({f"rate{i}": Float(0.0, 0.9) for i in range(40)}, {})
    assert len(lines) == 1
    assert lines[0].count("->") == MOST
    assert lines[0].endswith(", and 28 more.")


def test_report_tells_the_name_of_a_choice() -> None:
    (line,) = told({"op": Categorical(("a", "b"), init="b")}, {0: 3.0})
    assert line == "Tuned 1 hyperparameter over 100 training batches: op b -> a."


@pytest.mark.parametrize("bar", [True, False])
def test_run_reports_where_it_has_a_progress_bar(tmp_path: Path, caplog: Any, bar: bool) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0)
    with caplog.at_level(logging.INFO):
        fit(LitSmall(), logger=logger, enable_progress_bar=bar)
    assert ("Tuned 3 hyperparameters over 6 training batches: dropout 0.05 ->" in caplog.text) == bar
    assert (f"Schedule: {Path(logger.log_dir, 'schedule.json')}" in caplog.text) == bar
