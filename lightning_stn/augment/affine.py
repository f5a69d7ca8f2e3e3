"""Rotation, translation, scaling and shear, drawn for each example from its own ranges."""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_stn import functional
from lightning_stn.arguments import require_number
from lightning_stn.augment.base import Augmentation, draw_factor, draw_shift, in_float

SMALLEST_FACTOR = 1e-3
"""Lower bound of the scale factor: scaling by 0 has no inverse."""


class Motion(NamedTuple):
    """Affine motion of each example: rotation, scaling and shear about the image centre, then translation.

    Args:
        angle: clockwise, degrees, `[n]`.
        translation: to the right and down, pixels, `[n, 2]`.
        factor: of the scaling, positive, `[n]`.
        shear: along the rows, degrees, `[n]`.
    """

    angle: Tensor
    translation: Tensor
    factor: Tensor
    shear: Tensor

    def moves(self) -> Tensor:
        """Whether each example changes, bool, `[n]`."""
        return (self.angle != 0) | (self.translation != 0).any(1) | (self.factor != 1) | (self.shear != 0)

    def inverse(self, dtype: torch.dtype) -> Tensor:
        """Map from output to input pixels, `[n, 2, 3]`, in pixels about the image centre.

        With `M = R(angle) Shear factor`, the output pixel `p` shows the input at `M^-1 (p - translation)`; `M / factor`
        has determinant 1.
        """
        angle, shear = torch.deg2rad(self.angle.to(dtype)), torch.deg2rad(self.shear.to(dtype))
        a, c = angle.cos(), angle.sin()
        b, d = -a * shear.tan() - c, a - c * shear.tan()
        linear = torch.stack([d, -b, -c, a], dim=1).reshape(-1, 2, 2) / self.factor.to(dtype)[:, None, None]
        return torch.cat([linear, -linear @ self.translation.to(dtype).unsqueeze(2)], dim=2)


def affine(
    images: Tensor, motion: Motion, interpolation: Literal["bilinear", "nearest"] = "bilinear", fill: float = 0.0
) -> Tensor:
    """Rotate, scale, shear and translate each example by its own amounts.

    Equals `torchvision.transforms.v2.functional.affine`, except at the border under bilinear interpolation with a
    `fill` other than 0: torchvision blends image and fill with the squared weight.

    Args:
        images: `[n, c, height, width]`, floating point or uint8.
        motion: amounts of each example; an example that does not move is unchanged bit for bit.
        interpolation: between pixels.
        fill: value beyond the border, in the units of the images.

    Returns:
        Images of the same shape and dtype.
    """
    height, width = images.shape[-2:]
    moves = functional.align(motion.moves(), images)

    def compute(wide: Tensor) -> Tensor:
        # grid_sample takes coordinates that run from -1 to 1 over the image.
        half = torch.tensor([width / 2, height / 2], dtype=wide.dtype, device=wide.device)
        theta = motion.inverse(wide.dtype) * torch.cat([half, half.new_ones(1)]) / half.unsqueeze(1)
        grid = F.affine_grid(theta, list(wide.shape), align_corners=False)
        shifted = wide - fill if fill else wide  # so that the zeros beyond the border become the fill
        moved = F.grid_sample(shifted, grid, interpolation, "zeros", align_corners=False)
        return torch.where(moves, moved + fill if fill else moved, wide)

    with torch.autocast(images.device.type, enabled=False):
        return in_float(images, compute) if images.numel() else images


class RandomAffine(Augmentation):
    """Rotates, translates, scales and shears, with the ranges of torchvision's `RandomAffine`.

    Unlike in torchvision, translations are not rounded to whole pixels, one fraction bounds both directions, the scale
    is given as a distance from 1, and the draws differ between examples.

    Args:
        degrees: `r`, at least 0; the angle is uniform in `[-r, r]` degrees.
        translate: `t` in [0, 1]; the shifts are uniform in `[-t * width, t * width]` and `[-t * height, t * height]`.
        scale: `s` in [0, 1]; the factor is uniform in `[1 - s, 1 + s]`, and at least 0.001.
        shear: `z` in [0, 90]; the shear along the rows is uniform in `[-z, z]` degrees.
        interpolation: between pixels.
        fill: value beyond the border, in the units of the images.

    The first four are hyperparameter names or constants; the constant 0 leaves the operation out.

    Shape:
        images `[n, c, height, width]`, floating point or uint8, to the same.

    Raises:
        ValueError: a constant is out of range, the interpolation is unknown, or the input is not a batch of images.
    """

    ranges: ClassVar = {"degrees": (0, math.inf), "translate": (0, 1), "scale": (0, 1), "shear": (0, 90)}

    def __init__(
        self,
        degrees: str | float = 0.0,
        translate: str | float = 0.0,
        scale: str | float = 0.0,
        shear: str | float = 0.0,
        interpolation: Literal["bilinear", "nearest"] = "bilinear",
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        if interpolation not in ("bilinear", "nearest"):
            raise ValueError(f"RandomAffine: expected interpolation 'bilinear' or 'nearest', got {interpolation!r}.")
        self.degrees = self.checked("degrees", degrees)
        self.translate = self.checked("translate", translate)
        self.scale = self.checked("scale", scale)
        self.shear = self.checked("shear", shear)
        self.interpolation = interpolation
        self.fill = require_number("RandomAffine", "fill", fill)

    def draw(self, input: Tensor) -> Motion:
        """Draw the motion of each example."""
        zeros = torch.zeros(input.shape[:1], dtype=torch.float32, device=input.device)
        degrees, across, down, shear = (
            zeros if self.is_off(name) else draw_shift(self.rows(name, input))
            for name in ("degrees", "translate", "translate", "shear")
        )
        factor = zeros + 1 if self.is_off("scale") else draw_factor(self.rows("scale", input), SMALLEST_FACTOR)
        height, width = input.shape[-2:]
        return Motion(degrees, torch.stack([across * width, down * height], dim=1), factor, shear)

    def forward(self, input: Tensor) -> Tensor:
        """Transform the images in the weight phase; otherwise return the input."""
        self.check_images(input)
        if not self.active or self.all_off:
            return input
        return affine(input, self.draw(input), self.interpolation, self.fill)
