"""Copies of a module that train on at fixed hyperparameters, all on the same batches and random numbers."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_stn.analysis.evaluation import trainer_stage, transfer
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer
from lightning_stn.methods.base import check_loss, recentre
from lightning_stn.passes import Pass
from lightning_stn.randomness import random_state, set_random_state

WeightOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Builds the optimiser of the base weights, such as `functools.partial(torch.optim.SGD, lr=0.1)`."""


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of a module that trains its base weights at fixed hyperparameters, without perturbation.

    Args:
        module: the copy.
        optimizer: steps its weights.
        clip: largest norm of the gradient; None for no clipping.
    """

    module: Any
    optimizer: torch.optim.Optimizer
    clip: float | None

    def step(self, batch: Any, index: int, random: dict[str, Any]) -> None:
        """Take a step on a batch, with the random generators in a given state."""
        set_random_state(random)
        self.optimizer.step(lambda: self._differentiate(batch, index))  # type: ignore[arg-type, return-value]

    def _differentiate(self, batch: Any, index: int) -> Tensor:
        hyperparameters: HyperparameterSet = self.module.hyperparameters
        self.optimizer.zero_grad()
        # Without a sample a centred set reads base weights alone, so that no response weight gets a gradient.
        run = Pass(values=hyperparameters.bound_values(hyperparameters.current()))
        with torch.enable_grad(), hyperparameters.running(run):
            loss = check_loss(self.module.training_loss(batch, index), "training_loss")
            loss.backward()  # type: ignore[no-untyped-call]
        if self.clip is not None:
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            nn.utils.clip_grad_norm_(weights, self.clip)
        return loss


def copy_shifted(
    reader: str, module: Any, name: str | None, shift: float, factory: WeightOptimizer | None, clip: float | None
) -> Copy:
    """A copy of a module with one hyperparameter shifted, and with the effective weights of the module.

    Args:
        reader: name of the function, for error messages.
        module: the module.
        name: of the hyperparameter; None for a copy without a shift.
        shift: distance, unconstrained units.
        factory: builds the optimiser; None for that of `configure_optimizers`.
        clip: largest norm of the gradient; None for no clipping.
    """
    copied = copy.deepcopy(module)
    copied.log = _log_nothing  # A copy that trains is in no loop of a Trainer.
    trainer = getattr(module, "_trainer", None)  # A deep copy has none, but its losses may ask it.
    if trainer is not None:
        copied.trainer = trainer
    hyperparameters: HyperparameterSet = copied.hyperparameters
    recentre(copied, hyperparameters, True)
    if name is not None:
        hyperparameters.unconstrained[hyperparameters.slices[name]] += shift
    if not copied.training:
        copied.train()
    return Copy(copied, _optimizer(reader, copied, factory), clip)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `LightningModule.log`."""


def _optimizer(reader: str, module: Any, factory: WeightOptimizer | None) -> torch.optim.Optimizer:
    """The optimiser of the weights.

    Raises:
        TypeError: the factory returns no optimiser.
        ValueError: `configure_optimizers` does not return exactly one.
    """
    if factory is None:
        found: list[torch.optim.Optimizer] = []
        apply_to_collection(module.configure_optimizers(), torch.optim.Optimizer, found.append)
        if len(found) != 1:
            raise ValueError(
                f"{reader}: expected configure_optimizers to return one optimiser, got {len(found)}; pass "
                "optimizer=functools.partial(torch.optim.SGD, lr=0.1), or another one for all weights."
            )
        return found[0]
    layers = (layer for layer in module.modules() if isinstance(layer, ResponseLayer))
    responses = {id(parameter) for layer in layers for parameter in layer.response_parameters()}
    optimizer: Any = factory([p for p in module.parameters() if p.requires_grad and id(p) not in responses])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{reader}: expected optimizer to build a torch.optim.Optimizer, got {type(optimizer).__name__}; pass "
            "functools.partial(torch.optim.SGD, lr=0.1)."
        )
    return optimizer


def train_side_by_side(reader: str, module: Any, copies: Sequence[Copy], loader: Iterable[Any], steps: int) -> None:
    """Train copies of a module, each batch with all of them before the next.

    Args:
        reader: name of the function, for error messages.
        module: the module whose batch-transfer hooks batches pass through.
        copies: what trains.
        loader: yields training batches; it is read again where it ends early.
        steps: number of batches.

    Raises:
        ValueError: the loader is empty.
    """
    done = 0
    while done < steps:
        before = done
        for index, batch in enumerate(loader):
            with trainer_stage(module, training=True):
                moved = transfer(module, batch)
                random = random_state()
                for one in copies:
                    one.step(moved, index, random)
            done += 1
            if done == steps:
                return
        if done == before:
            raise ValueError(f"{reader}: expected train_loader to yield batches, got none; pass a loader with data.")
