"""Shared by these tests: the small module in manual and automatic optimisation, with a trace of its run."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from support import LitSmall, loader, trainer
from torch import Tensor

from lightning_stn import STNCallback, WeightStep

Configure = Callable[[torch.optim.Optimizer], Any]
"""Builds the return value of `configure_optimizers` from an optimiser."""

MODES = (False, True)
"""Whether optimisation is automatic."""

OURS = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches")
"""Settings of the Trainer that the callback takes in manual optimisation."""


class Steps(torch.optim.SGD):
    """SGD that records the largest gradient entry and the gradient norm of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.largest: list[float] = []
        self.norms: list[float] = []

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is not None:
            closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.largest.append(max(gradient.abs().max().item() for gradient in gradients))
        self.norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return super().step()


class Traced(LitSmall):
    """Records the learning rate of every batch and every metric passed to a scheduler."""

    def __init__(self, automatic: bool = False, configure: Configure | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = automatic
        self.configure = configure
        self.rates: list[float] = []
        self.metrics: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = Steps(self.parameters(), lr=0.05, momentum=0.9)
        return optimizer if self.configure is None else self.configure(optimizer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is not None:
            self.metrics.append(float(metric))
        super().lr_scheduler_step(scheduler, metric)

    @property
    def steps(self) -> Steps:
        """The weight optimiser."""
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, Steps)
        return optimizer


def callback(**settings: Any) -> STNCallback:
    return STNCallback(**{"train_steps": 2, "valid_steps": 1, "warmup": 0, "lr": 0.05, "seed": 1, **settings})


def train(
    module: LitSmall, *callbacks: L.Callback, n: int = 40, stn: STNCallback | None = None, **settings: Any
) -> Any:
    """Train on five batches an epoch; return the Trainer. Manual optimisation gives `OURS` to the callback."""
    if not module.automatic_optimization and stn is None:
        stn = callback(weight_step=WeightStep(**{name: settings.pop(name) for name in OURS if name in settings}))
    run = trainer(stn or callback(), *callbacks, **settings)
    run.fit(module, loader(n), loader(16, seed=1))
    return run


def in_both_modes(configure: Configure | None = None, kind: type[Traced] = Traced, **settings: Any) -> list[Traced]:
    """The same run in manual and in automatic optimisation."""
    modules = []
    for automatic in MODES:
        L.seed_everything(3, verbose=False)
        module = kind(automatic, configure)
        train(module, **settings)
        modules.append(module)
    return modules


def assert_equal_weights(ours: torch.nn.Module, theirs: torch.nn.Module, **tolerance: Any) -> None:
    """Compare weights, hyperparameters and scales; bit for bit unless a tolerance is given."""
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], **{"rtol": 0.0, "atol": 0.0, **tolerance}, msg=key)


def flat(module: LitSmall) -> Tensor:
    """All weights in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
