"""Brightness, contrast, saturation and hue, drawn for each example from its own ranges."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_stn import functional
from lightning_stn.augment.base import Augmentation, draw_factor, draw_shift, in_float

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""Operations of `ColorJitter`. The first three take a factor, 1 for no change; hue takes a shift, 0 for no change."""


def color_jitter(images: Tensor, amounts: Mapping[str, Tensor], order: Sequence[str] = OPERATIONS) -> Tensor:
    """Adjust the colours of each example by its own amounts.

    The arithmetic is Kornia's. It differs from torchvision's only in the weight of red in a grey value, 0.299 instead
    of 0.2989: by at most 1e-4 of the range for each unit of `1 - factor`.

    Args:
        images: `[n, 1 or 3, height, width]`, floating point in [0, 1] or uint8.
        amounts: by operation, the factors or, for hue, the shifts in turns of the colour circle, `[n]`. An example with
            a factor of 1 or a shift of 0 is unchanged bit for bit.
        order: the operations, first to last; those without an amount are skipped.

    Returns:
        Images of the same shape and dtype; examples that changed are clamped to [0, 1], or to 0..255 for uint8.
    """

    def compute(wide: Tensor) -> Tensor:
        for operation in order:
            if operation in amounts and (wide.shape[1] == 3 or operation not in ("saturation", "hue")):
                wide = _adjust(operation, wide, amounts[operation])
        return wide

    return in_float(images, compute, unit=True) if images.numel() else images


def _adjust(operation: str, images: Tensor, amount: Tensor) -> Tensor:
    from kornia import enhance  # takes a second to import

    if operation == "brightness":
        adjusted = enhance.adjust_brightness_accumulative(images, amount)
    elif operation == "contrast":
        # Expanded to three channels, since Kornia up to 0.8.3 averages images with one channel over the whole batch.
        adjusted = enhance.adjust_contrast_with_mean_subtraction(images.expand(-1, 3, -1, -1), amount)
        adjusted = adjusted[:, : images.shape[1]]
    elif operation == "saturation":
        adjusted = enhance.adjust_saturation_with_gray_subtraction(images, amount)
    else:
        adjusted = enhance.adjust_hue(images, amount * (2 * math.pi))
    unchanged = amount == (0 if operation == "hue" else 1)
    return torch.where(functional.align(unchanged, images), images, adjusted)


class ColorJitter(Augmentation):
    """Jitters brightness, contrast, saturation and hue, with the ranges of torchvision's `ColorJitter`.

    The draws differ between examples. The order of the operations is drawn once per call and shared by the batch. Apply
    it before images are normalised: colours must lie in [0, 1], and are clamped to that range.

    Args:
        brightness: `b`, at least 0; the factor is uniform in `[max(0, 1 - b), 1 + b]`.
        contrast: same range as `brightness`; the factor acts about the mean grey value of each image.
        saturation: same range as `brightness`; the factor acts about the grey value of each pixel. Images with one
            channel are unchanged.
        hue: `h` in [0, 0.5]; the shift is uniform in `[-h, h]` turns of the colour circle. Images with one channel are
            unchanged.

    Each is a hyperparameter name or a constant; the constant 0 leaves its operation out.

    Shape:
        images `[n, 1 or 3, height, width]`, floating point in [0, 1] or uint8, to the same.

    Raises:
        ValueError: a constant is out of range, or the input is not a batch of images with 1 or 3 channels.
    """

    ranges: ClassVar = {
        "brightness": (0, math.inf),
        "contrast": (0, math.inf),
        "saturation": (0, math.inf),
        "hue": (0, 0.5),
    }

    def __init__(
        self,
        brightness: str | float = 0.0,
        contrast: str | float = 0.0,
        saturation: str | float = 0.0,
        hue: str | float = 0.0,
    ) -> None:
        super().__init__()
        self.brightness = self.checked("brightness", brightness)
        self.contrast = self.checked("contrast", contrast)
        self.saturation = self.checked("saturation", saturation)
        self.hue = self.checked("hue", hue)

    def draw(self, input: Tensor) -> dict[str, Tensor]:
        """Draw the amount of each operation for each example, `[n]`."""
        return {
            name: (draw_shift if name == "hue" else draw_factor)(self.rows(name, input))
            for name in OPERATIONS
            if not self.is_off(name)
        }

    def forward(self, input: Tensor) -> Tensor:
        """Jitter the colours in the weight phase; otherwise return the input."""
        self.check_images(input, channels=(1, 3))
        if not self.active or self.all_off:
            return input
        order = [OPERATIONS[index] for index in torch.randperm(len(OPERATIONS)).tolist()]
        return color_jitter(input, self.draw(input), order)
