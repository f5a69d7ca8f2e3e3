"""Decimal numbers as people write them: the shortest that stand for what float32 holds."""

import numpy
import torch
from torch import Tensor


def shortest(number: float) -> float:
    """The shortest decimal number that float32 rounds to the same as `number`.

    Example:
        >>> shortest(0.05000000074505806)
        0.05
    """
    return float(str(numpy.float32(number)))


def shortest_between(low: float, number: float, high: float) -> float:
    """The shortest decimal number strictly between two, and of these the nearest to `number`, which is one of them.

    Example:
        >>> shortest_between(0.0499999, 0.0500000007, 0.0500001)
        0.05
    """
    for digits in range(1, 17):
        rounded = float(f"{number:.{digits}g}")
        if low < rounded < high:
            return rounded
    return number


def half_spacing(numbers: Tensor) -> Tensor:
    """Half the distance from numbers to the nearest others that float32 holds, a little less for safety, in float64."""
    own = numbers.float()
    return 0.49 * (own.double() - torch.nextafter(own, torch.zeros_like(own)).double()).abs()
