"""Attention against a naive float64 loop over examples."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers.attention_cases import (
    CASES,
    DOUBLE,
    FLOAT_MASK,
    MODES,
    Case,
    E,
    G,
    H,
    N,
    at,
    close,
    every_case,
    hyperparameters,
    nearly_equal,
    respond,
    rows,
)
from support import random_gates, response_layers
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_stn import convert
from lightning_stn.layers import ResponseLayer, ResponseLinear, attention


def effective(layer: ResponseLayer, name: str, row: Tensor) -> Tensor:
    """The effective parameter at one row, unit by unit: `W[o] + (V h)[o] R[o]`."""
    base, response, gates = layer.get_parameter(name), layer.response_weights(name), layer.gate_weights(name)
    flat = (base.flatten(), response.flatten()) if base.dim() == 3 else (base, response)
    units = [
        flat[0][o] + sum(gates[o, h] * row[h] for h in range(H)) * flat[1][o]
        for o in range(base.shape[-1] if base.dim() == 3 else base.shape[0])
    ]
    return torch.stack(units).reshape(base.shape)


def naive(layer: Any, plain: nn.Module, case: Case, sample: Tensor, inputs: list[Tensor]) -> tuple[Tensor, Any]:
    """The plain layer on each example alone, with the effective parameters of that example."""
    outputs, weights = [], []
    for n in range(N):
        state = {name: effective(layer, name, sample[n]) for name in layer.responding}
        projection = {
            f"out_proj.{name}": effective(layer.out_proj, name, sample[n]) for name in layer.out_proj.responding
        }
        call = dict(case.call)
        if "key_padding_mask" in call:
            call["key_padding_mask"] = call["key_padding_mask"][n : n + 1]
        if call.get("attn_mask", FLOAT_MASK).dim() == 3:
            call["attn_mask"] = call["attn_mask"][n * G : (n + 1) * G]
        alone = {id(x): x.narrow(case.batch_dim, n, 1) for x in inputs}
        arguments = tuple(alone[id(x)] for x in inputs)
        output, weight = torch.func.functional_call(plain, {**state, **projection}, arguments, call)
        outputs.append(output)
        weights.append(weight)
    return torch.cat(outputs, case.batch_dim), None if weights[0] is None else torch.cat(weights)


@every_case
def test_attention_equals_the_naive_loop(case: Case) -> None:
    plain, inputs = case.plain(), case.inputs()
    layer = respond(plain)
    for training, grad, n in MODES:
        sample = rows(n)
        with torch.set_grad_enabled(grad):
            output = at(layer.train(training), sample, *inputs, **case.call)
        close(output, naive(layer, plain, case, sample.expand(N, H), inputs))


@every_case
def test_shared_row_equals_the_same_row_for_each_example(case: Case) -> None:
    layer, inputs, sample = respond(case.plain()), case.inputs(), rows(1)
    shared, repeated = (at(layer, s, *inputs, **case.call) for s in (sample, sample.repeat(N, 1)))
    close(repeated, shared)
    assert (repeated[1] is None) == (not case.call.get("need_weights", True))


@every_case
@pytest.mark.parametrize("shared", [True, False])
def test_attention_gradients_equal_those_of_the_naive_loop(case: Case, shared: bool) -> None:
    plain, inputs, sample = case.plain(), case.inputs(), rows(1 if shared else N).requires_grad_()
    layer = respond(plain)
    wanted = [sample, *{id(x): x for x in inputs}.values(), *layer.parameters()]
    weight = torch.randn(inputs[0].shape, dtype=DOUBLE)

    def gradients(output: tuple[Tensor, Any]) -> tuple[Tensor, ...]:
        loss = (output[0] * weight).sum() + (0 if output[1] is None else output[1].square().sum())
        return torch.autograd.grad(loss, wanted)

    expected = gradients(naive(layer, plain, case, sample.expand(N, H), inputs))
    close(gradients(at(layer, sample, *inputs, **case.call)), expected)


@every_case
def test_attention_with_zero_gates_equals_the_torch_layer(case: Case) -> None:
    plain, inputs = case.plain(), case.inputs()
    layer = respond(plain, gates=False)
    for training, grad, n in MODES:
        with torch.set_grad_enabled(grad):
            expected = plain.train(training)(*inputs, **case.call)
            output = at(layer.train(training), rows(n), *inputs, **case.call)
            nearly_equal(output, expected)
            if n == 1 and grad:
                assert torch.equal(output[0], expected[0])
                assert torch.equal(layer(*inputs, **case.call)[0], expected[0])


@pytest.mark.parametrize("case", CASES[:6], ids=str)
@pytest.mark.parametrize("n", [1, N])
def test_attention_dropout_equals_that_of_torch(case: Case, n: int) -> None:
    plain, inputs = case.plain(dropout=0.5), case.inputs()
    layer, sample, outputs = respond(plain, gates=False), rows(n), []
    for run in (lambda: plain(*inputs, **case.call), lambda: at(layer, sample, *inputs, **case.call)):
        torch.manual_seed(0)
        outputs.append(run())
    nearly_equal(*outputs)
    assert not torch.allclose(outputs[0][0], plain.eval()(*inputs, **case.call)[0])


@every_case
def test_attention_without_a_set_equals_the_torch_layer_bit_for_bit(case: Case) -> None:
    plain, inputs = case.plain(), case.inputs()
    layer = respond(plain)
    for module in response_layers(layer):
        module.__dict__["_hyperparameters"] = None
    output, expected = layer(*inputs, **case.call), plain(*inputs, **case.call)
    assert torch.equal(output[0], expected[0])


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_attention_without_a_batch_dimension_needs_one_row(case: Case) -> None:
    plain, sample = case.plain(), rows(1)
    layer = respond(plain)
    input = case.inputs()[0].select(case.batch_dim, 0)
    batch = input.unsqueeze(case.batch_dim)
    output, expected = at(layer, sample, input, input, input), at(layer, sample, batch, batch, batch)
    assert output[0].shape == input.shape
    close(output[0], expected[0].squeeze(case.batch_dim))
    close(output[1], expected[1].squeeze(0))
    with pytest.raises(ValueError, match=r"three dimensions.*got shape \[\d, 6\]"):
        at(layer, rows(len(input)), input, input, input)


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_row_affects_only_its_example(case: Case) -> None:
    layer, inputs, sample = respond(case.plain()), case.inputs(), rows()
    before = at(layer, sample, *inputs, **case.call)[0]
    sample[2] += 1
    changed = (at(layer, sample, *inputs, **case.call)[0] != before).movedim(case.batch_dim, 0).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


@every_case
def test_response_has_the_base_shape_and_zero_gates(case: Case) -> None:
    plain = case.plain()
    layer = respond(plain, gates=False)
    for module in response_layers(layer):
        assert (
            module.responding
            == tuple(name for name, _ in module.named_parameters(recurse=False))[: len(module.responding)]
        )
        for name in module.responding:
            base, response, gates = module.get_parameter(name), module.response_weights(name), module.gate_weights(name)
            assert response.shape == base.shape
            assert gates.shape == (base.shape[-1] if base.dim() == 3 else base.shape[0], H)
            assert not gates.any()
            assert (response != 0).all()
    assert {name for m in response_layers(layer) for name in m.responding} >= {
        name.split(".")[-1] for name, _ in plain.named_parameters()
    }


def test_response_weights_are_drawn_by_the_torch_initialisers() -> None:
    """The largest of 10,000 uniform draws is within 1% of the bound; normal draws have the standard deviation."""
    layer: Any = convert(nn.MultiheadAttention(100, 2, add_bias_kv=True), hyperparameters())
    assert 0.99 < layer.response_in_proj_weight.abs().max() / (6 / 400) ** 0.5 <= 1
    assert 0.09 < layer.response_in_proj_bias.abs().max() <= 0.1
    assert 0.07 < layer.response_bias_k.std() < 0.13


@pytest.mark.parametrize("frozen", [{"in_proj_weight", "out_proj.weight"}, {"in_proj_weight", "in_proj_bias"}], ids=str)
def test_frozen_parameters_do_not_respond(frozen: set[str]) -> None:
    plain, inputs, sample = CASES[0].plain(), CASES[0].inputs(), rows()
    for name in frozen:
        plain.get_parameter(name).requires_grad_(False)
    layer = respond(plain)
    responding = {*layer.responding, *(f"out_proj.{name}" for name in layer.out_proj.responding)}
    assert responding == {name for name, _ in plain.named_parameters()} - frozen
    assert not torch.allclose(at(layer, sample, *inputs)[0], plain(*inputs)[0], atol=1e-2)
    close(at(layer, sample, *inputs), naive(layer, plain, CASES[0], sample, inputs))
    close(at(layer, sample[:1], *inputs), naive(layer, plain, CASES[0], sample[:1].expand(N, H), inputs))


def test_output_projection_may_stay_plain() -> None:
    layer: Any = random_gates(convert(CASES[0].plain(), hyperparameters(), exclude=["out_proj"]))
    assert type(layer.out_proj) is NonDynamicallyQuantizableLinear
    inputs, sample = CASES[0].inputs(), rows(1)
    close(at(layer, sample.repeat(N, 1), *inputs), at(layer, sample, *inputs))


def test_convert_gives_response_attention_and_output_projection() -> None:
    layer = respond(CASES[0].plain())
    assert type(layer) is attention.ResponseMultiheadAttention
    assert type(layer.out_proj) is attention.ResponseOutputProjection
    assert isinstance(layer.out_proj, ResponseLinear)
    assert isinstance(layer.out_proj, NonDynamicallyQuantizableLinear)


@pytest.mark.parametrize("same", [True, False])
def test_response_attention_takes_the_arguments_of_torch(same: bool) -> None:
    hyperparameter_set = hyperparameters()
    layer = attention.ResponseMultiheadAttention(
        E, G, kdim=E if same else 4, batch_first=True, dtype=DOUBLE, hyperparameters=hyperparameter_set
    )
    assert isinstance(layer.out_proj, attention.ResponseOutputProjection)
    assert layer.out_proj.hyperparameters is hyperparameter_set
    assert (layer.in_proj_weight is not None) == same
    key = torch.randn(2, 3, layer.kdim, dtype=DOUBLE)
    assert layer(torch.randn(2, 3, E, dtype=DOUBLE), key, torch.randn(2, 3, E, dtype=DOUBLE))[0].shape == (2, 3, E)


def test_convert_refuses_weights_computed_by_a_hook() -> None:
    layer = nn.MultiheadAttention(E, G)
    del layer._parameters["in_proj_weight"]
    with pytest.raises(ValueError, match="computed from other parameters"):
        convert(layer, hyperparameters())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_attention_refuses_rows_that_do_not_match_the_batch(batch_first: bool, n: int) -> None:
    case = Case("", {"batch_first": batch_first}, t=n)
    with pytest.raises(ValueError, match=rf"ResponseMultiheadAttention.*{n} rows, got shape.*perturb='batch'"):
        at(respond(case.plain()), rows(n), *case.inputs())


def test_attention_refuses_a_key_of_another_batch_size() -> None:
    query, key = torch.randn(N, 3, E, dtype=DOUBLE), torch.randn(1, 3, E, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"4 rows, got shape \[1, 3, 6\]"):
        at(respond(CASES[0].plain()), rows(), query, key, key)


@pytest.mark.parametrize(
    "call",
    [
        {"attn_mask": torch.zeros(1, 3, dtype=DOUBLE)},
        {"attn_mask": torch.zeros(G, 3, 3, dtype=DOUBLE)},
        {"key_padding_mask": torch.zeros(1, 3).bool()},
        {"key_padding_mask": torch.zeros(3).bool()},
    ],
)
def test_attention_refuses_masks_that_would_broadcast(call: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"Expected \w+_mask of shape \[.*, got \["):
        at(respond(CASES[0].plain()), rows(), *CASES[0].inputs(), **call)


def test_attention_refuses_is_causal_without_a_mask() -> None:
    with pytest.raises(ValueError, match="expected attn_mask beside is_causal=True"):
        at(respond(CASES[0].plain()), rows(), *CASES[0].inputs(), is_causal=True)


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_refuses_nested_tensors(n: int) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, E, dtype=DOUBLE), torch.randn(3, E, dtype=DOUBLE)])
    with pytest.raises(ValueError, match="expected padded tensors, got a nested one"):
        at(respond(CASES[0].plain().eval()), rows(n), nested, nested, nested)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[11]], ids=str)
@pytest.mark.parametrize("n", [1, N])
def test_attention_under_autocast_is_close_to_float32(case: Case, n: int) -> None:
    layer = respond(case.plain(dtype=torch.float32))
    inputs, sample = case.inputs(dtype=torch.float32), rows(n).float()
    expected = at(layer, sample, *inputs, **case.call)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = at(layer, sample, *inputs, **case.call)[0]
    assert F.cosine_similarity(output.float().flatten(), expected.flatten(), 0) > 0.99
