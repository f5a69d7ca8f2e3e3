"""Base class of augmentations, and their shared helpers: precision, draws and box masks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.regularizer import Regularizer


class Augmentation(Regularizer):
    """Base class of modules that augment a batch on its device, each example at its own sampled strength.

    Random numbers come from torch's global generators, so results do not depend on the workers of a loader. A
    strength that is the constant 0 costs nothing.

    A subclass defines `ranges`, passes its strengths through `checked` in the constructor, and reads them by `rows`.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def is_off(self, name: str) -> bool:
        """Whether a strength is the constant 0."""
        return bool(self.given(name) == 0)

    @property
    def all_off(self) -> bool:
        """Whether every strength is the constant 0."""
        return all(map(self.is_off, self.strengths))

    def rows(self, name: str, input: Tensor) -> Tensor:
        """The strength of each example of the input: `[n]`, float32, natural units.

        Raises:
            ValueError: the bound sample has neither one row nor a row per example.
        """
        value = self.strength(name)
        if isinstance(value, Tensor):
            value = value.to(input.device, torch.float32)
            return functional.align(value, input).flatten().expand(input.shape[0])
        return torch.full(input.shape[:1], value, dtype=torch.float32, device=input.device)

    def check_images(self, input: Tensor, channels: tuple[int, ...] | None = None) -> None:
        """Refuse an input that is not a batch of images.

        Raises:
            ValueError: the input does not have four dimensions, or has another number of channels.
        """
        if input.dim() != 4:
            raise ValueError(
                f"{type(self).__name__}: expected images [n, c, height, width], got shape {list(input.shape)}; "
                "reshape it to four dimensions."
            )
        if channels is not None and input.shape[1] not in channels:
            raise ValueError(
                f"{type(self).__name__}: expected {' or '.join(map(str, channels))} channels in dimension 1, got shape "
                f"{list(input.shape)}; permute the dimensions, or pass the colour channels alone."
            )


def draw_shift(most: Tensor) -> Tensor:
    """Uniform draws from `[-most, most]`, one for each entry."""
    return most * (2 * torch.rand_like(most) - 1)


def draw_factor(strength: Tensor, least: float = 0.0) -> Tensor:
    """Uniform draws from `[max(least, 1 - s), 1 + s]`, one for each strength `s`; exactly 1 where `s` is 0."""
    low = (1 - strength).clamp_min(least)
    return torch.addcmul(low, torch.rand_like(strength), 1 + strength - low)


def in_float(input: Tensor, compute: Callable[[Tensor], Tensor], *, unit: bool = False) -> Tensor:
    """Apply a function in float32 or wider, and convert its result to the dtype of the input.

    Args:
        input: floating point, or uint8.
        compute: the function, from and to floating point.
        unit: whether the function gets bytes scaled to [0, 1] instead of 0..255.

    Returns:
        The result in the dtype of the input; bytes are clamped to 0..255 and rounded.

    Raises:
        ValueError: the input is neither floating point nor uint8.
    """
    if input.is_floating_point():
        return compute(input.to(torch.promote_types(input.dtype, torch.float32))).to(input.dtype)
    if input.dtype != torch.uint8:
        raise ValueError(
            f"Expected a floating point dtype or uint8, got {input.dtype}; convert the input before augmentation."
        )
    result = compute(input.float() / 255) * 255 if unit else compute(input.float())
    return result.clamp(0, 255).round().to(torch.uint8)


def fill_boxes(images: Tensor, mask: Tensor, value: float) -> Tensor:
    """Write a value where the mask is set.

    Raises:
        ValueError: the images are uint8, and the value is not a whole number from 0 to 255.
    """
    if images.dtype == torch.uint8 and not (0 <= value <= 255 and float(value).is_integer()):
        raise ValueError(
            f"Expected a fill value among the whole numbers 0..255 for uint8 images, got {value!r}; change it, or "
            "convert the images to floating point."
        )
    return images.masked_fill(mask, value)


def box_mask(start: Tensor, end: Tensor, height: int, width: int) -> Tensor:
    """Mask of the pixels inside at least one box of each example; boxes are clipped at the border.

    Args:
        start: row and column of the first pixel inside, `[n, k, 2]`.
        end: row and column one past the last pixel inside, `[n, k, 2]`.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        `[n, 1, height, width]`, bool.
    """

    def inside(axis: int, size: int) -> Tensor:
        position = torch.arange(size, device=start.device)
        return ((position >= start[..., axis, None]) & (position < end[..., axis, None])).float()

    boxes_at_pixel = inside(0, height).transpose(1, 2) @ inside(1, width)
    return (boxes_at_pixel > 0).unsqueeze(1)
