"""Affine motion: equal to torchvision's for each example."""

import math
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor
from torchvision.transforms import InterpolationMode

from lightning_stn.augment import RandomAffine
from lightning_stn.augment.affine import SMALLEST_FACTOR, Motion, affine

N = 8


def images(dtype: torch.dtype = torch.float64, channels: int = 3) -> Tensor:
    return torch.rand(N, channels, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def motion() -> Motion:
    """One kind of motion for each of the first four examples, all four kinds for the others."""
    generator = torch.Generator().manual_seed(2)
    unit = 2 * torch.rand(5, N, generator=generator, dtype=torch.float64) - 1
    alone = torch.eye(4, N, dtype=torch.float64) + (torch.arange(N) >= 4)
    return Motion(
        angle=180 * unit[0] * alone[0],
        translation=(torch.tensor([6, 9]) * unit[1:3].T) * alone[1, :, None],
        factor=1 + 0.7 * unit[3] * alone[2],
        shear=60 * unit[4] * alone[3],
    )


def torchvision(image: Tensor, motion: Motion, index: int, interpolation: str, fill: list[float] | None) -> Tensor:
    return tvf.affine(
        image,
        angle=motion.angle[index].item(),
        translate=motion.translation[index].tolist(),
        scale=motion.factor[index].item(),
        shear=[motion.shear[index].item(), 0.0],
        interpolation=InterpolationMode(interpolation),
        fill=fill,
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_affine_equals_torchvision_for_each_example(interpolation: Any, channels: int) -> None:
    input, moved = images(channels=channels), motion()
    output = affine(input, moved, interpolation)
    for index, (row, image) in enumerate(zip(output, input, strict=True)):
        expected = torchvision(image, moved, index, interpolation, None)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)


def test_affine_fills_beyond_the_border() -> None:
    """Nearest: torchvision's fill. Bilinear: torchvision's zero fill of a shifted image, with no squared weight."""
    input, moved = images(), motion()
    output = affine(input, moved, "nearest", fill=0.3)
    for index, (row, image) in enumerate(zip(output, input, strict=True)):
        expected = torchvision(image, moved, index, "nearest", [0.3])
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)
    output = affine(input, moved, fill=0.3)
    for index, (row, image) in enumerate(zip(output, input, strict=True)):
        expected = torchvision(image - 0.3, moved, index, "bilinear", None) + 0.3
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)
    far = Motion(*(torch.zeros(N), torch.full((N, 2), 100.0), torch.ones(N), torch.zeros(N)))
    torch.testing.assert_close(affine(input, far, fill=0.3), torch.full_like(input, 0.3))


def test_affine_of_bytes_equals_torchvision_within_one_level() -> None:
    """Both compute in float32, so halves may be rounded either way."""
    input, moved = (255 * images()).to(torch.uint8), motion()
    for index, (row, image) in enumerate(zip(affine(input, moved), input, strict=True)):
        assert (row.int() - torchvision(image, moved, index, "bilinear", None).int()).abs().max() <= 1


def test_random_affine_applies_the_drawn_motion() -> None:
    module = RandomAffine(degrees=30, translate=0.3, scale=0.4, shear=20)
    input = images()
    torch.manual_seed(4)
    output = module(input)
    torch.manual_seed(4)
    drawn = module.draw(input)
    for index, (row, image) in enumerate(zip(output, input, strict=True)):
        torch.testing.assert_close(row, torchvision(image, drawn, index, "bilinear", None), rtol=0, atol=1e-10)


def test_random_affine_is_finite_at_the_largest_scale_and_shear() -> None:
    torch.manual_seed(0)
    module = RandomAffine(scale=1.0, shear=90.0)
    assert (module.draw(torch.empty(1000, 1, 1, 1)).factor >= SMALLEST_FACTOR).all()
    assert module(torch.rand(1000, 1, 4, 4)).isfinite().all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_random_affine_draws_from_the_range_of_each_example(bind_values: Any, share: float) -> None:
    """Six standard errors of mean and variance: a false alarm in fewer than one of 10^7 runs of all cases."""
    torch.manual_seed(0)
    n = 20_000
    most = {"degrees": 180.0, "translate": 1.0, "scale": 0.9, "shear": 45.0}
    module = RandomAffine("degrees", "translate", "scale", "shear")
    # Every second example has another strength.
    bind_values(module, **{name: torch.tensor([share * value, 0.1]).repeat(n) for name, value in most.items()})
    drawn = Motion(*(amount[::2].double() for amount in module.draw(torch.empty(2 * n, 1, 9, 6))))
    shifts = [
        (drawn.angle, 180 * share),
        (drawn.translation[:, 0], 6 * share),
        (drawn.translation[:, 1], 9 * share),
        (drawn.factor - 1, 0.9 * share),
        (drawn.shear, 45 * share),
    ]
    for shift, half in shifts:
        assert shift.abs().max() <= half * (1 + 1e-6)
        assert abs(shift.mean()) <= 6 * half / math.sqrt(3 * n)
        assert abs(shift.square().mean() - half**2 / 3) <= 6 * half**2 * math.sqrt(4 / 45 / n)
    correlation = torch.corrcoef(torch.stack([shift for shift, _ in shifts]))
    assert share == 0 or (correlation - torch.eye(5)).abs().max() < 6 / math.sqrt(n)


def test_random_affine_draws_nothing_for_operations_with_strength_zero() -> None:
    torch.manual_seed(0)
    drawn = RandomAffine(degrees=10).draw(torch.empty(4, 1, 9, 6))
    assert not drawn.translation.any()
    assert not drawn.shear.any()
    assert (drawn.factor == 1).all()
    assert drawn.angle.all()
