"""Transformer layers against runs on each example alone, with torch's fast paths for inference switched off."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.attention_cases import (
    DOUBLE,
    MODES,
    E,
    G,
    N,
    at,
    causal,
    close,
    hyperparameters,
    nearly_equal,
    padding,
    respond,
    rows,
    set_of,
)
from support import random_gates, response_layers
from torch import Tensor, nn

from lightning_stn import convert
from lightning_stn.binding import bind
from lightning_stn.layers import ResponseLayer, transformer


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
    """Random inputs: a source for encoders, two sequences for decoders and the whole transformer."""
    lengths = (t,) if name in ENCODERS else (t, t + 1)
    return tuple(torch.randn(n, length, E, dtype=DOUBLE) for length in lengths)


@every_network
@pytest.mark.parametrize("t", [T, 3], ids=["as-many-steps-as-examples", "fewer-steps"])
def test_network_with_a_row_per_example_equals_runs_on_each_example(name: str, t: int) -> None:
    net = respond(BUILDERS[name]())
    inputs, sample = arguments(name, t), rows()
    alone = [at(net, sample[n : n + 1], *(x[n : n + 1] for x in inputs)) for n in range(N)]
    close(at(net, sample, *inputs), torch.cat(alone))


@every_network
def test_convert_keeps_the_outputs_of_a_network(name: str) -> None:
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
def test_fast_path_is_avoided_where_only_some_children_respond(exclude: Any) -> None:
    plain = encoder_layer().eval()
    layer = random_gates(convert(copy.deepcopy(plain), hyperparameters(), exclude=exclude))
    inputs, sample = arguments("relu"), rows(1)
    with torch.no_grad():
        output = at(layer, sample, *inputs)
        assert not torch.allclose(output, plain(*inputs), atol=1e-2)
    nearly_equal(output, at(layer, sample, *inputs).detach())


class Residual(nn.TransformerEncoderLayer):
    """A subclass of torch's layer: `convert` changes its children, but not the layer itself."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return src + super().forward(src, *args, **kwargs)


def test_response_attention_keeps_a_subclass_off_its_fast_path() -> None:
    plain = Residual(E, G, 8, batch_first=True, dropout=0.0, dtype=DOUBLE).eval()
    layer, inputs, sample = respond(plain), arguments("relu"), rows(1)
    assert type(layer) is Residual
    with torch.no_grad():
        output = at(layer, sample, *inputs)
    nearly_equal(output, at(layer, sample, *inputs).detach())


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_never_packs_padded_inputs(gates: bool, frozen: bool) -> None:
    """Padded positions are not compared, since a plain encoder that packs its input fills them with zeros."""
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
def test_transformer_with_all_masks_equals_runs_on_examples_without_padding(n: int) -> None:
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
def test_transformer_layers_with_time_first_need_one_row(build: Callable[..., nn.Module]) -> None:
    plain = build(batch_first=False)
    net = respond(plain, gates=False)
    input = torch.randn(N, N, E, dtype=DOUBLE)
    inputs = (input,) if build in (encoder_layer, encoder) else (input, input)
    assert torch.equal(at(net, rows(1), *inputs), plain(*inputs))
    with pytest.raises(ValueError, match=r"Response\w+Layer: .* 4 rows, got batch_first=False.*perturb='batch'"):
        at(net, rows(), *inputs)


@pytest.mark.parametrize("shape", [(3, T, E), (N, E), (1, T, E)])
@pytest.mark.parametrize("name", ["relu", "norm-first", "decoder-layer"])
def test_transformer_layers_refuse_inputs_without_an_example_for_each_row(name: str, shape: tuple[int, ...]) -> None:
    input = torch.randn(shape, dtype=DOUBLE)
    with pytest.raises(
        ValueError, match=r"4 rows, got batch_first=True and shape \[.*batch_first=True.*perturb='batch'"
    ):
        at(respond(BUILDERS[name]()), rows(), *[input] * len(arguments(name)))


@pytest.mark.parametrize("training", [True, False])
def test_encoder_dropout_equals_that_of_torch(training: bool) -> None:
    plain = encoder(dropout=0.3).train(training)
    net, inputs = respond(plain, gates=False), arguments("encoder")
    outputs = []
    for run in (plain, net):
        torch.manual_seed(0)
        outputs.append(run(*inputs))
    assert torch.equal(*outputs)


def test_all_children_of_a_response_container_respond() -> None:
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


def test_encoder_refuses_a_layer_that_reads_another_set() -> None:
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
def test_layers_of_a_copy_share_one_new_set_and_compute_the_same(name: str, clone: Callable[[Any], Any]) -> None:
    net, inputs, sample = respond(BUILDERS[name]()).eval(), arguments(name), rows()
    expected = at(net, sample, *inputs)
    copied = clone(net)
    sets = {id(layer.hyperparameters) for layer in response_layers(copied)}
    assert len(sets) == 1
    assert id(set_of(net)) not in sets
    with torch.no_grad():
        nearly_equal(at(copied, sample, *inputs), expected.detach())


@every_network
def test_converted_network_loads_plain_and_converted_state_dicts(name: str) -> None:
    """A plain state dict lacks only the response keys; a converted one restores the outputs."""
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
def test_make_plain_restores_the_fast_path_of_torch(name: str) -> None:
    plain = BUILDERS[name]().eval()
    net, inputs = respond(plain), arguments(name)
    set_of(net).unconstrained.data.copy_(torch.tensor([0.3, -0.5, 0.8]))
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


@pytest.mark.parametrize(
    ("build", "n"),
    [
        (SelfAttention, 1),
        (SelfAttention, N),
        (encoder, 1),
        pytest.param(
            encoder,
            N,
            marks=pytest.mark.skipif(
                torch.__version__ < "2.9", reason="torch 2.8 breaks the graph at a normalisation with a row per example"
            ),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_attention_and_encoder_compile_without_a_graph_break(build: Callable[[], nn.Module], n: int) -> None:
    torch._dynamo.reset()
    net, sample, (input,) = respond(build()), rows(n), arguments("relu")
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with bind(set_of(net), sample):
        nearly_equal(compiled(input), net(input))
        net.eval()
        with torch.no_grad():
            nearly_equal(compiled(input), net(input))
