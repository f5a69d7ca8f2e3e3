"""Additive noise with a standard deviation of its own for each example."""

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.binding import Regularizer


class GaussianNoise(Regularizer):
    """Adds independent Gaussian noise to every entry.

    Args:
        std: standard deviation, in the units of the input: a hyperparameter's name, or a constant.

    Shape:
        `[n, *]` to the same shape.

    Raises:
        ValueError: a constant standard deviation is negative.
    """

    strengths = ("std",)

    def __init__(self, std: str | float) -> None:
        nn.Module.__init__(self)
        if not isinstance(std, str) and std < 0:
            raise ValueError(f"GaussianNoise: expected std to be a name or at least 0, got {std!r}.")
        self.std = std

    def forward(self, input: Tensor) -> Tensor:
        """Add noise, in the weight phase; otherwise return the input."""
        if not self.active:
            return input
        std = torch.as_tensor(self.strength("std"), device=input.device)
        return input + torch.randn_like(input) * functional.align(std, input).to(input.dtype)
