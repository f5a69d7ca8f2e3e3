"""The saved state of a `HyperparameterSet`: its entries, and why one cannot be loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TENSORS = ("unconstrained", "raw_scale")
"""Tensors of the state dict, `[h]` each."""

COORDINATES = ("centred", "gate_scale")
"""A bool and a positive float of the state dict: how gates count."""


def misfits(state_dict: Mapping[str, Any], prefix: str, own: Tensor, names: Sequence[str]) -> list[str]:
    """Why a saved state cannot be loaded, in words; entries that are missing are left to torch.

    Args:
        state_dict: the saved state.
        prefix: begins the keys of the set.
        own: `lambda` of the set, `[h]`.
        names: of the hyperparameters.
    """
    found = []
    for key, value in ((prefix + name, state_dict[prefix + name]) for name in TENSORS if prefix + name in state_dict):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found.append(f"{key}: expected a tensor of floats, got {value!r}; load another checkpoint.")
        elif value.shape != own.shape:
            found.append(
                f"{key} has {value.numel()} entries, but the hyperparameters {list(names)} have {own.numel()}; load it "
                "into a module with the hyperparameters that it was saved with."
            )
        elif not torch.isfinite(value).all():
            found.append(f"{key}: expected finite numbers, got {value.tolist()}; load another checkpoint.")
    for name, expected, fits in (
        ("centred", "True or False", lambda number: number in (0, 1)),
        ("gate_scale", "a positive number", lambda number: 0 < number < float("inf")),
    ):
        value = state_dict.get(prefix + name, 1)
        if not isinstance(value, bool | int | float | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
            found.append(f"{prefix}{name}: expected {expected}, got {value!r}; load another checkpoint.")
        elif not fits(float(value)):
            found.append(f"{prefix}{name}: expected {expected}, got {float(value)!r}; load another checkpoint.")
    return found
