"""Safeguards in real runs: nothing non-finite reaches the hyperparameters, and each problem is reported once."""

import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support import LitSmall, fit, loader, random_gates, trainer
from torch import Tensor

from lightning_stn import Categorical, Float, HyperparameterSet, Integer, Scales, STNCallback
from lightning_stn.callback.watch import PATIENCE, Watch
from lightning_stn.methods import HyperparameterOptimizer, SharedAdam


def callback(**settings: Any) -> STNCallback:
    return STNCallback(**{"train_steps": 1, "warmup": 0, "lr": 0.05, "seed": 1, **settings})


class Spoiled(LitSmall):
    """Has a non-finite validation loss in the given hyperparameter steps."""

    def __init__(self, spoiled: range, factor: float = float("nan")) -> None:
        super().__init__()
        self.spoiled = spoiled
        self.factor = factor

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_loss(batch, batch_idx)
        return loss * self.factor if torch.is_grad_enabled() and batch_idx in self.spoiled else loss


class Values(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.hyperparameters.unconstrained.detach().clone())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_non_finite_hypergradient_is_skipped_counted_and_reported_once(tmp_path: Any, factor: float) -> None:
    module, values, stn = Spoiled(range(2, 5), factor), Values(), callback()
    run = trainer(stn, values, max_epochs=1, log_every_n_steps=1, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="hypergradient is not finite") as caught:
        run.fit(module, loader(64), loader(16))
    assert sum("not finite" in str(warning.message) for warning in caught) == 1
    seen = torch.stack(values.seen)
    assert seen.isfinite().all()
    moved = (seen[1:] != seen[:-1]).any(1).tolist()
    assert moved == [True, False, False, False, True, True, True]
    metrics = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert "stn/skipped_steps" in metrics[0]
    state = stn._phase.optimizer.optimizer.state_dict()["state"]
    assert all(torch.as_tensor(value).isfinite().all() for entry in state.values() for value in entry.values())


@pytest.mark.parametrize("optimizer", [SharedAdam, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("factor", [1e27, 1e36])
def test_hypergradient_whose_square_overflows_does_not_freeze_a_run(optimizer: Any, factor: float) -> None:
    module, values, stn = Spoiled(range(2, 3), factor), Values(), callback(optimizer=optimizer)
    random_gates(module, 0.1)
    with pytest.warns(UserWarning, match="its square is not finite in float32, .*step is skipped") as caught:
        trainer(stn, values, max_epochs=1).fit(module, loader(64), loader(16))
    assert sum("skipped" in str(warning.message) for warning in caught) == 1
    seen = torch.stack(values.seen)
    assert seen.isfinite().all()
    assert (seen[1:] != seen[:-1]).any(1).tolist() == [True, False, True, True, True, True, True]
    assert stn.state_dict()["watch"]["skipped"] == 1


@pytest.mark.parametrize("factor", [1e10, 1e15])
def test_single_hypergradient_far_above_the_others_does_not_slow_a_run_down(factor: float) -> None:
    module, values, stn = Spoiled(range(20, 21), factor), Values(), callback(optimizer=torch.optim.Adam, anneal=False)
    random_gates(module, 0.1)
    with pytest.warns(UserWarning, match=r"1e\+06 times as large as those before, .*step is skipped"):
        trainer(stn, values, max_epochs=4).fit(module, loader(64), loader(16))
    steps = torch.stack(values.seen).diff(dim=0).norm(dim=1)
    assert steps[19] == 0
    assert (steps[20:] > 1e-3).all()
    assert stn.state_dict()["watch"]["skipped"] == 1


def test_watch_takes_the_second_of_two_large_hypergradients_for_another_scale_of_the_loss() -> None:
    _, watch = watched(rate=Float(0.0, 0.9, init=0.05))
    large = torch.tensor([1e4])
    assert watch.admits(large, typical=None)
    assert watch.admits(large, typical=0.0)
    assert watch.admits(large, typical=0.011)
    with pytest.warns(UserWarning, match="times as large"):
        assert not watch.admits(large, typical=0.009)
    assert watch.admits(large, typical=0.009)


@pytest.mark.parametrize(
    ("gradient", "admitted"),
    [([1e18, 1e18], True), ([1e19, 0.0], True), ([1.5e19, 1.5e19], False), ([1e20, 0.0], False), ([1e-30, 0.0], True)],
)
def test_watch_admits_what_is_finite_when_squared_and_summed(gradient: list[float], admitted: bool) -> None:
    _, watch = watched(rate=Float(0.0, 0.9, init=0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not admitted else "error")
        assert watch.admits(torch.tensor(gradient)) is admitted
    assert watch.in_a_row == (not admitted)


def test_hypergradient_that_is_too_large_is_reported_beside_a_scaler_too() -> None:
    """A smaller scale changes nothing about it."""
    _, watch = watched(rate=Float(0.0, 0.9, init=0.05))
    assert not watch.admits(torch.tensor([float("inf")]), rescales=True)
    with pytest.warns(UserWarning, match="so large that its square"):
        assert not watch.admits(torch.tensor([1e20]), rescales=True)


@pytest.mark.parametrize(("gradient", "scale"), [(1.0, 8.0), (1e30, 8.0), (float("inf"), 4.0)])
def test_optimizer_beside_a_scaler_takes_admitted_steps_alone(gradient: float, scale: float) -> None:
    hyperparameters, watch = watched(rate=Float(0.0, 0.9, init=0.05))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = HyperparameterOptimizer(hyperparameters, torch.optim.Adam, lr=0.1, scaler=scaler)
    scaler.scale(torch.ones(()))
    start = hyperparameters.unconstrained.clone()
    received = optimizer.receive(torch.tensor([[8.0 * gradient], [0.0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(admitted=watch.admits(received, rescales=optimizer.rescales))
    assert torch.equal(hyperparameters.unconstrained, start) is (gradient != 1.0)
    assert scaler.get_scale() == scale


def test_too_many_non_finite_hypergradients_in_a_row_end_the_run_and_keep_its_checkpoint(tmp_path: Any) -> None:
    module = Spoiled(range(3, 10_000))
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_last=True)
    run = trainer(callback(), keep, max_epochs=100, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="finite") as caught:
        run.fit(module, loader(64), loader(16))
    assert sum("in a row had no finite" in str(warning.message) for warning in caught) == 1
    assert run.global_step == 3 + PATIENCE
    assert (tmp_path / "last.ckpt").exists()
    assert module.hyperparameters.unconstrained.isfinite().all()


def test_diverged_weights_leave_the_hyperparameters_finite() -> None:
    module, stn = LitSmall(), callback()

    class Diverge(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                pl_module.net[0].weight.data.fill_(float("nan"))

    with pytest.warns(UserWarning, match="the weights have diverged"):
        trainer(stn, Diverge(), max_epochs=1).fit(module, loader(64), loader(16))
    assert module.hyperparameters.unconstrained.isfinite().all()
    assert module.hyperparameters.raw_scale.isfinite().all()


def test_count_of_skipped_steps_is_restored_from_a_checkpoint(tmp_path: Any) -> None:
    module, stn = Spoiled(range(2, 4)), callback()
    run = trainer(stn, max_epochs=1)
    with pytest.warns(UserWarning, match="not finite"):
        run.fit(module, loader(64), loader(16))
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed = callback()
    fit_again = trainer(resumed, max_epochs=2)
    fit_again.fit(LitSmall(), loader(64), loader(16), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.state_dict()["watch"]["skipped"] == 2


def look_twice(watch: Watch) -> None:
    watch.look()
    watch.look()


def watched(**specifications: Any) -> tuple[HyperparameterSet, Watch]:
    hyperparameters = HyperparameterSet(specifications)
    return hyperparameters, Watch(hyperparameters)


@pytest.mark.parametrize(
    ("specification", "place", "bound"),
    [
        (Float(0.0, 0.9, init=0.05), -8.0, "0"),
        (Float(0.0, 0.9, init=0.05), 8.0, "0.9"),
        (Integer(0, 24, init=4), 7.5, "24"),
        (Float(0.5, None, init=1.0), -7.5, "0.5"),
        (Float(1e-6, 1e-1, init=1e-4, log=True), -7.5, "1e-06"),
    ],
)
def test_reached_bound_is_reported_once(specification: Any, place: float, bound: str) -> None:
    hyperparameters, watch = watched(rate=specification)
    hyperparameters.unconstrained.data.fill_(place)
    with pytest.warns(UserWarning, match=rf"'rate' has arrived at its bound {bound} and") as caught:
        look_twice(watch)
    assert len(caught) == 1


@pytest.mark.parametrize(("scale", "said"), [(0.005, "hardly perturbed any more"), (6.0, "over its whole range")])
def test_collapsed_or_exploded_scale_is_reported_once(scale: float, said: str) -> None:
    hyperparameters, watch = watched(rate=Float(0.0, 0.9, init=0.05))
    hyperparameters.raw_scale.data.fill_(torch.tensor(scale).expm1().log())
    with pytest.warns(UserWarning, match=f"'rate' is .*{said}.*entropy_weight") as caught:
        look_twice(watch)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("specification", "place"),
    [
        (Float(0.0, 0.9, init=0.05), -5.0),
        (Float(None, None, init=0.0), 30.0),
        (Float(0.0, None, init=1e-5), -12.0),  # its start value
        (Float(0.0, None, init=1.0), 50.0),
        (Float(0.0, None, init=1e-3, log=True), -18.0),
        (Categorical(["a", "b"], init="a"), 20.0),
    ],
)
def test_watch_does_not_warn_of_healthy_hyperparameters(specification: Any, place: float) -> None:
    hyperparameters, watch = watched(rate=specification)
    hyperparameters.unconstrained.data.fill_(place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look()


def test_ordinary_run_does_not_warn() -> None:
    fit(LitSmall(), callback(), max_epochs=2, log_every_n_steps=1)


class Drifting(LitSmall):
    """Has a validation loss that moves every hyperparameter or scale in one direction; its weights do not change."""

    def __init__(self, towards: float = 0.0, wider: float = 0.0) -> None:
        super().__init__({"noise": Float(0.0, 1.0, init=0.1), "length": Integer(0, 4, init=2)}, dropout=None)
        self.towards = towards
        self.wider = wider

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        distance = self.hyperparameters.bound_sample() / self.hyperparameters.gate_scale  # from a centred response
        drift = self.towards * distance.sum() + self.wider * distance.square().sum()
        return super().validation_loss(batch, batch_idx) - drift

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-30)


@pytest.mark.parametrize(
    ("drift", "messages"),
    [
        ({"towards": 100.0}, ["'noise' has arrived at its bound 1 and", "'length' has arrived at its bound 4 and"]),
        ({"towards": -100.0}, ["'noise' has arrived at its bound 0 and", "'length' has arrived at its bound 0 and"]),
        ({"wider": 100.0}, ["'noise' is .*over its whole range", "'length' is .*over its whole range"]),
        ({"wider": -100.0}, ["'noise' is .*hardly perturbed", "'length' is .*hardly perturbed"]),
    ],
    ids=["upper bound", "lower bound", "exploding scale", "collapsing scale"],
)
def test_run_reports_bounds_and_scales_once(drift: dict[str, float], messages: list[str]) -> None:
    """The run goes on, with finite hyperparameters and scales."""
    module = Drifting(**drift)
    lr, scale_lr = (0.5, 1e-6) if "towards" in drift else (1e-6, 0.5)
    scales = Scales(tune=True, lr=scale_lr, entropy_weight=0.0)
    stn = callback(perturb="example", lr=lr, anneal=False, optimizer=torch.optim.Adam, scales=scales)
    with pytest.warns(UserWarning, match="^The hyperparameter") as caught:
        run, _ = fit(module, stn, n=160, max_epochs=2)
    said = [text for warning in caught if (text := str(warning.message)).startswith("The hyperparameter")]
    assert len(said) == len(messages)
    for message in messages:
        assert sum(re.search(message, text) is not None for text in said) == 1
    assert run.global_step == 40
    assert module.hyperparameters.unconstrained.isfinite().all()
    assert module.hyperparameters.scale.isfinite().all()


def test_run_warns_of_a_validation_stream_shorter_than_a_batch() -> None:
    module, run = LitSmall(), trainer(callback(), max_epochs=1)
    start = module.hyperparameters.unconstrained.clone()
    with pytest.warns(
        UserWarning, match="validation stream has 5 examples on each rank, fewer than its batch size of 8"
    ):
        run.fit(module, loader(24), loader(5, seed=1))
    assert not torch.equal(module.hyperparameters.unconstrained, start)
