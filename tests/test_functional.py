"""`effective_parameter` and its derivatives against the formula; `gate` under autocast; errors of `align`."""

import pytest
import torch
from torch import Tensor

from lightning_stn.functional import align, dropout, effective_parameter, gate, sum_product

# Torch warns of code in torch at the first use of torch.func and of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

SHAPES = [
    ((), ()),
    ((4, 3), (4, 1)),
    ((4, 3, 2), (4, 1, 1)),
    ((4,), (4,)),
    ((4, 3), (4, 3)),
    ((1, 3), (1, 3)),
    ((4, 3), (1, 3)),
]


def draw(shape: tuple[int, ...], gated: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(size, dtype=torch.float64) for size in (shape, shape, gated))  # type: ignore[return-value]


def formula(base: Tensor, response: Tensor, gated: Tensor) -> Tensor:
    return base + response * gated


@pytest.mark.parametrize(("shape", "gated"), SHAPES)
def test_effective_parameter_and_its_derivatives_equal_the_formula(
    shape: tuple[int, ...], gated: tuple[int, ...]
) -> None:
    inputs = draw(shape, gated)
    torch.testing.assert_close(effective_parameter(*inputs), formula(*inputs))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(effective_parameter, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(effective_parameter, leaves)


@pytest.mark.parametrize(("shape", "gated"), SHAPES)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_effective_parameter_supports_torch_func(shape: tuple[int, ...], gated: tuple[int, ...], argument: int) -> None:
    inputs = draw(shape, gated)
    expected = torch.func.jacrev(formula, argnums=argument)(*inputs)
    torch.testing.assert_close(torch.func.jacrev(effective_parameter, argnums=argument)(*inputs), expected)
    functions = (effective_parameter, formula)
    got, wanted = (torch.func.jvp(f, inputs, tuple(map(torch.cos, inputs)))[1] for f in functions)
    torch.testing.assert_close(got, wanted)


def test_effective_parameter_supports_vmap() -> None:
    base, response, gated = draw((5, 4, 3), (5, 4, 1))
    mapped = torch.func.vmap(effective_parameter)(base, response, gated)
    torch.testing.assert_close(mapped, formula(base, response, gated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000, 400), (3, 200_000), (500, 30, 3, 3), (5, 0), (0, 5)])
def test_product_summed_for_each_row_equals_the_formula_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Several groups of rows, one row at a time, more than two dimensions, and no numbers at all."""
    torch.manual_seed(0)
    a, b = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    found = sum_product(a, b, torch.Size([shape[0]] + [1] * (len(shape) - 1)))
    assert found.dtype == dtype
    expected = (a.double() * b.double()).flatten(1).sum(1).reshape(found.shape)
    tolerance = 4 * torch.finfo(dtype).eps * a.flatten(1).shape[1] ** 0.5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_gates_keep_their_precision_under_autocast() -> None:
    sample, gates = torch.randn(3, 2), torch.randn(4, 2)
    expected = gate(sample, gates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(sample, gates), expected)
        assert not torch.equal(sample @ gates.T, expected)


@pytest.mark.parametrize("like", [torch.ones(3, 2), torch.ones(())])
def test_align_refuses_rows_that_do_not_match_the_batch(like: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one row per example, got 4 rows.*perturb='batch'"):
        align(torch.ones(4), like)


def test_dropout_in_half_precision_keeps_small_rates() -> None:
    """A rate of 1e-4 gives 100 zeros in 10^6 draws, with a standard deviation of 10."""
    torch.manual_seed(0)
    zeros = (dropout(torch.ones(1000, 1000, dtype=torch.bfloat16), 1e-4) == 0).sum().item()
    assert 0 < zeros < 200
