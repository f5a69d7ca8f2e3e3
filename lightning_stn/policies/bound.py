"""Replayed values in a `HyperparameterSet`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.specifications import Value


def move(hyperparameters: HyperparameterSet, values: Mapping[str, Value]) -> None:
    """Set the current hyperparameters to values, natural units, one for each name of the set."""
    kinds = hyperparameters.specifications
    entries = [entry for name, kind in kinds.items() for entry in kind.entries(values[name])]
    hyperparameters.unconstrained.copy_(torch.tensor(entries, dtype=torch.float64, device="cpu"))


def as_tensors(
    hyperparameters: HyperparameterSet, values: Mapping[str, Value], device: torch.device
) -> dict[str, Tensor]:
    """Values as regularisers read them in a `Pass`: scalar tensors by name, of a choice its index.

    They are made from the values and not from `lambda`, so that they are equal to constants to the last bit.
    """
    read = hyperparameters.constrain(hyperparameters.unconstrained)
    numbers = {
        name: value if not isinstance(value := values[name], str) else kind.parts.index(value)
        for name, kind in hyperparameters.specifications.items()
    }
    return {name: torch.full_like(read[name], number, device=device) for name, number in numbers.items()}
