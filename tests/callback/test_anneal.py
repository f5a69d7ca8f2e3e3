"""Learning rates of the hyperparameter steps, which fall along a half cosine over a run of known length."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import AfterEpoch, LitSmall, loader, trainer

from lightning_stn import Float, HyperparameterSet, Scales, STNCallback, WeightStep
from lightning_stn.methods import HyperparameterOptimizer

LR, SCALE_LR = 0.05, 0.02
Rates = list[list[float]]


class Recording(torch.optim.SGD):
    """Records the learning rates of its parameter groups in every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates: Rates = []

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.rates.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def run(
    *callbacks: Any, checkpoint: Path | None = None, save: Path | None = None, epochs: int = 2, **settings: Any
) -> Rates:
    """Train on five batches an epoch; return the rates of all hyperparameter steps."""
    arguments = {key: settings.pop(key) for key in list(settings) if key not in ("max_steps",)}
    defaults = {"lr": LR, "scales": Scales(tune=True, lr=SCALE_LR), "optimizer": Recording, "seed": 1}
    stn = STNCallback(**{"train_steps": 2, "warmup": 0, **defaults, **arguments})
    fit = trainer(stn, *callbacks, max_epochs=epochs, limit_val_batches=1, **settings)
    fit.fit(LitSmall(), loader(40), loader(16, seed=1), ckpt_path=checkpoint)
    if save is not None:
        fit.save_checkpoint(save)
    optimizer = stn._phase.optimizer.optimizer
    assert isinstance(optimizer, Recording)
    return optimizer.rates


def half_cosine(total: int, after: Iterable[int], *initial: float) -> Rates:
    """Rates of the steps after these training batches, in a run of `total` batches."""
    return [[rate * (1 + math.cos(math.pi * (batch - 1) / total)) / 2 for rate in initial] for batch in after]


def approx(rates: Rates) -> Any:
    return [pytest.approx(row) for row in rates]


@pytest.mark.parametrize(
    ("settings", "total", "after"),
    [
        ({}, 10, [2, 4, 6, 8, 10]),
        ({"valid_steps": 2}, 10, [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]),
        ({"epochs": 3, "warmup": 1}, 15, [7, 9, 11, 13, 15]),
        ({"epochs": -1, "max_steps": 9}, 9, [2, 4, 6, 8]),
        ({"epochs": 2, "max_steps": 8}, 8, [2, 4, 6, 8]),
    ],
    ids=str,
)
def test_rates_fall_along_a_half_cosine_over_the_run(settings: dict[str, Any], total: int, after: list[int]) -> None:
    assert run(**settings) == approx(half_cosine(total, after, LR, SCALE_LR))


@pytest.mark.parametrize("automatic", [False, True])
def test_run_of_max_steps_is_as_long_as_its_accumulated_batches(automatic: bool) -> None:
    """Seven steps of two batches, the last batch of an epoch of five completes one: 5 + 5 + 2 batches."""
    module = LitSmall()
    module.automatic_optimization = automatic
    accumulated = {"accumulate_grad_batches": 2}
    stn = STNCallback(1, warmup=0, lr=LR, seed=1, **({} if automatic else {"weight_step": WeightStep(**accumulated)}))
    fit = trainer(stn, max_epochs=-1, max_steps=7, **(accumulated if automatic else {}))
    fit.fit(module, loader(40), loader(16, seed=1))
    assert stn.schedule.rows[-1].step == 12
    assert stn._phase.optimizer.rates["lr"] == pytest.approx(half_cosine(12, [12], LR)[0][0])


def test_run_of_max_steps_counts_the_steps_of_several_optimisers() -> None:
    class Two(LitSmall):
        def configure_optimizers(self) -> Any:
            first, *others = self.parameters()
            return [torch.optim.SGD([first], 0.05), torch.optim.SGD(others, 0.05)]

    stn = STNCallback(1, warmup=0, lr=LR, seed=1)
    trainer(stn, max_epochs=-1, max_steps=13).fit(Two(), loader(40), loader(16, seed=1))
    assert stn.schedule.rows[-1].step == 7
    assert stn._phase.optimizer.rates["lr"] == pytest.approx(half_cosine(7, [7], LR)[0][0])


@pytest.mark.parametrize("settings", [{"anneal": False}, {"epochs": -1}], ids=["not annealed", "unknown length"])
def test_rates_stay_constant_without_annealing_and_in_a_run_of_unknown_length(settings: dict[str, Any]) -> None:
    assert run(AfterEpoch(2), **settings) == [[LR, SCALE_LR]] * 5


def test_resumed_run_continues_the_curve(tmp_path: Path) -> None:
    saved = tmp_path / "first.ckpt"
    first = run(AfterEpoch(2), epochs=4, save=saved)
    resumed = run(epochs=4, checkpoint=saved)
    assert [len(first), len(resumed)] == [5, 5]
    assert first + resumed == approx(half_cosine(20, range(2, 21, 2), LR, SCALE_LR))


@pytest.mark.parametrize(("first", "then", "after"), [(1, 2, [12, 14, 16, 18, 20]), (2, 1, range(11, 21))])
def test_curve_does_not_depend_on_phases_that_a_resumed_run_changes(
    tmp_path: Path, first: int, then: int, after: Iterable[int]
) -> None:
    saved = tmp_path / "first.ckpt"
    run(AfterEpoch(2), epochs=4, save=saved, train_steps=first)
    resumed = run(epochs=4, checkpoint=saved, train_steps=then, on_resume_use=["train_steps"])
    assert resumed == approx(half_cosine(20, after, LR, SCALE_LR))


def test_rate_named_on_resume_is_the_initial_rate_of_the_rest_of_the_curve(tmp_path: Path) -> None:
    """The rate of the scales, which is not named, continues its curve."""
    saved = tmp_path / "first.ckpt"
    run(AfterEpoch(2), epochs=4, save=saved)
    resumed = run(epochs=4, checkpoint=saved, lr=4 * LR, on_resume_use=["lr"])
    assert resumed == approx(half_cosine(20, range(12, 21, 2), 4 * LR, SCALE_LR))


def test_resumed_run_keeps_to_constant_rates_unless_annealing_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "first.ckpt"
    run(AfterEpoch(2), epochs=4, save=saved, anneal=False)
    with pytest.warns(UserWarning, match=r"anneal=True \(it stays False\)"):
        assert run(epochs=4, checkpoint=saved) == [[LR, SCALE_LR]] * 5
    assert run(epochs=4, checkpoint=saved, on_resume_use=["anneal"]) == approx(
        half_cosine(20, range(12, 21, 2), LR, SCALE_LR)
    )


def test_annealing_counts_from_the_initial_rate_and_ends_at_zero() -> None:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 0.9, init=0.1)})
    optimizer = HyperparameterOptimizer(hyperparameters, torch.optim.SGD, lr=LR)
    for share, rate in ((0.5, LR / 2), (0.5, LR / 2), (1.0, 0.0), (1.5, 0.0), (0.0, LR)):
        optimizer.anneal(share)
        assert optimizer.rates == {"lr": pytest.approx(rate)}
