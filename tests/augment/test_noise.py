"""Noise, input scale and flips."""

import math
from typing import Any

import torch

from lightning_stn.augment import GaussianNoise, InputScale, RandomHorizontalFlip
from lightning_stn.augment.base import draw_factor

VALUES = [0.0, 0.1, 0.4, 0.9]


def test_input_scale_multiplies_each_example_by_its_factor(bind_values: Any) -> None:
    module = InputScale("scale")
    bind_values(module, scale=VALUES)
    input = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.manual_seed(1)
    output = module(input)
    torch.manual_seed(1)
    factor = draw_factor(torch.tensor(VALUES))
    for row, image, number in zip(output, input, factor.tolist(), strict=True):
        torch.testing.assert_close(row, image * number, rtol=0, atol=1e-12)


def test_input_scale_rounds_and_clamps_bytes(bind_values: Any) -> None:
    module = InputScale("scale")
    bind_values(module, scale=VALUES)
    input = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    torch.manual_seed(1)
    output = module(input)
    torch.manual_seed(1)
    factor = draw_factor(torch.tensor(VALUES)).double().reshape(-1, 1, 1, 1)
    assert (output.double() - (input * factor).clamp(0, 255)).abs().max() <= 0.5 + 1e-4


def test_input_scale_draws_from_the_range_of_each_example(bind_values: Any) -> None:
    """Six standard errors of mean and variance: a false alarm in fewer than one of 10^7 runs."""
    torch.manual_seed(0)
    n, scale = 20_000, torch.tensor(VALUES, dtype=torch.float64)
    module = InputScale("scale")
    bind_values(module, scale=scale.repeat(n))
    shift = module(torch.ones(4 * n, 1)).double().reshape(n, 4) - 1
    assert (shift.abs() <= scale + 1e-6).all()
    assert (shift.mean(0).abs() <= 6 * scale / math.sqrt(3 * n)).all()
    assert ((shift.square().mean(0) - scale**2 / 3).abs() <= 6 * scale**2 * math.sqrt(4 / 45 / n)).all()


def test_gaussian_noise_is_the_draw_times_the_standard_deviation_of_each_example(bind_values: Any) -> None:
    module = GaussianNoise("std")
    bind_values(module, std=VALUES)
    input = torch.randn(4, 7, dtype=torch.float64)
    torch.manual_seed(1)
    output = module(input)
    torch.manual_seed(1)
    drawn = torch.randn(4, 7)
    torch.testing.assert_close(output, input + drawn.double() * torch.tensor(VALUES)[:, None], rtol=0, atol=1e-6)


def test_gaussian_noise_of_bytes_is_in_grey_levels(bind_values: Any) -> None:
    """Six standard errors of a standard deviation, `s / sqrt(2 n)`: a false alarm in fewer than one of 10^8 runs."""
    torch.manual_seed(0)
    module = GaussianNoise("std")
    bind_values(module, std=[5.0, 20.0])
    noise = module(torch.full((2, 20_000), 128, dtype=torch.uint8)).double() - 128
    expected = torch.tensor([5.0, 20.0], dtype=torch.float64)
    rounding = 1 / 12
    assert ((noise.var(1) - rounding).sqrt() - expected).abs().le(6 * expected / math.sqrt(40_000)).all()
    assert module(torch.full((2, 100), 255, dtype=torch.uint8)).max() == 255


def test_horizontal_flip_flips_at_the_probability_of_each_example(bind_values: Any) -> None:
    """Six binomial standard deviations: a false alarm in fewer than one of 10^8 runs."""
    torch.manual_seed(0)
    n, p = 5000, torch.tensor([0.0, 0.1, 0.6, 1.0], dtype=torch.float64)
    module = RandomHorizontalFlip("p")
    bind_values(module, p=p.repeat(n))
    image = torch.arange(12.0).reshape(1, 3, 4)
    output = module(image.expand(4 * n, 1, 3, 4))
    flipped = (output == image.flip(-1)).flatten(1).all(1)
    assert (flipped ^ (output == image).flatten(1).all(1)).all()
    assert ((flipped.reshape(n, 4).double().mean(0) - p).abs() <= 6 * (p * (1 - p) / n).sqrt()).all()
