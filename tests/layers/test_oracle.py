"""Every response layer against a naive float64 loop that builds the effective weights of each example."""

import copy
import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers.cases import CASES, Case, H, every_case, hyperparameters, respond
from torch import Tensor, nn

from lightning_stn import layers
from lightning_stn.binding import bind
from lightning_stn.layers import ResponseLayer


def at(layer: ResponseLayer, sample: Tensor, *arguments: Tensor) -> Tensor:
    assert layer.hyperparameters is not None
    with bind(layer.hyperparameters, sample):
        output: Tensor = layer(*arguments)
    return output


def unit(plain: nn.Module, shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    """The output unit that one entry of a parameter belongs to."""
    if isinstance(plain, nn.LayerNorm | nn.RMSNorm):
        return sum(i * math.prod(shape[d + 1 :]) for d, i in enumerate(index))
    if isinstance(plain, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) and len(index) > 1:
        group = index[0] // (plain.in_channels // plain.groups)
        return group * (plain.out_channels // plain.groups) + index[1]
    return index[0]


def naive(layer: ResponseLayer, plain: nn.Module, sample: Tensor, input: Tensor) -> Tensor:
    """The plain layer on each example alone, with effective weights built entry by entry."""
    outputs = []
    for n in range(len(input)):
        alone = copy.deepcopy(plain)
        state = {}
        for name, base in plain.named_parameters():
            effective = getattr(layer, name).detach().clone()
            response, gates = getattr(layer, f"response_{name}"), getattr(layer, f"{name}_gate")
            for index in itertools.product(*map(range, base.shape)):
                o = unit(plain, base.shape, index)
                gate = sum(gates[o, h].item() * sample[n, h].item() for h in range(H))
                effective[index] += gate * response[index].item()
            state[name] = effective
        alone.load_state_dict(state, strict=False)
        outputs.append(alone(input[n : n + 1]))
    return torch.cat(outputs).detach()


@every_case
def test_row_per_example_equals_the_naive_loop(case: Case) -> None:
    layer, plain = respond(case)
    input, sample = torch.randn(case.shape, dtype=torch.float64), torch.randn(case.shape[0], H, dtype=torch.float64)
    torch.testing.assert_close(at(layer, sample, input), naive(layer, plain, sample, input), rtol=1e-10, atol=1e-10)


@every_case
def test_shared_row_equals_the_naive_loop(case: Case) -> None:
    layer, plain = respond(case)
    input, sample = torch.randn(case.shape, dtype=torch.float64), torch.randn(1, H, dtype=torch.float64)
    expected = naive(layer, plain, sample.expand(case.shape[0], H), input)
    torch.testing.assert_close(at(layer, sample, input), expected, rtol=1e-10, atol=1e-10)


@every_case
def test_shared_row_equals_the_same_row_for_each_example(case: Case) -> None:
    layer, _ = respond(case)
    input, sample = torch.randn(case.shape, dtype=torch.float64), torch.randn(1, H, dtype=torch.float64)
    repeated = sample.repeat(case.shape[0], 1)
    torch.testing.assert_close(at(layer, sample, input), at(layer, repeated, input), rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize("rows", [1, None], ids=["shared", "per-example"])
def test_gradients_pass_gradcheck(case: Case, rows: int | None) -> None:
    layer, _ = respond(case)
    n = 2
    input = torch.randn(n, *case.shape[1:], dtype=torch.float64, requires_grad=True)
    sample = torch.randn(rows or n, H, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())

    def run(sample: Tensor, input: Tensor, *_: Tensor) -> Tensor:
        return at(layer, sample, input)

    assert torch.autograd.gradcheck(run, (sample, input, *parameters), fast_mode=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_without_a_set_equals_the_torch_layer_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    layer, plain = respond(case, dtype=dtype)
    layer.__dict__["_hyperparameters"] = None
    input = torch.randn(case.shape, dtype=dtype)
    assert torch.equal(layer(input), plain(input))


@every_case
@pytest.mark.parametrize("rows", [None, 1, 6], ids=["current", "shared", "per-example"])
def test_layer_with_zero_gates_equals_the_torch_layer_bit_for_bit(case: Case, rows: int | None) -> None:
    layer, plain = respond(case, gates=False, dtype=torch.float32)
    input = torch.randn(case.shape)
    output = layer(input) if rows is None else at(layer, torch.randn(rows, H), input)
    if rows == 6 and "Norm" in str(plain):  # torch's kernels normalise and scale with one rounding
        torch.testing.assert_close(output, plain(input))
    else:
        assert torch.equal(output, plain(input))


@every_case
def test_layer_without_a_bound_sample_computes_at_the_current_hyperparameters(case: Case) -> None:
    layer, _ = respond(case)
    assert layer.hyperparameters is not None
    layer.hyperparameters.unconstrained.data.copy_(torch.tensor([0.3, -1.0, 2.0]))
    input = torch.randn(case.shape, dtype=torch.float64)
    current = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float32)
    assert torch.equal(layer(input), at(layer, current, input))


@every_case
def test_batch_of_one_equals_the_naive_loop(case: Case) -> None:
    layer, plain = respond(case)
    input, sample = torch.randn(1, *case.shape[1:], dtype=torch.float64), torch.randn(1, H, dtype=torch.float64)
    torch.testing.assert_close(at(layer, sample, input), naive(layer, plain, sample, input), rtol=1e-10, atol=1e-10)


@every_case
def test_plain_checkpoint_lacks_only_the_response_keys(case: Case) -> None:
    layer, plain = respond(case)
    for parameter in plain.parameters():
        parameter.data.normal_()
    keys = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all("response" in key or "gate" in key for key in keys.missing_keys)
    assert torch.equal(layer.weight, plain.weight)


@every_case
def test_response_has_the_size_of_the_layer_and_its_gates(case: Case) -> None:
    """`R` and `r` have the size of the layer; `V` and `C` have `h` entries for each output unit of a parameter."""
    layer, plain = respond(case)
    size = sum(p.numel() for p in plain.parameters())
    if isinstance(plain, nn.LayerNorm | nn.RMSNorm):
        gates = H * size
    elif "ConvTranspose" in str(plain):
        gates = H * plain.out_channels * len(list(plain.parameters()))
    else:
        gates = H * sum(p.shape[0] for p in plain.parameters())
    assert sum(p.numel() for p in layer.response_parameters()) == size + gates


@every_case
@pytest.mark.parametrize("rows", [2, 5, 7])
def test_layer_refuses_rows_that_do_not_match_the_batch(case: Case, rows: int) -> None:
    layer, _ = respond(case)
    with pytest.raises(ValueError, match=rf"{rows} rows.*got shape.*perturb='batch'"):
        at(layer, torch.randn(rows, H), torch.randn(case.shape, dtype=torch.float64))


@pytest.mark.parametrize("case", [case for case in CASES if not re.match("[A-Za-z]*Norm|PReLU", str(case))], ids=str)
def test_input_without_a_batch_dimension_needs_one_row(case: Case) -> None:
    layer, plain = respond(case, gates=False)
    dims = 1 if isinstance(plain, nn.Linear) else len(case.shape) - 1
    input = torch.randn(case.shape[-dims:], dtype=torch.float64)
    assert torch.equal(at(layer, torch.randn(1, H), input), plain(input))
    with pytest.raises(ValueError, match="one example for each"):
        at(layer, torch.randn(input.shape[0], H), input)


@given(n=st.integers(0, 5), i=st.integers(1, 4), o=st.integers(1, 4), extra=st.lists(st.integers(1, 3), max_size=2))
@settings(max_examples=40, deadline=None)
def test_linear_equals_the_naive_loop_for_any_shape(n: int, i: int, o: int, extra: list[int]) -> None:
    case = Case(lambda: nn.Linear(i, o), (n, *extra, i))
    layer, plain = respond(case)
    input, sample = torch.randn(case.shape, dtype=torch.float64), torch.randn(n, H, dtype=torch.float64)
    output = at(layer, sample, input)
    assert output.shape == plain(input).shape
    if n:
        torch.testing.assert_close(output, naive(layer, plain, sample, input), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("response", "arguments"),
    [
        (layers.ResponseLinear, (3, 4)),
        (layers.ResponseConv1d, (3, 4, 2)),
        (layers.ResponseConv2d, (3, 4, 2)),
        (layers.ResponseConv3d, (3, 4, 2)),
    ],
)
def test_response_layer_takes_the_arguments_of_torch(response: Any, arguments: tuple[int, ...]) -> None:
    hyperparameter_set = hyperparameters()
    layer = response(*arguments, bias=False, dtype=torch.float64, hyperparameters=hyperparameter_set)
    assert layer.bias is None
    assert layer.response_bias is None
    assert layer.weight_gate.shape == (4, H)
    assert layer.weight_gate.dtype == torch.float64
    assert isinstance(layer, response.plain_type)


def test_response_weights_are_drawn_by_the_torch_initialiser() -> None:
    """Uniform in +-1/sqrt(fan_in): the largest of 40,000 entries is within 1% of the bound, except with e^-400."""
    layer = layers.ResponseLinear(100, 400, hyperparameters=hyperparameters())
    assert 0.099 < layer.response_weight.abs().max() <= 0.1
    assert not torch.equal(layer.response_weight, layer.weight)


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_row_affects_only_its_example(case: Case) -> None:
    layer, _ = respond(case)
    input, sample = torch.randn(case.shape, dtype=torch.float64), torch.randn(6, H, dtype=torch.float64)
    before = at(layer, sample, input)
    sample[2] += 1
    changed = (at(layer, sample, input) != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, False, False]
