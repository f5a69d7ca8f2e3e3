"""Attention and the transformer layers against naive float64 loops over examples, and kept off torch's fast paths."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_gates, response_layers
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_stn import Float, HyperparameterSet, convert
from lightning_stn.binding import bind
from lightning_stn.layers import ResponseLayer, ResponseLinear, attention, transformer

H, N, E, G = 3, 4, 6, 2
DOUBLE = torch.float64


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def nearly_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def hyperparameters() -> HyperparameterSet:
    return HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "abc"[:H]})


def causal(t: int, s: int) -> Tensor:
    return torch.ones(t, s).triu(1).bool()


def padding(s: int) -> Tensor:
    """True at the end of every example but the first, differently long."""
    return torch.arange(s) >= s - torch.arange(N)[:, None] % (s - 1)


@dataclass(frozen=True)
class Case:
    """A layer, the lengths and identity of its inputs, and the options of its call."""

    name: str
    layer: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    t: int = 3
    s: int | None = None
    same_key_and_value: bool = True

    def __str__(self) -> str:
        return self.name

    def plain(self, dropout: float = 0.0, dtype: torch.dtype = DOUBLE) -> nn.MultiheadAttention:
        layer = nn.MultiheadAttention(E, G, **{"batch_first": True, "dropout": dropout, **self.layer}, dtype=dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return layer

    def inputs(self, n: int = N, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
        """Query, key and value, of which some are one tensor."""

        def draw(length: int, size: int) -> Tensor:
            shape = (n, length, size) if self.layer.get("batch_first", True) else (length, n, size)
            return torch.randn(shape, dtype=dtype, requires_grad=True)

        query = draw(self.t, E)
        if self.s is None:
            return [query, query, query]
        key = draw(self.s, self.layer.get("kdim", E))
        return [query, key, key if self.same_key_and_value else draw(self.s, self.layer.get("vdim", E))]

    @property
    def batch_dim(self) -> int:
        return 0 if self.layer.get("batch_first", True) else 1


FLOAT_MASK = torch.randn(3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
PER_HEAD = torch.randn(N * G, 3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
FAST = {"need_weights": False}
CASES = [
    Case("weights"),
    Case("no-weights", call=FAST),
    Case("as-long-as-the-batch", call=FAST, t=N),
    Case("as-long-as-the-batch-time-first", {"batch_first": False}, FAST, t=N),
    Case("time-first", {"batch_first": False}),
    Case("no-bias", {"bias": False}, FAST),
    Case("cross", call=FAST, s=5),
    Case("cross-as-long-as-the-batch", {"batch_first": False}, t=N, s=N),
    Case("three-tensors", s=5, same_key_and_value=False),
    Case("kdim-vdim", {"kdim": 4, "vdim": 5}, s=5, same_key_and_value=False),
    Case("vdim-no-bias", {"vdim": 5, "bias": False}, FAST, s=5, same_key_and_value=False),
    Case("bias-kv", {"add_bias_kv": True}, FAST),
    Case("bias-kv-zero", {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False}, s=5),
    Case("zero", {"add_zero_attn": True}, FAST),
    Case("causal", call={"attn_mask": causal(3, 3), "is_causal": True, **FAST}),
    Case("causal-bias-kv", {"add_bias_kv": True}, {"attn_mask": causal(3, 3), "is_causal": True, **FAST}),
    Case("causal-weights", call={"attn_mask": causal(3, 3), "is_causal": True}),
    Case("causal-padded", call={"attn_mask": causal(4, 4), "is_causal": True, "key_padding_mask": padding(4)}, t=4),
    Case("bool-mask", call={"attn_mask": causal(3, 5), **FAST}, s=5),
    Case("float-mask", call={"attn_mask": FLOAT_MASK}, s=5),
    Case("mask-per-head", {"add_zero_attn": True}, {"attn_mask": PER_HEAD, **FAST}, s=5),
    Case("mask-per-head-weights", call={"attn_mask": PER_HEAD, "average_attn_weights": False}, s=5),
    Case("padded", call={"key_padding_mask": padding(5), **FAST}, s=5),
    Case("padded-time-first", {"batch_first": False, "add_bias_kv": True}, {"key_padding_mask": padding(5)}, s=5),
    Case("float-padding", call={"key_padding_mask": -2.0 * padding(5).double(), "attn_mask": FLOAT_MASK, **FAST}, s=5),
    Case("both-masks", call={"key_padding_mask": padding(5), "attn_mask": causal(3, 5), **FAST}, s=5),
    Case("weights-per-head", call={"average_attn_weights": False}, s=5),
]
MODES = list(itertools.product([True, False], [True, False], [1, N]))
"""Training or evaluation, with or without gradients, one row or a row per example."""
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def respond(plain: nn.Module, gates: bool = True) -> Any:
    """A converted copy."""
    layer = convert(copy.deepcopy(plain), hyperparameters())
    return random_gates(layer, std=0.7) if gates else layer


def the_set(module: nn.Module) -> HyperparameterSet:
    found = next(response_layers(module)).hyperparameters
    assert found is not None
    return found


def at(module: nn.Module, sample: Tensor, *arguments: Any, **options: Any) -> Any:
    with bind(the_set(module), sample):
        return module(*arguments, **options)


def rows(n: int = N) -> Tensor:
    return torch.randn(n, H, dtype=DOUBLE)


def effective(layer: ResponseLayer, name: str, row: Tensor) -> Tensor:
    """One parameter at one row, unit by unit: `W[o] + (V h)[o] R[o]`."""
    base, response, gates = layer.get_parameter(name), layer.response(name), layer.gates(name)
    flat = (base.flatten(), response.flatten()) if base.dim() == 3 else (base, response)
    units = [
        flat[0][o] + sum(gates[o, h] * row[h] for h in range(H)) * flat[1][o]
        for o in range(base.shape[-1] if base.dim() == 3 else base.shape[0])
    ]
    return torch.stack(units).reshape(base.shape)


def naive(layer: Any, plain: nn.Module, case: Case, sample: Tensor, inputs: list[Tensor]) -> tuple[Tensor, Any]:
    """Each example's own parameters, then the plain layer on that example alone."""
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
def test_it_equals_the_naive_loop(case: Case) -> None:
    plain, inputs = case.plain(), case.inputs()
    layer = respond(plain)
    for training, grad, n in MODES:
        sample = rows(n)
        with torch.set_grad_enabled(grad):
            output = at(layer.train(training), sample, *inputs, **case.call)
        close(output, naive(layer, plain, case, sample.expand(N, H), inputs))


@every_case
def test_merged_path_equals_per_example_path_with_equal_rows(case: Case) -> None:
    layer, inputs, sample = respond(case.plain()), case.inputs(), rows(1)
    shared, repeated = (at(layer, s, *inputs, **case.call) for s in (sample, sample.repeat(N, 1)))
    close(repeated, shared)
    assert (repeated[1] is None) == (not case.call.get("need_weights", True))


@every_case
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_equal_those_of_the_naive_loop(case: Case, shared: bool) -> None:
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
def test_with_zero_gates_it_equals_the_torch_layer(case: Case) -> None:
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
def test_dropout_is_torch_s_own(case: Case, n: int) -> None:
    plain, inputs = case.plain(dropout=0.5), case.inputs()
    layer, sample, outputs = respond(plain, gates=False), rows(n), []
    for run in (lambda: plain(*inputs, **case.call), lambda: at(layer, sample, *inputs, **case.call)):
        torch.manual_seed(0)
        outputs.append(run())
    nearly_equal(*outputs)
    assert not torch.allclose(outputs[0][0], plain.eval()(*inputs, **case.call)[0])


@every_case
def test_unattached_it_equals_the_torch_layer_bit_for_bit(case: Case) -> None:
    plain, inputs = case.plain(), case.inputs()
    layer = respond(plain)
    for module in response_layers(layer):
        module.__dict__["_hyperparameters"] = None
    output, expected = layer(*inputs, **case.call), plain(*inputs, **case.call)
    assert torch.equal(output[0], expected[0])


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_an_input_without_a_batch_takes_one_row_only(case: Case) -> None:
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
def test_a_row_reaches_its_own_example_only(case: Case) -> None:
    layer, inputs, sample = respond(case.plain()), case.inputs(), rows()
    before = at(layer, sample, *inputs, **case.call)[0]
    sample[2] += 1
    changed = (at(layer, sample, *inputs, **case.call)[0] != before).movedim(case.batch_dim, 0).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


@every_case
def test_size_and_start_of_the_response(case: Case) -> None:
    plain = case.plain()
    layer = respond(plain, gates=False)
    for module in response_layers(layer):
        assert (
            module.responding
            == tuple(name for name, _ in module.named_parameters(recurse=False))[: len(module.responding)]
        )
        for name in module.responding:
            base, response, gates = module.get_parameter(name), module.response(name), module.gates(name)
            assert response.shape == base.shape
            assert gates.shape == (base.shape[-1] if base.dim() == 3 else base.shape[0], H)
            assert not gates.any()
            assert (response != 0).all()
    assert {name for m in response_layers(layer) for name in m.responding} >= {
        name.split(".")[-1] for name, _ in plain.named_parameters()
    }


def test_the_response_starts_as_torch_s_initialisers_draw() -> None:
    """Of uniform draws the largest of 10,000 lies within 1% of its bound; the normal ones keep their deviation."""
    layer: Any = convert(nn.MultiheadAttention(100, 2, add_bias_kv=True), hyperparameters())
    assert 0.99 < layer.response_in_proj_weight.abs().max() / (6 / 400) ** 0.5 <= 1
    assert 0.09 < layer.response_in_proj_bias.abs().max() <= 0.1
    assert 0.07 < layer.response_bias_k.std() < 0.13


@pytest.mark.parametrize("frozen", [{"in_proj_weight", "out_proj.weight"}, {"in_proj_weight", "in_proj_bias"}], ids=str)
def test_parameters_that_are_frozen_do_not_respond(frozen: set[str]) -> None:
    plain, inputs, sample = CASES[0].plain(), CASES[0].inputs(), rows()
    for name in frozen:
        plain.get_parameter(name).requires_grad_(False)
    layer = respond(plain)
    responding = {*layer.responding, *(f"out_proj.{name}" for name in layer.out_proj.responding)}
    assert responding == {name for name, _ in plain.named_parameters()} - frozen
    assert not torch.allclose(at(layer, sample, *inputs)[0], plain(*inputs)[0], atol=1e-2)
    close(at(layer, sample, *inputs), naive(layer, plain, CASES[0], sample, inputs))
    close(at(layer, sample[:1], *inputs), naive(layer, plain, CASES[0], sample[:1].expand(N, H), inputs))


def test_the_output_projection_may_stay_plain() -> None:
    layer: Any = random_gates(convert(CASES[0].plain(), hyperparameters(), exclude=["out_proj"]))
    assert type(layer.out_proj) is NonDynamicallyQuantizableLinear
    inputs, sample = CASES[0].inputs(), rows(1)
    close(at(layer, sample.repeat(N, 1), *inputs), at(layer, sample, *inputs))


def test_what_convert_makes_of_it() -> None:
    layer = respond(CASES[0].plain())
    assert type(layer) is attention.ResponseMultiheadAttention
    assert type(layer.out_proj) is attention.ResponseOutputProjection
    assert isinstance(layer.out_proj, ResponseLinear)
    assert isinstance(layer.out_proj, NonDynamicallyQuantizableLinear)


@pytest.mark.parametrize("same", [True, False])
def test_built_directly_it_keeps_the_torch_constructor(same: bool) -> None:
    hyperparameter_set = hyperparameters()
    layer = attention.ResponseMultiheadAttention(
        E, G, kdim=E if same else 4, batch_first=True, dtype=DOUBLE, hyperparameters=hyperparameter_set
    )
    assert isinstance(layer.out_proj, attention.ResponseOutputProjection)
    assert layer.out_proj.hyperparameters is hyperparameter_set
    assert (layer.in_proj_weight is not None) == same
    key = torch.randn(2, 3, layer.kdim, dtype=DOUBLE)
    assert layer(torch.randn(2, 3, E, dtype=DOUBLE), key, torch.randn(2, 3, E, dtype=DOUBLE))[0].shape == (2, 3, E)


def test_weights_computed_by_a_hook_are_refused() -> None:
    layer = nn.MultiheadAttention(E, G)
    del layer._parameters["in_proj_weight"]
    with pytest.raises(ValueError, match="computed from other parameters"):
        convert(layer, hyperparameters())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_rows_that_do_not_fit_the_batch_are_refused(batch_first: bool, n: int) -> None:
    case = Case("", {"batch_first": batch_first}, t=n)
    with pytest.raises(ValueError, match=rf"ResponseMultiheadAttention.*{n} rows, got shape.*perturb='batch'"):
        at(respond(case.plain()), rows(n), *case.inputs())


def test_a_key_of_another_batch_is_refused() -> None:
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
def test_masks_that_would_broadcast_are_refused(call: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"Expected \w+_mask of shape \[.*, got \["):
        at(respond(CASES[0].plain()), rows(), *CASES[0].inputs(), **call)


def test_a_causal_hint_without_its_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="expected attn_mask beside is_causal=True"):
        at(respond(CASES[0].plain()), rows(), *CASES[0].inputs(), is_causal=True)


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(n: int) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, E, dtype=DOUBLE), torch.randn(3, E, dtype=DOUBLE)])
    with pytest.raises(ValueError, match="expected padded tensors, got a nested one"):
        at(respond(CASES[0].plain().eval()), rows(n), nested, nested, nested)


def encoder_layer(activation: Any = "relu", norm_first: bool = False, **options: Any) -> nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.0, "dtype": DOUBLE, **options}
    return nn.TransformerEncoderLayer(E, G, 8, activation=activation, norm_first=norm_first, **options)


def decoder_layer(norm_first: bool = False, **options: Any) -> nn.TransformerDecoderLayer:
    options = {"batch_first": True, "dropout": 0.0, "dtype": DOUBLE, **options}
    return nn.TransformerDecoderLayer(E, G, 8, norm_first=norm_first, **options)


def transformer_net(**options: Any) -> nn.Transformer:
    options = {"batch_first": True, "dropout": 0.0, "dtype": DOUBLE, **options}
    return nn.Transformer(E, G, 1, 2, 8, **options)


def encoder(**options: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(encoder_layer(**options), 2, norm=nn.LayerNorm(E, dtype=DOUBLE))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "relu": encoder_layer,
    "gelu": lambda: encoder_layer("gelu"),
    "callable": lambda: encoder_layer(torch.tanh),
    "module": lambda: encoder_layer(nn.GELU()),
    "norm-first": lambda: encoder_layer(norm_first=True),
    "norm-first-gelu-no-bias": lambda: encoder_layer("gelu", True, bias=False),
    "encoder": encoder,
}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "decoder-layer": decoder_layer,
    "decoder-layer-norm-first": lambda: decoder_layer(True),
    "decoder": lambda: nn.TransformerDecoder(decoder_layer(), 2),
    "transformer": transformer_net,
}
BUILDERS = {**ENCODERS, **DECODERS}
every_network = pytest.mark.parametrize("name", BUILDERS)
T = 4


def arguments(name: str, t: int = T, n: int = N) -> tuple[Tensor, ...]:
    """Source, or target and memory."""
    lengths = (t,) if name in ENCODERS else (t, t + 1)
    return tuple(torch.randn(n, length, E, dtype=DOUBLE) for length in lengths)


@every_network
@pytest.mark.parametrize("t", [T, 3], ids=["as-long-as-the-batch", "shorter"])
def test_networks_with_a_row_per_example_equal_themselves_on_each_example(name: str, t: int) -> None:
    net = respond(BUILDERS[name]())
    inputs, sample = arguments(name, t), rows()
    alone = [at(net, sample[n : n + 1], *(x[n : n + 1] for x in inputs)) for n in range(N)]
    close(at(net, sample, *inputs), torch.cat(alone))


@every_network
def test_converting_does_not_change_what_a_network_computes(name: str) -> None:
    plain, inputs = BUILDERS[name](), arguments(name)
    net = respond(plain, gates=False)
    for training, grad, n in MODES:
        with torch.set_grad_enabled(grad):
            expected = plain.train(training)(*inputs)
            output = at(net.train(training), rows(n), *inputs)
            nearly_equal(output, expected)
            if n == 1 and grad:
                assert torch.equal(output, expected)
                assert torch.equal(net(*inputs), expected)


@every_network
@pytest.mark.parametrize("n", [1, N])
def test_evaluation_without_gradients_uses_the_response(name: str, n: int) -> None:
    plain = BUILDERS[name]().eval()
    net, inputs, sample = respond(plain), arguments(name), rows(n)
    with_gradients = at(net, sample, *inputs)
    for disabled in (torch.no_grad(), torch.inference_mode()):
        with disabled:
            output = at(net, sample, *inputs)
            assert not torch.allclose(output, plain(*inputs), atol=1e-2)
        nearly_equal(output, with_gradients.detach())
    net.requires_grad_(False)
    nearly_equal(at(net, sample, *inputs), with_gradients.detach())


@pytest.mark.parametrize("exclude", [[nn.MultiheadAttention], ["linear*"]], ids=str)
def test_the_fast_path_is_not_taken_where_only_some_children_respond(exclude: Any) -> None:
    plain = encoder_layer().eval()
    layer = random_gates(convert(copy.deepcopy(plain), hyperparameters(), exclude=exclude))
    inputs, sample = arguments("relu"), rows(1)
    with torch.no_grad():
        output = at(layer, sample, *inputs)
        assert not torch.allclose(output, plain(*inputs), atol=1e-2)
    nearly_equal(output, at(layer, sample, *inputs).detach())


class Residual(nn.TransformerEncoderLayer):
    """A subclass, which convert leaves alone while its children respond."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return src + super().forward(src, *args, **kwargs)


def test_the_attention_keeps_unknown_layers_off_their_fast_path() -> None:
    plain = Residual(E, G, 8, batch_first=True, dropout=0.0, dtype=DOUBLE).eval()
    layer, inputs, sample = respond(plain), arguments("relu"), rows(1)
    assert type(layer) is Residual
    with torch.no_grad():
        output = at(layer, sample, *inputs)
    nearly_equal(output, at(layer, sample, *inputs).detach())


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_encoder_never_packs_its_input(gates: bool, frozen: bool) -> None:
    """Where the plain one does, it leaves zeros, or their norm, at the padded positions."""
    plain, mask, inputs = encoder(), padding(T), arguments("encoder")
    net = respond(plain, gates).requires_grad_(not frozen)
    for training, grad, n in MODES:
        sample = rows(n)
        with torch.set_grad_enabled(grad):
            output = at(net.train(training), sample, *inputs, src_key_padding_mask=mask)
            if not gates:
                expected = plain.train(training)(*inputs, src_key_padding_mask=mask)
                nearly_equal(output[~mask], expected[~mask])
        for k in range(N):
            alone = at(net, sample[k % n : k % n + 1], inputs[0][k : k + 1, ~mask[k]])
            close(output[k, ~mask[k]].detach(), alone[0].detach())


@pytest.mark.parametrize("n", [1, N])
def test_a_transformer_with_all_its_masks(n: int) -> None:
    net, inputs, sample = respond(transformer_net().eval()), arguments("transformer"), rows(n)
    masks = {
        "src_key_padding_mask": padding(T),
        "memory_key_padding_mask": padding(T),
        "tgt_key_padding_mask": padding(T + 1),
        "tgt_mask": causal(T + 1, T + 1),
    }
    with torch.no_grad():
        output = at(net, sample, *inputs, **masks)
    padded = padding(T + 1)
    for k in range(N):
        source, target = inputs[0][k : k + 1, ~padding(T)[k]], inputs[1][k : k + 1, ~padded[k]]
        length = target.shape[1]
        alone = at(net, sample[k % n : k % n + 1], source, target, tgt_mask=causal(length, length))
        close(output[k, ~padded[k]], alone[0].detach())


@pytest.mark.parametrize("build", [encoder_layer, encoder, decoder_layer, transformer_net])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_time_first_takes_one_row_only(build: Callable[..., nn.Module]) -> None:
    plain = build(batch_first=False)
    net = respond(plain, gates=False)
    input = torch.randn(N, N, E, dtype=DOUBLE)
    inputs = (input,) if build in (encoder_layer, encoder) else (input, input)
    assert torch.equal(at(net, rows(1), *inputs), plain(*inputs))
    with pytest.raises(ValueError, match=r"Response\w+Layer: .* 4 rows, got batch_first=False.*perturb='batch'"):
        at(net, rows(), *inputs)


@pytest.mark.parametrize("shape", [(3, T, E), (N, E), (1, T, E)])
@pytest.mark.parametrize("name", ["relu", "norm-first", "decoder-layer"])
def test_inputs_without_an_example_for_each_row_are_refused(name: str, shape: tuple[int, ...]) -> None:
    input = torch.randn(shape, dtype=DOUBLE)
    with pytest.raises(
        ValueError, match=r"4 rows, got batch_first=True and shape \[.*batch_first=True.*perturb='batch'"
    ):
        at(respond(BUILDERS[name]()), rows(), *[input] * len(arguments(name)))


@pytest.mark.parametrize("training", [True, False])
def test_dropouts_of_a_network_are_torch_s_own(training: bool) -> None:
    plain = encoder(dropout=0.3).train(training)
    net, inputs = respond(plain, gates=False), arguments("encoder")
    outputs = []
    for run in (plain, net):
        torch.manual_seed(0)
        outputs.append(run(*inputs))
    assert torch.equal(*outputs)


def test_containers_built_directly_respond_throughout() -> None:
    shared = hyperparameters()
    layer = transformer.ResponseTransformerEncoderLayer(E, G, 8, batch_first=True, hyperparameters=shared)
    decoder = transformer.ResponseTransformerDecoderLayer(E, G, 8, batch_first=True, hyperparameters=shared)
    net = transformer.ResponseTransformerEncoder(
        nn.TransformerEncoderLayer(E, G, 8, batch_first=True), 2, hyperparameters=shared
    )
    for built in (layer, decoder, net):
        for module in built.modules():
            if next(module.parameters(recurse=False), None) is not None:
                assert isinstance(module, ResponseLayer)
                assert module.hyperparameters is shared


def test_an_encoder_around_a_layer_with_a_set_of_its_own_is_refused() -> None:
    layer = transformer.ResponseTransformerEncoderLayer(E, G, 8, batch_first=True, hyperparameters=hyperparameters())
    with (
        pytest.raises(ValueError, match="already reads another HyperparameterSet"),
        pytest.warns(UserWarning, match="enable_nested_tensor is True, but self.use_nested_tensor is False"),
    ):
        transformer.ResponseTransformerEncoder(layer, 2, hyperparameters=hyperparameters())


def saved_and_loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


CLONES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("name", ["encoder", "transformer"])
@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_copies_compute_the_same_and_share_one_set(name: str, clone: Callable[[Any], Any]) -> None:
    net, inputs, sample = respond(BUILDERS[name]()).eval(), arguments(name), rows()
    expected = at(net, sample, *inputs)
    copied = clone(net)
    sets = {id(layer.hyperparameters) for layer in response_layers(copied)}
    assert len(sets) == 1
    assert id(the_set(net)) not in sets
    with torch.no_grad():
        nearly_equal(at(copied, sample, *inputs), expected.detach())


@every_network
def test_checkpoints(name: str) -> None:
    """Of a plain one only response keys are missing; a converted one comes back as it was."""
    plain, other = BUILDERS[name](), BUILDERS[name]()
    net, inputs, sample = respond(other), arguments(name), rows()
    keys = net.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all("response_" in key or key.endswith("_gate") for key in keys.missing_keys)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in plain.state_dict().items())
    again = respond(other, gates=False)
    again.load_state_dict(net.state_dict())
    assert torch.equal(at(again, sample, *inputs), at(net, sample, *inputs))


@pytest.mark.parametrize("name", ["relu", "encoder", "transformer"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_made_plain_again_it_has_torch_s_fast_path_back(name: str) -> None:
    plain = BUILDERS[name]().eval()
    net, inputs = respond(plain), arguments(name)
    the_set(net).unconstrained.data.copy_(torch.tensor([0.3, -0.5, 0.8]))
    expected = net(*inputs).detach()
    for layer in list(response_layers(net)):
        layer.make_plain()
    assert [type(module) for module in net.modules()] == [type(module) for module in plain.modules()]
    for module, original in zip(net.modules(), plain.modules(), strict=True):
        for attribute in ("use_nested_tensor", "activation_relu_or_gelu", "_qkv_same_embed_dim"):
            assert getattr(module, attribute, None) == getattr(original, attribute, None)
    with torch.no_grad():
        nearly_equal(net(*inputs), expected)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, G, batch_first=True, dtype=DOUBLE)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.attention(input, input, input, need_weights=False)[0]
        return output


ENCODER = pytest.param(encoder, marks=pytest.mark.skipif(torch.__version__ < "2.5", reason="breaks in torch's layers"))


@pytest.mark.parametrize("build", [SelfAttention, ENCODER])
@pytest.mark.parametrize("n", [1, N])
@pytest.mark.filterwarnings("ignore")
def test_it_compiles_without_a_graph_break(build: Callable[[], nn.Module], n: int) -> None:
    torch._dynamo.reset()
    net, sample, (input,) = respond(build()), rows(n), arguments("relu")
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with bind(the_set(net), sample):
        nearly_equal(compiled(input), net(input))
        net.eval()
        with torch.no_grad():
            nearly_equal(compiled(input), net(input))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[11]], ids=str)
@pytest.mark.parametrize("n", [1, N])
def test_autocast(case: Case, n: int) -> None:
    layer = respond(case.plain(dtype=torch.float32))
    inputs, sample = case.inputs(dtype=torch.float32), rows(n).float()
    expected = at(layer, sample, *inputs, **case.call)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = at(layer, sample, *inputs, **case.call)[0]
    assert F.cosine_similarity(output.float().flatten(), expected.flatten(), 0) > 0.99
