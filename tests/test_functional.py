"""`merge` under every kind of differentiation, against its formula; `gate` under autocast; `align`'s errors."""

import pytest
import torch
from torch import Tensor

from lightning_stn.functional import align, dropout, gate, merge

# Torch's own, where torch.func and forward differentiation are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

SHAPES = [((4, 3), (4, 1)), ((4, 3, 2), (4, 1, 1)), ((4,), (4,)), ((4, 3), (4, 3)), ((1, 3), (1, 3)), ((4, 3), (1, 3))]


def draw(shape: tuple[int, ...], gated: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(size, dtype=torch.float64) for size in (shape, shape, gated))  # type: ignore[return-value]


def formula(base: Tensor, response: Tensor, gated: Tensor) -> Tensor:
    return base + response * gated


@pytest.mark.parametrize(("shape", "gated"), SHAPES)
def test_merge_and_its_derivatives(shape: tuple[int, ...], gated: tuple[int, ...]) -> None:
    inputs = draw(shape, gated)
    torch.testing.assert_close(merge(*inputs), formula(*inputs))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(merge, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merge, leaves)


@pytest.mark.parametrize(("shape", "gated"), SHAPES)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_merge_under_torch_func(shape: tuple[int, ...], gated: tuple[int, ...], argument: int) -> None:
    inputs = draw(shape, gated)
    expected = torch.func.jacrev(formula, argnums=argument)(*inputs)
    torch.testing.assert_close(torch.func.jacrev(merge, argnums=argument)(*inputs), expected)
    got, wanted = (torch.func.jvp(f, inputs, tuple(map(torch.cos, inputs)))[1] for f in (merge, formula))
    torch.testing.assert_close(got, wanted)


def test_merge_under_vmap() -> None:
    base, response, gated = draw((5, 4, 3), (5, 4, 1))
    torch.testing.assert_close(torch.func.vmap(merge)(base, response, gated), formula(base, response, gated))


def test_gates_keep_their_precision_under_autocast() -> None:
    sample, gates = torch.randn(3, 2), torch.randn(4, 2)
    expected = gate(sample, gates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(sample, gates), expected)
        assert not torch.equal(sample @ gates.T, expected)


@pytest.mark.parametrize("like", [torch.ones(3, 2), torch.ones(())])
def test_align_refuses_rows_that_do_not_fit(like: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one row per example, got 4 rows.*perturb='batch'"):
        align(torch.ones(4), like)


def test_dropout_of_half_precision_keeps_small_rates() -> None:
    """Ten standard deviations of a binomial: a rate of 1e-4 over 10^6 draws gives 100 zeros."""
    torch.manual_seed(0)
    zeros = (dropout(torch.ones(1000, 1000, dtype=torch.bfloat16), 1e-4) == 0).sum().item()
    assert 0 < zeros < 200
