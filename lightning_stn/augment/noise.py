"""Additive noise for every entry, and a random scale for every example."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_stn import functional
from lightning_stn.augment.base import Augmentation, draw_factor, in_float


class GaussianNoise(Augmentation):
    """Adds independent Gaussian noise to every entry.

    Args:
        std: standard deviation, in the units of the input (grey levels for uint8): a hyperparameter's name, or a
            constant.

    Shape:
        `[n, *]` to the same shape.

    Raises:
        ValueError: a constant is negative, or the input is neither floating point nor uint8.
    """

    ranges: ClassVar = {"std": (0, math.inf)}

    def __init__(self, std: str | float) -> None:
        super().__init__()
        self.std = self.checked("std", std)

    def forward(self, input: Tensor) -> Tensor:
        """Add noise in the weight phase; otherwise return the input."""
        if not self.active or self.all_off:
            return input
        std = functional.align(self.rows("std", input), input)
        noise = torch.randn(input.shape, dtype=torch.float32, device=input.device) * std
        return in_float(input, lambda wide: wide + noise)


class InputScale(Augmentation):
    """Multiplies each example by a factor drawn uniformly from `[1 - s, 1 + s]`.

    Args:
        scale: `s` in [0, 1]: a hyperparameter's name, or a constant.

    Shape:
        `[n, *]` to the same shape.

    Raises:
        ValueError: a constant is outside [0, 1], or the input is neither floating point nor uint8.
    """

    ranges: ClassVar = {"scale": (0, 1)}

    def __init__(self, scale: str | float) -> None:
        super().__init__()
        self.scale = self.checked("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        """Scale each example in the weight phase; otherwise return the input."""
        if not self.active or self.all_off:
            return input
        factor = functional.align(draw_factor(self.rows("scale", input)), input)
        return in_float(input, lambda wide: wide * factor)
