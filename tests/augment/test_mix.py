"""MixUp and CutMix: distribution of the shares, mixtures, and soft targets."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_stn.augment import CutMix, MixUp
from lightning_stn.augment.mix import draw_boxes, draw_share, mix_rows

LABELS = torch.tensor([0, 2, 1, 2, 0])


@pytest.mark.parametrize("alpha", [1e-8, 1e-3, 0.1, 0.5, 1.0, 8.0, 100.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    """Six standard errors or more, as `(x - 1/2)^2` has a deviation of at most 1/8: one of 10^7 runs of all cases."""
    torch.manual_seed(0)
    n, variance = 20_000, 1 / (4 * (2 * alpha + 1))
    share = draw_share(torch.full((n,), alpha)).double()
    assert share.min() >= 0
    assert share.max() <= 1
    assert abs(share.mean() - 0.5) <= 6 * math.sqrt(variance / n)
    assert abs((share - 0.5).square().mean() - variance) <= 6 * 0.125 / math.sqrt(n)


@pytest.mark.parametrize(
    ("alpha", "cumulative"),
    [(1.0, lambda x: x), (0.5, lambda x: x.sqrt().asin() * 2 / math.pi), (2.0, lambda x: x**2 * (3 - 2 * x))],
)
def test_shares_have_the_cumulative_distribution_of_the_beta_distribution(alpha: float, cumulative: Any) -> None:
    """Bound of Dvoretzky, Kiefer and Wolfowitz: a false alarm in one of 10^9 runs."""
    torch.manual_seed(0)
    n = 20_000
    share = draw_share(torch.full((n,), alpha)).double().sort().values
    empirical = torch.arange(1, n + 1) / n
    assert (empirical - cumulative(share)).abs().max() <= math.sqrt(math.log(2e9) / (2 * n)) + 1 / n


def test_shares_are_drawn_at_the_alpha_of_each_example() -> None:
    torch.manual_seed(0)
    share = draw_share(torch.tensor([0.0, 1e6]).repeat(1000))
    assert (share[::2] == 1).all()
    assert ((share[1::2] - 0.5).abs() < 0.01).all()


def test_mix_rows_blends_each_row_with_the_previous_one() -> None:
    input = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    share = torch.tensor([1.0, 0.0, 0.3, 0.5, 0.9], dtype=torch.float64)
    output = mix_rows(input, share)
    for n, lam in enumerate(share.tolist()):
        torch.testing.assert_close(output[n], lam * input[n] + (1 - lam) * input[n - 1], rtol=0, atol=1e-12)
    assert torch.equal(output[0], input[0])
    assert torch.equal(output[1], input[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_mixup_blends_images_and_labels_by_the_same_share(bind_values: Any, dtype: torch.dtype) -> None:
    module = MixUp("alpha", num_classes=3)
    alpha = torch.tensor([0.0, 0.2, 1.0, 5.0, 0.0])
    bind_values(module, alpha=alpha)
    input = (torch.rand(5, 3, 4, 4, dtype=torch.float64) * 255).to(dtype)
    torch.manual_seed(2)
    output, targets = module(input, LABELS)
    torch.manual_seed(2)
    for n, lam in enumerate(draw_share(alpha).tolist()):
        mixture = lam * input[n].double() + (1 - lam) * input[n - 1].double()
        torch.testing.assert_close(
            output[n].double(), mixture, rtol=0, atol=0.5 + 1e-4 if dtype == torch.uint8 else 1e-12
        )
        expected = lam * F.one_hot(LABELS[n], 3) + (1 - lam) * F.one_hot(LABELS[n - 1], 3)
        torch.testing.assert_close(targets[n], expected.float())
    assert torch.equal(targets[0], torch.tensor([1.0, 0.0, 0.0]))


def test_boxes_cover_the_complement_of_the_share() -> None:
    """Sides are twice the floor of half the exact side, as in torchvision, unless clipped at the border."""
    torch.manual_seed(0)
    share = torch.rand(2000)
    start, end = draw_boxes(share, 20, 28)
    half = torch.stack([(0.5 * (1 - share).sqrt() * size).floor() for size in (20, 28)], 1)
    inside = (start > 0) & (end < torch.tensor([20, 28]))
    assert torch.equal((end - start)[inside], 2 * half[inside])
    assert inside.any(0).all()
    assert (start >= 0).all()
    assert (end <= torch.tensor([20, 28])).all()
    assert (end - start <= 2 * half).all()


def test_box_centres_are_uniform() -> None:
    """Six binomial standard deviations: a false alarm in fewer than one of 10^6 runs."""
    torch.manual_seed(0)
    n = 20_000
    start, _ = draw_boxes(torch.ones(n), 4, 6)
    counts = torch.bincount((start[:, 0] * 6 + start[:, 1]).long(), minlength=24).double()
    assert ((counts / n - 1 / 24).abs() <= 6 * math.sqrt(1 / 24 * 23 / 24 / n)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_cutmix_pastes_boxes_and_mixes_labels_by_area(bind_values: Any, dtype: torch.dtype) -> None:
    module = CutMix("alpha", num_classes=3)
    alpha = torch.tensor([1.0, 0.2, 0.0, 5.0, 1.0])
    bind_values(module, alpha=alpha)
    input = (torch.rand(5, 3, 9, 7) * 255).to(dtype)
    torch.manual_seed(3)
    output, targets = module(input, LABELS)
    torch.manual_seed(3)
    start, end = draw_boxes(draw_share(alpha), 9, 7)
    for n, ((top, left), (bottom, right)) in enumerate(zip(start.int().tolist(), end.int().tolist(), strict=True)):
        image = input[n].clone()
        image[:, top:bottom, left:right] = input[n - 1][:, top:bottom, left:right]
        assert torch.equal(output[n], image)
        lam = 1 - (bottom - top) * (right - left) / 63
        expected = lam * F.one_hot(LABELS[n], 3) + (1 - lam) * F.one_hot(LABELS[n - 1], 3)
        torch.testing.assert_close(targets[n], expected.float())
    assert torch.equal(output[2], input[2])


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_soft_targets_give_the_plain_loss_outside_the_weight_phase(bind_values: Any, kind: Any) -> None:
    torch.manual_seed(0)
    module = kind("alpha", num_classes=3)
    bind_values(module, alpha=torch.full((5,), 2.0))
    input, logits = torch.rand(5, 3, 6, 6), torch.randn(5, 3)
    assert F.cross_entropy(logits, module(input, LABELS)[1]) != F.cross_entropy(logits, LABELS)
    same, targets = module.eval()(input, LABELS)
    assert same is input
    torch.testing.assert_close(F.cross_entropy(logits, targets), F.cross_entropy(logits, LABELS))


def test_cutmix_accepts_the_soft_targets_of_mixup(bind_values: Any) -> None:
    torch.manual_seed(0)
    mixup, cutmix = MixUp(1.0, 3), CutMix(1.0, 3)
    _, targets = cutmix(*mixup(torch.rand(5, 3, 6, 6), LABELS))
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    assert (targets > 0).sum() > 5


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (LABELS[:4], r"shape \[4\] of torch.int64"),
        (LABELS.double(), r"shape \[5\] of torch.float64"),
        (torch.rand(5, 4), r"shape \[5, 4\] of torch.float32"),
        (LABELS.reshape(5, 1), r"shape \[5, 1\] of torch.int64"),
    ],
)
def test_mixup_refuses_labels_of_wrong_shape_or_dtype(labels: Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=r"MixUp: expected labels as whole numbers \[n\] .* with n = 5, got " + got):
        MixUp(1.0, 3)(torch.rand(5, 3, 4, 4), labels)
