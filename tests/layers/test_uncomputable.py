"""What a reader gets under a row for each example: a view that tells its kind, and refuses to be computed with."""

import pytest
import torch
from torch import nn

from lightning_stn.effective import uncomputable


def test_view_answers_questions_and_refuses_computation() -> None:
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    view = uncomputable(weight, "share one row")
    assert (view.dtype, view.device, view.shape) == (weight.dtype, weight.device, weight.shape)
    assert (view.dim(), view.numel(), view.size(1), view.ndim, len(view)) == (2, 6, 3, 2, 2)
    assert view.is_floating_point()
    assert view is not None
    for compute in (
        lambda: view + 1,
        lambda: torch.zeros(3, dtype=torch.float64) @ view.t(),
        lambda: nn.functional.linear(torch.zeros(1, 3, dtype=torch.float64), view),
        lambda: torch.stack([view, view]),
        lambda: view.mean(),
    ):
        with pytest.raises(ValueError, match="share one row"):
            compute()
