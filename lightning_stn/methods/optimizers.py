"""Optimisers that can step hyperparameters: built, and refused in words where they cannot."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Builds an optimiser from parameter groups, each with its `params` and `lr`."""

_DECAYS = ("weight_decay", "lambd")
"""Settings of torch's optimisers that pull parameters to zero; the second is that of `ASGD`."""


def build_optimizer(factory: OptimizerFactory, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The hyperparameter optimiser.

    Raises:
        TypeError: the factory returns no optimiser.
        ValueError: the optimiser needs a closure, decays what it steps, or cannot be built from these groups.
    """
    try:
        optimizer = factory(groups)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"STNCallback(optimizer=...) cannot be built from a list of parameter groups ({error}); pass a class such "
            "as torch.optim.Adam, or a functools.partial of it."
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"Expected STNCallback(optimizer=...) to return a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; pass a class such as torch.optim.Adam, or a functools.partial of it."
        )
    name = type(optimizer).__qualname__
    if needs_closure(optimizer):
        raise ValueError(
            f"Expected STNCallback(optimizer=...) to step without a closure, got {name}, which evaluates the loss "
            "several times in a step, while a hyperparameter step has one batch; pass SharedAdam or torch.optim.Adam."
        )
    refuse_decay(name, optimizer.param_groups)
    return optimizer


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimiser evaluates the loss, as LBFGS does."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def refuse_decay(name: str, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse an optimiser that decays hyperparameters.

    Args:
        name: of its class.
        groups: its parameter groups.

    Raises:
        ValueError: a group has a weight decay.
    """
    for group in groups:
        for setting in _DECAYS:
            if group.get(setting):
                raise ValueError(
                    f"Expected STNCallback(optimizer=...) to have no weight decay, got {name} with "
                    f"{setting}={group[setting]!r}, which pulls every hyperparameter to the middle of its range, "
                    f"whatever the validation loss is; pass functools.partial({name}, {setting}=0), and to continue a "
                    "run that had it, on_resume_use=['optimizer']."
                )
