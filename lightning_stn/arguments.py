"""Checks of arguments that several modules share."""

import math
from typing import Any

import torch

LARGEST = torch.finfo(torch.float32).max
"""Largest number that float32 holds, in which hyperparameters and strengths are computed."""

SMALLEST = torch.finfo(torch.float32).tiny
"""Smallest positive number that float32 holds in full precision; many devices take smaller ones for zero."""


def is_number(value: Any) -> bool:
    """Whether a value is a plain Python number, not a bool, that is finite in float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_whole(value: Any, least: float = -math.inf, most: float = 2**63 - 1) -> bool:
    """Whether a value is a plain Python int, not a bool, from `least` to `most`; by default the int64 of torch."""
    return isinstance(value, int) and not isinstance(value, bool) and max(least, -(2**63)) <= value <= most


def require_bool(reader: str, name: str, value: Any) -> bool:
    """Return an argument that is a bool.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{reader}: expected {name} to be True or False, got {value!r}; give one of them.")
    return value


def require_number(reader: str, name: str, value: Any) -> float:
    """Return an argument that is a number of float32, as a float.

    Raises:
        ValueError: it is not one.
    """
    if not is_number(value):
        raise ValueError(f"{reader}: expected {name} to be a finite number of float32, got {value!r}; give one.")
    return float(value)  # torch reads no int beyond int64
