"""Random erasing with a probability for each example."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_stn.arguments import is_number, require_number
from lightning_stn.augment.base import Augmentation, box_mask, fill_boxes

ATTEMPTS = 10
"""Number of rectangles drawn for each example, of which the first that fits is erased; torchvision's number."""


class RandomErasing(Augmentation):
    """Blanks a rectangle with a tuned probability, Zhong et al. (2020), arXiv:1708.04896, as torchvision draws it.

    The draws differ between examples. An example is unchanged if none of ten rectangles fits into it.

    Args:
        p: probability of erasing, in [0, 1]: the name of a hyperparameter, or a constant.
        scale: smallest and largest area, as fractions of the image area.
        ratio: smallest and largest height over width, drawn with a uniform logarithm.
        value: value written into the rectangle, in the units of the images.

    Shape:
        images `[n, c, height, width]` to the same shape.

    Raises:
        ValueError: an argument is out of range, or the input does not have four dimensions.
    """

    ranges: ClassVar = {"p": (0, 1)}

    def __init__(
        self,
        p: str | float,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float = 0.0,
    ) -> None:
        super().__init__()
        if not (_is_pair(scale) and 0 <= scale[0] <= scale[1] <= 1):
            raise ValueError(f"RandomErasing: expected scale to be (low, high) within [0, 1], got {scale!r}.")
        if not (_is_pair(ratio) and 0 < ratio[0] <= ratio[1]):
            raise ValueError(f"RandomErasing: expected ratio to be (low, high) with 0 < low <= high, got {ratio!r}.")
        self.p = self.checked("p", p)
        self.scale = scale
        self.ratio = ratio
        self.value = require_number("RandomErasing", "value", value)

    def draw(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a box for each example, `start` and `end` as for `box_mask`, `[n, 2]`; equal where nothing is erased."""
        n, _, height, width = input.shape
        size = torch.tensor([height, width], dtype=torch.float32, device=input.device)

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(n, ATTEMPTS, device=input.device, dtype=torch.float32) * (high - low) + low

        area = uniform(*self.scale) * height * width
        ratio = uniform(math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        sides = torch.stack([area * ratio, area / ratio], dim=2).sqrt().round()
        fits = (sides < size).all(2)
        first = fits.int().argmax(1)  # index of the first rectangle that fits, or 0
        side = sides[torch.arange(n, device=input.device), first]
        erased = fits.any(1) & (torch.rand(n, device=input.device, dtype=torch.float32) < self.rows("p", input))
        side = side * erased.unsqueeze(1)
        start = (
            (torch.rand(n, 2, device=input.device, dtype=torch.float32) * (size - side + 1))
            .floor()
            .minimum(size - side)
        )
        return start, start + side

    def forward(self, input: Tensor) -> Tensor:
        """Erase rectangles in the weight phase; otherwise return the input."""
        self.check_images(input)
        if not self.active or self.all_off:
            return input
        start, end = self.draw(input)
        return fill_boxes(input, box_mask(start.unsqueeze(1), end.unsqueeze(1), *input.shape[-2:]), self.value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))
