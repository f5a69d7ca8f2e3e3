"""Cutout with several holes, and random erasing."""

import math
from typing import Any

import pytest
import torch
import torchvision.transforms.v2 as tv
import torchvision.transforms.v2.functional as tvf
from torch import Tensor

from lightning_stn import HyperparameterSet, Integer
from lightning_stn.augment import Cutout, RandomErasing
from lightning_stn.augment.base import box_mask
from lightning_stn.augment.cutout import cutout_mask
from lightning_stn.binding import attach_all, bind_weight_phase


def test_box_mask_equals_slicing() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(-3, 9, (40, 3, 2), generator=generator)
    end = start + torch.randint(0, 7, (40, 3, 2), generator=generator)
    mask = box_mask(start, end, 7, 5)
    for row, first, behind in zip(mask, start.tolist(), end.tolist(), strict=True):
        expected = torch.zeros(1, 7, 5, dtype=torch.bool)
        for (top, left), (bottom, right) in zip(first, behind, strict=True):
            expected[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
        assert torch.equal(row, expected)


def test_cutout_mask_is_the_union_of_the_squares_of_each_example() -> None:
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(0, 5, (20, 4), generator=generator)
    centre = torch.randint(0, 7, (20, 4, 2), generator=generator)
    union = torch.stack([cutout_mask(length[:, k], centre[:, k], 9, 7) for k in range(4)]).any(0)
    assert torch.equal(cutout_mask(length, centre, 9, 7), union)


def test_cutout_blanks_the_drawn_squares(bind_values: Any) -> None:
    module = Cutout("length", "holes", fill=-1.0, max_holes=3)
    length, holes = [2, 3, 0, 5, 1], [3, 1, 2, 0, 2]
    bind_values(module, length=length, holes=holes)
    input = torch.rand(5, 3, 9, 7, dtype=torch.float64)
    torch.manual_seed(7)
    output = module(input)
    torch.manual_seed(7)
    centre = (torch.rand(5, 3, 2) * torch.tensor([9, 7])).long()
    for index in range(5):
        image = input[index].clone()
        for row, column in centre[index, : holes[index]].tolist():
            top, left = row - length[index] // 2, column - length[index] // 2
            image[:, max(top, 0) : top + length[index], max(left, 0) : left + length[index]] = -1
        assert torch.equal(output[index], image)


def test_cutout_blanks_the_number_of_holes_of_each_example(bind_values: Any) -> None:
    """Squares of one pixel: six standard errors at a standard deviation below 1; a false alarm in one of 10^8 runs."""
    torch.manual_seed(0)
    n = 500
    module = Cutout(1, "holes", fill=-1.0, max_holes=5)
    bind_values(module, holes=torch.arange(6).repeat(n))
    cut = (module(torch.zeros(6 * n, 1, 32, 32)) == -1).sum((1, 2, 3)).reshape(n, 6)
    holes = torch.arange(6)
    assert (cut <= holes).all()
    expected = 1024 * (1 - (1 - 1 / 1024) ** holes.double())
    assert ((cut.double().mean(0) - expected).abs() <= 6 / math.sqrt(n)).all()


def test_cutout_bounds_the_number_of_holes_by_the_range_of_the_hyperparameter() -> None:
    torch.manual_seed(0)
    module = Cutout(1, "holes")
    hyperparameters = HyperparameterSet({"holes": Integer(0, 5, init=1)})
    attach_all(module, hyperparameters)
    bind_weight_phase(hyperparameters, torch.full((50, 1), 20.0))
    assert (module(torch.ones(50, 1, 64, 64)) == 0).sum((1, 2, 3)).max() == 5


def test_cutout_draws_a_place_for_each_hole() -> None:
    torch.manual_seed(0)
    cut = Cutout(1, holes=6)(torch.ones(200, 1, 32, 32)) == 0
    assert cut.sum((1, 2, 3)).double().mean() > 5.5
    assert cut.any(0).sum() > 500


def test_cutout_blanks_at_most_max_holes(bind_values: Any) -> None:
    module = Cutout(1, "holes", max_holes=2)
    bind_values(module, holes=5)
    assert (module(torch.ones(50, 1, 64, 64)) == 0).sum((1, 2, 3)).max() == 2


def erase(image: Tensor, start: Tensor, end: Tensor, value: float) -> Tensor:
    (i, j), (h, w) = start.int().tolist(), (end - start).int().tolist()
    return tvf.erase(image, i, j, h, w, torch.tensor(value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_random_erasing_equals_torchvision_for_each_example(dtype: torch.dtype) -> None:
    module = RandomErasing(0.7, value=3.0)
    input = (torch.rand(50, 3, 12, 17) * 255).to(dtype)
    torch.manual_seed(1)
    output = module(input)
    torch.manual_seed(1)
    for row, image, start, end in zip(output, input, *module.draw(input), strict=True):
        assert torch.equal(row, erase(image, start, end, 3.0))


def test_random_erasing_erases_at_the_probability_of_each_example(bind_values: Any) -> None:
    """Six binomial standard deviations: a false alarm in fewer than one of 10^8 runs."""
    torch.manual_seed(0)
    n, p = 5000, torch.tensor([0.0, 0.1, 0.6, 1.0], dtype=torch.float64)
    module = RandomErasing("p", value=-1.0)
    bind_values(module, p=p.repeat(n))
    erased = (module(torch.zeros(4 * n, 1, 16, 16)) == -1).flatten(1).any(1).reshape(n, 4).double().mean(0)
    assert ((erased - p).abs() <= 6 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("scale", [(0.02, 0.33), (0.6, 1.0)])
def test_random_erasing_rectangles_are_distributed_as_in_torchvision(scale: tuple[float, float]) -> None:
    """Six standard errors of the difference of means: a false alarm in fewer than one of 10^7 runs."""
    torch.manual_seed(0)
    reference = tv.RandomErasing(p=1.0, scale=scale)
    image = torch.zeros(1, 20, 28)
    params = [reference.get_params(image, reference.scale, reference.ratio, reference.value) for _ in range(2000)]
    # torchvision returns the image itself as the value where no rectangle fits.
    theirs = torch.tensor([[0, 0, 0, 0] if v is image else [i, j, h, w] for i, j, h, w, v in params]).double()
    start, end = RandomErasing(1.0, scale=scale).draw(image.expand(20_000, 1, 20, 28))
    ours = torch.cat([start, end - start], 1).double()
    ours[(end == start).all(1)] = 0
    for mine, other in ((ours, theirs), (ours.square(), theirs.square())):
        error = (mine.var(0) / len(mine) + other.var(0) / len(other)).sqrt()
        assert ((mine.mean(0) - other.mean(0)).abs() <= 6 * error).all()


def test_random_erasing_keeps_images_where_no_rectangle_fits() -> None:
    input = torch.ones(20, 3, 8, 8)
    assert torch.equal(RandomErasing(1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))(input), input)
