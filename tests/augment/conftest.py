"""Fixture that binds exact values to the strengths of an augmentation."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_stn import Float, HyperparameterSet
from lightning_stn.augment import Augmentation
from lightning_stn.binding import attach_all, bind_weight_phase

BindValues = Callable[..., HyperparameterSet]


@pytest.fixture
def bind_values() -> BindValues:
    """Attach a module to hyperparameters named as its strengths, and bind values: one, or one for each example."""

    def bind_values(module: Augmentation, **values: Any) -> HyperparameterSet:
        ranges = {name: (low, None if high == math.inf else high) for name, (low, high) in module.ranges.items()}
        hyperparameters = HyperparameterSet({name: Float(*bounds, init=0.1) for name, bounds in ranges.items()})
        attach_all(module, hyperparameters)
        bind_weight_phase(hyperparameters, hyperparameters.current())
        bound = hyperparameters.current_pass
        assert bound.values is not None
        assert values.keys() <= bound.values.keys()
        changed = {name: torch.as_tensor(value) for name, value in values.items()}
        hyperparameters.current_pass = replace(bound, values={**bound.values, **changed})
        return hyperparameters

    return bind_values
