"""`SharedAdam`: Adam with one second moment for all entries of a tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stn.methods import SharedAdam


def entries(n: int = 3) -> Tensor:
    return torch.zeros(n, dtype=torch.float64, requires_grad=True)


def run(optimizer: torch.optim.Optimizer, parameter: Tensor, gradients: Tensor) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


GRADIENTS = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_steps_equal_a_loop_written_out() -> None:
    parameter, first, second, lr = entries(), 0.8, 0.95, 0.03
    found = run(SharedAdam([parameter], lr=lr, betas=(first, second)), parameter, GRADIENTS)
    place, mean, square = [0.0] * 3, [0.0] * 3, 0.0
    for t, gradient in enumerate(GRADIENTS.tolist(), 1):
        square = second * square + (1 - second) * sum(g * g for g in gradient) / 3
        mean = [first * m + (1 - first) * g for m, g in zip(mean, gradient, strict=True)]
        rms = (square / (1 - second**t)) ** 0.5
        place = [p - lr * m / (1 - first**t) / rms for p, m in zip(place, mean, strict=True)]
    torch.testing.assert_close(found, torch.tensor(place, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_one_entry_steps_as_under_adam() -> None:
    ours, theirs = entries(1), entries(1)
    found = run(SharedAdam([ours], lr=0.1), ours, GRADIENTS[:, :1])
    torch.testing.assert_close(found, run(torch.optim.Adam([theirs], lr=0.1, eps=1e-12), theirs, GRADIENTS[:, :1]))


def test_scale_of_the_gradient_does_not_matter() -> None:
    one, other = entries(), entries()
    found = run(SharedAdam([one], lr=0.1), one, GRADIENTS)
    torch.testing.assert_close(found, run(SharedAdam([other], lr=0.1), other, 1e-5 * GRADIENTS), rtol=1e-6, atol=0)


def test_entry_with_a_small_gradient_moves_little() -> None:
    gradients = GRADIENTS.abs() * torch.tensor([1.0, 1.0, 1e-3], dtype=torch.float64)
    parameter = entries()
    moved = run(SharedAdam([parameter], lr=0.1), parameter, gradients).abs()
    assert moved[2] < 3e-3 * moved[:2].min()


def test_zero_gradient_moves_nothing() -> None:
    parameter = entries()
    assert not run(SharedAdam([parameter], lr=0.1), parameter, torch.zeros(2, 3, dtype=torch.float64)).any()


def test_closure_is_evaluated_and_a_parameter_without_a_gradient_stays() -> None:
    moved, stays = entries(), entries()
    optimizer = SharedAdam([moved, stays], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (moved - 1).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    torch.testing.assert_close(moved.detach(), torch.full((3,), 0.1, dtype=torch.float64))
    assert not stays.detach().any()


def test_saved_state_continues_the_run() -> None:
    whole, first, second = entries(), entries(), entries()
    expected = run(SharedAdam([whole], lr=0.1), whole, GRADIENTS)
    before = SharedAdam([first], lr=0.1)
    second.data.copy_(run(before, first, GRADIENTS[:8]))
    after = SharedAdam([second], lr=0.1)
    after.load_state_dict(before.state_dict())
    assert torch.equal(run(after, second, GRADIENTS[8:]), expected)


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"eps": -1e-3}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}])
def test_argument_out_of_its_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SharedAdam: expected .*{next(iter(arguments))}.*, got"):
        SharedAdam([entries()], **arguments)
