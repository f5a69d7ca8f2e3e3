"""Colour jitter: draws from torchvision's ranges, and each example equal to scalar references."""

import colorsys
import math
from itertools import permutations
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from kornia import enhance
from torch import Tensor

from lightning_stn.augment import ColorJitter
from lightning_stn.augment.color import OPERATIONS, color_jitter

TORCHVISION = {
    "brightness": tvf.adjust_brightness,
    "contrast": tvf.adjust_contrast,
    "saturation": tvf.adjust_saturation,
    "hue": tvf.adjust_hue,
}
GREY = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]


def images(channels: int = 3, n: int = 6) -> Tensor:
    return torch.rand(n, channels, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def amounts(operation: str, n: int = 6) -> Tensor:
    if operation == "hue":
        return torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    return torch.linspace(0.0, 2.0, n, dtype=torch.float64)


def formula(operation: str, image: Tensor, amount: float) -> Tensor:
    """One example in float64, `[c, height, width]`."""
    grey = (image * GREY).sum(0, keepdim=True) if len(image) == 3 else image
    if operation == "brightness":
        return (image * amount).clamp(0, 1)
    if operation == "contrast":
        return (image * amount + grey.mean() * (1 - amount)).clamp(0, 1)
    if operation == "saturation":
        return (image * amount + grey * (1 - amount)).clamp(0, 1)
    if len(image) == 1:
        return image
    turned = [shift_hue(*pixel, amount) for pixel in image.flatten(1).T.tolist()]
    return torch.tensor(turned, dtype=torch.float64).T.reshape(image.shape)


def shift_hue(red: float, green: float, blue: float, shift: float) -> tuple[float, float, float]:
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_color_jitter_equals_the_formula_for_each_example(operation: str, channels: int) -> None:
    input, amount = images(channels), amounts(operation)
    output = color_jitter(input, {operation: amount})
    for row, image, number in zip(output, input, amount.tolist(), strict=True):
        torch.testing.assert_close(row, formula(operation, image, number), rtol=0, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_color_jitter_equals_torchvision_for_each_example(operation: str, channels: int) -> None:
    """The tolerance allows for torchvision's weight of red in a grey value, 0.2989, and its hue shifts in float32."""
    input, amount = images(channels), amounts(operation)
    output = color_jitter(input, {operation: amount})
    for row, image, number in zip(output, input, amount.tolist(), strict=True):
        grey = channels == 3 and operation in ("contrast", "saturation")
        atol = 1e-4 * abs(1 - number) + 1e-9 if grey else 2e-6
        torch.testing.assert_close(row, TORCHVISION[operation](image, number), rtol=0, atol=atol)


@pytest.mark.parametrize("order", list(permutations(OPERATIONS))[::5])
def test_color_jitter_applies_operations_in_the_given_order(order: tuple[str, ...]) -> None:
    input = images()
    drawn = {name: amounts(name)[torch.randperm(6, generator=torch.Generator().manual_seed(2))] for name in order}
    output = color_jitter(input, drawn, order)
    for index, (row, image) in enumerate(zip(output, input, strict=True)):
        for name in order:
            image = formula(name, image, drawn[name][index].item())
        torch.testing.assert_close(row, image, rtol=0, atol=1e-6)


def test_color_jitter_applies_the_drawn_amounts_in_the_drawn_order() -> None:
    """Reference: Kornia on each example alone."""
    module = ColorJitter(0.9, 0.8, 0.7, 0.4)
    input = images()
    torch.manual_seed(5)
    output = module(input)
    torch.manual_seed(5)
    order = [OPERATIONS[index] for index in torch.randperm(4).tolist()]
    drawn = module.draw(input)
    kornia = {
        "brightness": enhance.adjust_brightness_accumulative,
        "contrast": enhance.adjust_contrast_with_mean_subtraction,
        "saturation": enhance.adjust_saturation_with_gray_subtraction,
        "hue": lambda image, shift: enhance.adjust_hue(image, shift * 2 * math.pi),
    }
    for index in range(6):
        image = input[index : index + 1]
        for name in order:
            image = kornia[name](image, drawn[name][index : index + 1])
        torch.testing.assert_close(output[index : index + 1], image, rtol=0, atol=1e-12)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_color_jitter_of_bytes_rounds_once(operation: str) -> None:
    """Torchvision truncates between operations and truncates grey values, and so may be two levels apart."""
    input = (255 * images()).round().to(torch.uint8)
    amount = amounts(operation)
    output = color_jitter(input, {operation: amount})
    for row, image, number in zip(output, input, amount.tolist(), strict=True):
        exact = 255 * formula(operation, image.double() / 255, number)
        assert (row - exact).abs().max() <= 0.5 + 1e-3
        if operation != "hue":
            assert (row.int() - TORCHVISION[operation](image, number).int()).abs().max() <= 2


def test_hue_shift_keeps_grey_colours() -> None:
    grey = torch.rand(2, 1, 4, 4, dtype=torch.float64).expand(-1, 3, -1, -1)
    shifted = color_jitter(grey, {"hue": torch.tensor([0.3, -0.5])})
    torch.testing.assert_close(shifted, grey, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_color_jitter_draws_from_the_range_of_each_example(bind_values: Any, operation: str, value: float) -> None:
    """Six standard errors of mean and variance: a false alarm in fewer than one of 10^7 runs of all cases."""
    torch.manual_seed(0)
    value = value / 3 if operation == "hue" else value
    n = 20_000
    module = ColorJitter(**{operation: operation})
    # Every second example has another strength.
    bind_values(module, **{operation: torch.tensor([value, 0.1]).repeat(n)})
    drawn = module.draw(torch.empty(2 * n, 3, 1, 1))[operation][::2].double()
    low, high = (-value, value) if operation == "hue" else (max(0.0, 1 - value), 1 + value)
    middle, half = (low + high) / 2, (high - low) / 2
    assert drawn.min() >= low - 1e-6
    assert drawn.max() <= high + 1e-6
    assert abs(drawn.mean() - middle) <= 6 * half / math.sqrt(3 * n) + 1e-7
    assert abs((drawn - middle).square().mean() - half**2 / 3) <= 6 * half**2 * math.sqrt(4 / 45 / n) + 1e-7


def test_brightness_factors_have_the_spread_of_each_example(bind_values: Any) -> None:
    """Six standard errors: a false alarm in fewer than one of 10^7 runs."""
    torch.manual_seed(0)
    n, values = 5000, torch.tensor([0.0, 0.2, 0.5, 0.9])
    module = ColorJitter(brightness="brightness")
    bind_values(module, brightness=values.repeat(n))
    factors = module(torch.full((4 * n, 1, 1, 1), 0.25)).double().reshape(n, 4) / 0.25
    squares = (factors - 1).square().mean(0)
    assert ((squares - values.square() / 3).abs() <= 6 * values.square() * math.sqrt(4 / 45 / n)).all()
    assert squares[0] == 0


def test_color_jitter_draws_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 draws miss one of the 24 orders in about one of 10^6 runs."""
    torch.manual_seed(0)
    seen: set[tuple[str, ...]] = set()
    monkeypatch.setattr(
        "lightning_stn.augment.color.color_jitter", lambda input, drawn, order: seen.add(tuple(order)) or input
    )
    module = ColorJitter(0.1)
    for _ in range(400):
        module(torch.ones(1, 1, 1, 1))
    assert seen == set(permutations(OPERATIONS))
