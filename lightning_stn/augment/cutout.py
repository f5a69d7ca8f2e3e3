"""Cutout with a side length of its own for each example."""

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.binding import Regularizer


def cutout_mask(length: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in an example's square; squares are clipped at the border.

    Args:
        length: side of the square in pixels, `[n]`; 0 for none.
        centre: row and column of the square's centre pixel, `[n, 2]`.
        height: rows.
        width: columns.

    Returns:
        `[n, 1, height, width]`, bool.
    """
    start = centre - torch.div(length, 2, rounding_mode="floor").unsqueeze(-1)
    end = start + length.unsqueeze(-1)

    def inside(axis: int, size: int) -> Tensor:
        position = torch.arange(size, device=length.device)
        return (position >= start[:, axis, None]) & (position < end[:, axis, None])

    return (inside(0, height)[:, :, None] & inside(1, width)[:, None, :]).unsqueeze(1)


class Cutout(Regularizer):
    """Blanks one square a image at a uniformly drawn place, DeVries and Taylor (2017), arXiv:1708.04552.

    Args:
        length: side in pixels: the name of a hyperparameter (`Integer(0, ...)`), or a constant.
        fill: the value written into the square.

    Shape:
        images `[n, c, height, width]` to the same shape.

    Raises:
        ValueError: the input has not four dimensions, or a constant length is negative.
    """

    strengths = ("length",)

    def __init__(self, length: str | int, fill: float = 0.0) -> None:
        nn.Module.__init__(self)
        if not isinstance(length, str) and length < 0:
            raise ValueError(f"Cutout: expected length to be a name or at least 0 pixels, got {length!r}.")
        self.length = length
        self.fill = fill

    def forward(self, input: Tensor) -> Tensor:
        """Blank, in the weight phase; otherwise return the input."""
        if input.dim() != 4:
            raise ValueError(f"Cutout: expected images [n, c, height, width], got shape {list(input.shape)}.")
        if not self.active:
            return input
        n, _, height, width = input.shape
        length = torch.as_tensor(self.strength("length"), device=input.device)
        length = functional.align(length, input).reshape(-1).expand(n)
        size = torch.tensor([height, width], device=input.device)
        centre = (torch.rand(n, 2, device=input.device) * size).long()
        return input.masked_fill(cutout_mask(length, centre, height, width), self.fill)
