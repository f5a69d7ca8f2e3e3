"""Cutout with a side length and a number of holes for each example."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_stn.arguments import is_whole, require_number
from lightning_stn.augment.base import Augmentation, box_mask, fill_boxes
from lightning_stn.hyperparameters import HyperparameterSet

MOST_HOLES = 4096
"""Largest number of squares that are drawn for an image."""


def cutout_mask(length: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """Mask of the pixels inside at least one square of each example; squares are clipped at the border.

    Args:
        length: side of each square in pixels, `[n]` or `[n, k]`; 0 for none.
        centre: row and column of each square's centre pixel, `[n, 2]` or `[n, k, 2]`.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        `[n, 1, height, width]`, bool.
    """
    if length.dim() == 1:
        length, centre = length.unsqueeze(1), centre.unsqueeze(1)
    start = centre - torch.div(length, 2, rounding_mode="floor").unsqueeze(-1)
    return box_mask(start, start + length.unsqueeze(-1), height, width)


class Cutout(Augmentation):
    """Blanks squares at uniformly drawn places, DeVries and Taylor (2017), arXiv:1708.04552.

    The squares of an example have the same length, and may overlap.

    Args:
        length: side in pixels: the name of a hyperparameter (`Integer(0, ...)`), or a constant.
        holes: number of squares: the name of a hyperparameter (`Integer(0, ...)`), or a constant.
        fill: the value written into the squares, in the units of the images.
        max_holes: largest number of squares in an image; None takes the upper bound of the hyperparameter's range.

    Shape:
        images `[n, c, height, width]` to the same shape.

    Raises:
        ValueError: a constant is negative, the number of holes has no upper bound, or the input does not have four
            dimensions.
    """

    ranges: ClassVar = {"length": (0, math.inf), "holes": (0, math.inf)}

    def __init__(
        self, length: str | float, holes: str | float = 1, fill: float = 0.0, *, max_holes: int | None = None
    ) -> None:
        super().__init__()
        if max_holes is not None and not is_whole(max_holes, 0, MOST_HOLES):
            raise ValueError(
                f"Cutout: expected max_holes to be at least 0, got {max_holes!r}; give a whole number of at most "
                f"{MOST_HOLES}."
            )
        self.length = self.checked("length", length)
        self.holes = self.checked("holes", holes)
        if not isinstance(holes, str) and holes > MOST_HOLES:
            raise ValueError(f"Cutout: expected holes of at most {MOST_HOLES}, got {holes!r}; give a whole number.")
        self.fill = require_number("Cutout", "fill", fill)
        self.max_holes = max_holes if isinstance(holes, str) else math.ceil(holes)

    def attach(self, hyperparameters: HyperparameterSet, name: str = "") -> None:
        """Read the hyperparameters of this set from now on.

        Raises:
            KeyError: this module reads a hyperparameter that the set does not have.
            ValueError: a hyperparameter's range exceeds that of its strength, or the number of holes has no upper
                bound.
        """
        super().attach(hyperparameters, name)
        if self._most_holes is None or self._most_holes > MOST_HOLES:
            self.detach()
            raise ValueError(
                f"Cutout {name!r}: expected an upper bound for the number of holes, but the hyperparameter "
                f"{self.holes!r} is {hyperparameters.specifications[str(self.holes)]!r}; declare an Integer, or pass "
                f"max_holes, of at most {MOST_HOLES}."
            )

    @property
    def _most_holes(self) -> int | None:
        """Number of holes to draw for each example; None where it has no upper bound."""
        if self.max_holes is not None or self.hyperparameters is None:
            return self.max_holes
        bounds = self.hyperparameters.specifications[str(self.holes)].bounds
        return None if bounds is None or bounds[1] == math.inf else math.ceil(bounds[1])

    def forward(self, input: Tensor) -> Tensor:
        """Blank squares in the weight phase; otherwise return the input."""
        self.check_images(input)
        if not self.active or self.is_off("length") or self.is_off("holes"):
            return input
        most = self._most_holes
        assert most is not None
        n, _, height, width = input.shape
        length, holes = self.rows("length", input), self.rows("holes", input)
        size = torch.tensor([height, width], device=input.device)
        centre = (torch.rand(n, most, 2, device=input.device, dtype=torch.float32) * size).long()
        cut = torch.arange(most, device=input.device) < holes.unsqueeze(1)
        return fill_boxes(input, cutout_mask(length.unsqueeze(1) * cut, centre, height, width), self.fill)
