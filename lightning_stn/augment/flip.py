"""Horizontal flips with a probability for each example."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_stn import functional
from lightning_stn.augment.base import Augmentation


class RandomHorizontalFlip(Augmentation):
    """Mirrors images left to right with a tuned probability.

    Args:
        p: probability of a flip, in [0, 1]: the name of a hyperparameter, or a constant.

    Shape:
        images `[n, c, height, width]` to the same shape.

    Raises:
        ValueError: a constant is outside [0, 1], or the input does not have four dimensions.
    """

    ranges: ClassVar = {"p": (0, 1)}

    def __init__(self, p: str | float) -> None:
        super().__init__()
        self.p = self.checked("p", p)

    def forward(self, input: Tensor) -> Tensor:
        """Flip images in the weight phase; otherwise return the input."""
        self.check_images(input)
        if not self.active or self.all_off:
            return input
        p = self.rows("p", input)
        return torch.where(functional.align(torch.rand_like(p) < p, input), input.flip(-1), input)
