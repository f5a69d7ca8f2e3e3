"""Manual optimisation gives the same numbers as Lightning's automatic optimisation."""

import itertools
from typing import Any

import lightning as L
import pytest
import torch
from features.runs import MODES, Traced, assert_equal_weights, callback, flat, in_both_modes, train
from support import LitSmall, random_gates
from torch import Tensor
from torch.optim import lr_scheduler

from lightning_stn import WeightStep

CLIPPING: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.3},
    "value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize(("clipping", "accumulate"), list(itertools.product(CLIPPING, [1, 2, 3])))
def test_clipping_and_accumulation_equal_those_of_the_trainer(clipping: str, accumulate: int) -> None:
    """Five batches an epoch, so that accumulation over two or three leaves a remainder; Lightning steps on it too."""
    manual, automatic = in_both_modes(accumulate_grad_batches=accumulate, **CLIPPING[clipping])
    assert_equal_weights(manual, automatic, rtol=1e-5, atol=1e-6)
    steps = manual.trainer.global_step
    assert steps == automatic.trainer.global_step == len(manual.steps.norms) == 2 * -(-5 // accumulate)
    unclipped = in_both_modes(accumulate_grad_batches=accumulate)[0]
    sizes = manual.steps.largest if clipping == "value" else manual.steps.norms
    if clipping == "none":
        assert max(sizes) > 0.3
        return
    limit = CLIPPING[clipping]["gradient_clip_val"]
    assert max(sizes) == pytest.approx(limit, rel=1e-3)
    assert not torch.allclose(flat(manual), flat(unclipped), atol=1e-4)


def test_epoch_cut_short_steps_on_its_last_batch() -> None:
    manual, automatic = in_both_modes(n=64, limit_train_batches=5, accumulate_grad_batches=2)
    assert manual.trainer.global_step == automatic.trainer.global_step == 6
    assert_equal_weights(manual, automatic, rtol=1e-5, atol=1e-6)


class LogsLate(Traced):
    """Logs one metric after every batch, and one after the epoch-end hooks of the callbacks."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_loss(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.current_epoch % 3))


def plateau(optimizer: Any, **settings: Any) -> dict[str, Any]:
    """A scheduler that halves the rate at nearly every step."""
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss", **settings},
    }


def warm_and_cool(optimizer: Any) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.StepLR(optimizer, 2, 0.5)], milestones=[4])


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "by epoch": (lambda o: ([o], [lr_scheduler.StepLR(o, 1, 0.5)]), {}),
    "every second epoch": (
        lambda o: ([o], [{"scheduler": lr_scheduler.ExponentialLR(o, 0.5), "frequency": 2}]),
        {},
    ),
    "by step": (lambda o: ([o], [{"scheduler": lr_scheduler.OneCycleLR(o, 0.1, 30), "interval": "step"}]), {}),
    "by step, one after the other": (lambda o: ([o], [{"scheduler": warm_and_cool(o), "interval": "step"}]), {}),
    "every third step": (
        lambda o: ([o], [{"scheduler": lr_scheduler.StepLR(o, 1, 0.5), "interval": "step", "frequency": 3}]),
        {},
    ),
    "by step, accumulation": (
        lambda o: ([o], [{"scheduler": lr_scheduler.StepLR(o, 1, 0.5), "interval": "step"}]),
        {"accumulate_grad_batches": 2},
    ),
    "by epoch, fewer batches": (lambda o: ([o], [lr_scheduler.StepLR(o, 1, 0.5)]), {"limit_train_batches": 3}),
    "plateau": (plateau, {}),
    "plateau, every second epoch": (lambda o: plateau(o, frequency=2), {}),
    "plateau, a training metric": (lambda o: plateau(o, monitor="loss_epoch"), {}),
    "plateau, a metric logged last": (lambda o: plateau(o, monitor="late"), {}),
    "plateau by step": (lambda o: plateau(o, interval="step"), {"val_check_interval": 1}),
    "plateau by step, validation within epochs": (
        lambda o: plateau(o, interval="step", frequency=2),
        {"val_check_interval": 2},
    ),
    "plateau by step, accumulation": (
        lambda o: plateau(o, interval="step", frequency=2),
        {"val_check_interval": 2, "accumulate_grad_batches": 2},
    ),
    "plateau by step, a training metric": (lambda o: plateau(o, interval="step", monitor="loss_step"), {}),
    "custom scheduler that follows a metric": (
        lambda o: plateau(o, scheduler=Following(o), reduce_on_plateau=True),
        {},
    ),
}


class Following(lr_scheduler.LRScheduler):
    """A custom scheduler whose steps take a metric."""

    def step(self, metric: Any = None) -> None:
        if metric is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.1 * float(metric)

    def get_lr(self) -> Any:
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize("case", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # torch 2.6 warns of its SequentialLR
def test_schedulers_step_at_the_times_and_on_the_metrics_of_the_trainer(case: str) -> None:
    configure, settings = SCHEDULERS[case]
    manual, automatic = in_both_modes(configure, LogsLate, max_epochs=5, **settings)
    assert manual.rates == automatic.rates
    assert len(set(manual.rates)) > 1
    assert manual.metrics == automatic.metrics
    assert bool(manual.metrics) == (("plateau" in case) or ("metric" in case))
    states = [[c.scheduler.state_dict() for c in module.trainer.lr_scheduler_configs] for module in (manual, automatic)]
    assert states[0] == states[1]
    assert_equal_weights(manual, automatic, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("automatic", MODES)
def test_strict_scheduler_raises_without_its_metric(automatic: bool, interval: str) -> None:
    module = Traced(automatic, lambda o: plateau(o, monitor="accuracy", interval=interval))
    with pytest.raises(Exception, match=r"(?s)ReduceLROnPlateau.*accuracy.*not"):
        train(module)
    assert len(module.rates) == (1 if interval == "step" else 5)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("automatic", MODES)
def test_non_strict_scheduler_warns_and_waits_without_its_metric(automatic: bool, interval: str) -> None:
    module = Traced(automatic, lambda o: plateau(o, monitor="accuracy", interval=interval, strict=False))
    with pytest.warns(Warning, match=r"(?s)ReduceLROnPlateau.*accuracy.*not"):
        train(module)
    assert set(module.rates) == {0.05}
    assert len(module.rates) == 10


class Several(Traced):
    """One optimiser for the convolution and one for the linear layers, each with a scheduler."""

    def configure_optimizers(self) -> Any:
        layers = self.net[0], torch.nn.ModuleList([self.net[5], self.net[8]])  # type: ignore[index]
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9) for layer in layers]
        return optimizers, [
            {"scheduler": lr_scheduler.StepLR(optimizers[0], 1, 0.5), "interval": "epoch"},
            {"scheduler": lr_scheduler.StepLR(optimizers[1], 1, 0.5), "interval": "epoch"},
        ]


@pytest.mark.parametrize("clip", [None, 0.02])
def test_several_optimizers_give_the_run_of_one(clip: float | None) -> None:
    """Clips by value, because a norm depends on which parameters an optimiser has."""
    settings = {"gradient_clip_val": clip, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}
    finals = []
    for kind in (Traced, Several):
        L.seed_everything(3, verbose=False)
        module = kind(configure=lambda o: ([o], [lr_scheduler.StepLR(o, 1, 0.5)]))
        random_gates(module, 0.1)
        train(module, **settings)
        finals.append(module)
    assert_equal_weights(finals[1], finals[0], rtol=1e-5, atol=1e-6)
    assert finals[1].rates == finals[0].rates


def test_gradients_are_freed_before_the_hyperparameter_phase() -> None:
    """They are kept while they accumulate."""
    seen = []

    class Watch(LitSmall):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(any(parameter.grad is not None for parameter in self.parameters()))
            return super().validation_loss(batch, batch_idx)

    train(
        Watch(),
        stn=callback(train_steps=1, weight_step=WeightStep(accumulate_grad_batches=2)),
        max_epochs=1,
        limit_val_batches=1,
    )
    assert seen == [True, False, True, False, False]


class Hooks(Traced):
    """Has all hooks around a step of the optimiser that Lightning calls in automatic optimisation."""

    def __init__(self, automatic: bool = False, configure: Any = None) -> None:
        super().__init__(automatic, configure)
        self.calls: list[str] = []

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:  # a warm-up
            group["lr"] = 0.01 * (1 + self.trainer.global_step)
        self.calls.append(f"step {epoch} {batch_idx}")
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.calls.append(f"clip at {gradient_clip_val}")
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls.append(f"before zero_grad of {type(optimizer).__name__}")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.calls.append("zero_grad")
        optimizer.zero_grad()


class BeforeZeroGrad(L.Callback):
    def __init__(self) -> None:
        self.calls = 0

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_around_a_step_are_called_as_in_automatic_optimisation(accumulate: int) -> None:
    manual, automatic = in_both_modes(kind=Hooks, accumulate_grad_batches=accumulate)
    assert_equal_weights(manual, automatic, rtol=1e-5, atol=1e-6)
    for kind in ("step", "clip", "before", "zero_grad"):
        expected = [call for call in automatic.calls if call.startswith(kind)]
        assert expected
        found = [call for call in manual.calls if call.startswith(kind)]
        # Automatic optimisation frees the gradients before it accumulates, and manual optimisation after each step.
        assert found == expected


def test_callbacks_hear_that_gradients_are_freed() -> None:
    heard = BeforeZeroGrad()
    assert train(Traced(), heard, max_epochs=1).global_step == heard.calls == 5


class OwnStep(LitSmall):
    """Has a `training_step` as every other LightningModule has."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.training_loss(batch, batch_idx)


class StepsByHand(LitSmall):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss, optimizer = self.training_loss(batch, batch_idx), self.optimizers()
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]


class Around(LitSmall):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("seen", loss)
        return loss


@pytest.mark.parametrize(("n", "batches"), [(24, 3), (200, 20)])
def test_a_training_step_that_steps_no_optimiser_ends_the_run(n: int, batches: int) -> None:
    message = (
        rf"No optimiser has stepped in {batches} batches: OwnStep defines a training_step.*Rename it to training_loss"
    )
    with pytest.raises(RuntimeError, match=message):
        train(OwnStep(), n=n, max_epochs=1)


class StepsPastLightning(LitSmall):
    """Uses torch's optimiser itself, whose steps Lightning does not count."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.training_loss(batch, batch_idx).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_training_step_around_the_weight_step_trains() -> None:
    assert train(Around(), max_epochs=1).global_step == 5


@pytest.mark.parametrize("kind", [StepsByHand, StepsPastLightning])
def test_a_training_step_that_steps_by_hand_trains(kind: type[LitSmall]) -> None:
    module = kind()
    before = flat(module)
    train(module, max_epochs=1)
    assert not torch.equal(flat(module), before)


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_configure_optimizers_knows_the_number_of_steps(accumulate: int) -> None:
    known: list[float] = []

    class Asks(Traced):
        def configure_optimizers(self) -> Any:
            known.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    manual, automatic = in_both_modes(kind=Asks, accumulate_grad_batches=accumulate)
    assert known[0] == known[1] == manual.trainer.global_step == automatic.trainer.global_step
    assert manual.trainer.accumulate_grad_batches == 1


def test_an_optimiser_that_evaluates_the_loss_is_refused_in_manual_optimisation() -> None:
    class Newton(LitSmall):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)

    with pytest.raises(NotImplementedError, match=r"LBFGS evaluates the loss.*automatic_optimization = True"):
        train(Newton(), max_epochs=1)
    module = Newton()
    module.automatic_optimization = True
    assert train(module, max_epochs=1).global_step == 5


def test_an_optimiser_that_evaluates_the_loss_is_refused_among_several() -> None:
    def both(optimizer: torch.optim.Optimizer) -> Any:
        (group,) = optimizer.param_groups
        first, *others = group["params"]
        return [torch.optim.SGD([first], 0.01), torch.optim.LBFGS(others)]

    with pytest.raises(NotImplementedError, match=r"automatic_optimization = True.*, and return this optimiser alone"):
        train(Traced(configure=both))
