"""A response of gates alone, against a full response whose response weights are the weights themselves."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from layers.attention_cases import CASES as ATTENTION
from layers.cases import CASES as LAYERS
from layers.recurrent_cases import CASES as RECURRENT
from support import METHODS, LitSmall, fit, response_layers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_stn import Float, HyperparameterSet, STNCallback, convert
from lightning_stn.binding import bind
from lightning_stn.methods.linearized import linear_predictions
from lightning_stn.passes import Pass
from lightning_stn.regularizers import WeightDrop

H, N = 2, 6

Call = Callable[[nn.Module], Any]


class Scaled(nn.Module):
    """Gets a generic response: a table, and a vector with a gate for each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.shift = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.T @ self.table + self.shift


def _detached(inputs: list[Tensor]) -> list[Tensor]:
    """Detached inputs; those that are one tensor remain one."""
    kept = {id(input): input.detach() for input in inputs}
    return [kept[id(input)] for input in inputs]


def cases() -> Iterator[Any]:
    """A plain layer, and a call of it."""
    double = {"dtype": torch.float64}
    for case in LAYERS:
        input = torch.randn(case.shape, **double)
        yield pytest.param(case.plain, lambda net, input=input: net(input), id=f"{case}")
    for case in RECURRENT:
        input, states = case.input(N), case.states(N)
        yield pytest.param(case.build, lambda net, i=input, s=states: net(i, s), id=f"{case}")
    for case in ATTENTION:
        mask = case.call.get("attn_mask")
        if "key_padding_mask" in case.call or (mask is not None and mask.dim() == 3):
            continue  # these have their own number of examples
        inputs = _detached(case.inputs(N))
        yield pytest.param(case.plain, lambda net, i=inputs, c=case.call: net(*i, **c)[0], id=f"{case}")
    indices = torch.randint(5, (N, 4))
    yield pytest.param(lambda: nn.Embedding(5, 3), lambda net: net(indices), id="embedding")
    words = torch.randn(N, 4, 8, **double)
    encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    yield pytest.param(lambda: copy.deepcopy(encoder), lambda net: net(words), id="encoder")
    yield pytest.param(Scaled, lambda net: net(words[..., :4]), id="generic")


every_layer = pytest.mark.parametrize(("plain", "call"), list(cases()))


def pair(plain: Callable[[], nn.Module], rows: int = 1) -> tuple[nn.Module, nn.Module]:
    """A layer with gates alone, and the layer with the full response that should compute the same.

    Skips the test where the layer does not support so many rows.
    """
    torch.manual_seed(0)
    net = plain().double()
    sets = [HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "ab"}, response=r) for r in FORMS]
    gates, full = (convert(copy.deepcopy(net), hyperparameters) for hyperparameters in sets)
    for layer, twin in zip(response_layers(gates), response_layers(full), strict=True):
        assert not any(map(layer.stores_response, layer.responding))
        if rows > 1 and not layer.per_example:
            pytest.skip("a generic response needs a shared row")
        for name in layer.responding:
            base, gate = getattr(layer, name), layer.gate_weights(name)
            gate.data.normal_(std=0.5)
            twin.gate_weights(name).data.copy_(gate)
            own = base.numel() == len(gate)
            twin.response_weights(name).data.copy_(torch.ones_like(base) if own else base)
    return gates, full


FORMS: tuple[Any, Any] = ("gates", "full")


def set_of(net: nn.Module) -> HyperparameterSet:
    found = next(response_layers(net)).hyperparameters
    assert found is not None
    return found


def flat(result: Any) -> Tensor:
    """All tensors of a result as one vector."""
    return result.flatten() if isinstance(result, Tensor) else torch.cat([flat(part) for part in result])


def gradients(net: nn.Module, call: Call, sample: Tensor, *, linear: bool = False) -> dict[str, Tensor]:
    """Output and gradients in the sample and in every parameter; the base parameter's includes that of `R`."""
    sample = sample.clone().requires_grad_()
    with bind(set_of(net), sample):
        if linear:
            with linear_predictions(set_of(net), shared=True):
                output = flat(call(net))
        else:
            output = flat(call(net))
    weights = torch.linspace(-1, 1, len(output), dtype=output.dtype)
    (output * weights).sum().backward()
    result = {"output": output.detach()}
    for path, layer in net.named_modules():
        for name, parameter in layer.named_parameters(path, recurse=False):
            if parameter.grad is not None:
                result[name] = parameter.grad
    if sample.grad is not None:
        result["sample"] = sample.grad
    return result


def expected(full: nn.Module, call: Call, sample: Tensor) -> dict[str, Tensor]:
    """What gates alone should give: the gradient of `R`, where `R` is the weight itself, belongs to the weight."""
    result = gradients(full, call, sample)
    for path, layer in full.named_modules():
        for name in getattr(layer, "responding", ()):
            prefix = f"{path}." if path else ""
            response = result.pop(f"{prefix}response_{name}")
            if getattr(layer, name).numel() != len(layer.gate_weights(name)):  # type: ignore[operator]
                result[prefix + name] = result[prefix + name] + response
    return result


@every_layer
@pytest.mark.parametrize("rows", [1, N], ids=["shared", "per-example"])
def test_gates_alone_equal_a_full_response_of_the_weights(plain: Any, call: Call, rows: int) -> None:
    gates, full = pair(plain, rows)
    sample = torch.randn(rows, H, dtype=torch.float64)
    got, wanted = gradients(gates, call, sample), expected(full, call, sample)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("plain", "input"),
    [
        (lambda: nn.Linear(64, 48), torch.randn(N, 64, dtype=torch.float64)),
        (lambda: nn.Conv2d(8, 16, 3), torch.randn(N, 8, 9, 9, dtype=torch.float64)),
        (lambda: nn.ConvTranspose1d(8, 16, 3), torch.randn(N, 8, 9, dtype=torch.float64)),
        (lambda: nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(N, 9, 64, dtype=torch.float64)),
    ],
    ids=["linear", "conv", "transposed", "attention"],
)
def test_gates_alone_take_no_second_product_for_rows_per_example(plain: Any, input: Tensor) -> None:
    gates, full = pair(plain, N)
    sample = torch.randn(N, H, dtype=torch.float64)
    inputs = [input] * (3 if isinstance(gates, nn.MultiheadAttention) else 1)
    counts = []
    contexts = (nullcontext(), *(bind(set_of(net), sample) for net in (gates, full)))
    for net, context in zip((plain().double(), gates, full), contexts, strict=True):
        with context, FlopCounterMode(display=False) as counter:
            net(*inputs)
        counts.append(counter.get_total_flops())
    plain_count, by_gates, by_weights = counts
    assert plain_count < by_gates < 1.1 * plain_count
    assert by_weights > 1.5 * plain_count


@every_layer
@pytest.mark.parametrize("rows", [1, N], ids=["shared", "per-example"])
def test_hypergradient_with_frozen_weights_equals_the_one_with_free_weights(plain: Any, call: Call, rows: int) -> None:
    gates, _ = pair(plain, rows)
    found = []
    for frozen in (False, True):
        sample = torch.full((rows, H), 0.3, dtype=torch.float64, requires_grad=True)
        with bind(set_of(gates), sample, frozen=frozen):
            found.append(torch.autograd.grad(flat(call(gates)).square().sum(), sample)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@every_layer
def test_conversion_with_gates_alone_changes_no_output_and_adds_gates_only(plain: Any, call: Call) -> None:
    torch.manual_seed(0)
    net = plain().double()
    hyperparameters = HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "ab"}, response="gates")
    converted = convert(copy.deepcopy(net), hyperparameters)
    torch.testing.assert_close(flat(call(converted)), flat(call(net)), rtol=1e-12, atol=1e-12)
    added = dict(converted.named_parameters()).keys() - dict(net.named_parameters()).keys()
    assert added
    assert all(name.endswith("_gate") for name in added)
    for name, parameter in net.named_parameters():
        assert torch.equal(converted.get_parameter(name), parameter)


@every_layer
def test_linearised_pass_of_gates_alone_trains_the_base_by_its_primal(plain: Any, call: Call) -> None:
    """In a linearised pass `dW = diag(V h) W` is a tangent, and its factor `W` a constant."""
    gates, full = pair(plain)
    sample = torch.randn(1, H, dtype=torch.float64)
    got, wanted = gradients(gates, call, sample, linear=True), gradients(full, call, sample, linear=True)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-9)


def test_weight_drop_drops_a_weight_together_with_its_response() -> None:
    gates, full = pair(lambda: nn.Linear(4, 5))
    input, sample = torch.randn(N, 4, dtype=torch.float64), torch.randn(1, H, dtype=torch.float64)
    outputs = []
    for net in (gates, full):
        dropped = WeightDrop(net, ["weight"], p=0.5)
        dropped.attach(set_of(net))
        torch.manual_seed(1)
        hyperparameters = set_of(net)
        values = hyperparameters.bound_values(sample)
        with hyperparameters.running(Pass(sample=sample, values=values)):
            outputs.append(dropped(input))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("perturb", ["example", "batch"])
def test_run_with_gates_alone_tunes_and_exports(method: str, perturb: Any) -> None:
    torch.manual_seed(0)
    module = LitSmall(response="gates")
    start = module.hyperparameters.values()
    fit(module, STNCallback(warmup=0, lr=0.05, seed=1, perturb=perturb, **METHODS[method]))
    assert all(value != start[name] for name, value in module.hyperparameters.values().items() if name != "length")
    assert all(gate.abs().sum() > 0 for layer in response_layers(module) for gate in layer.response_parameters())
    images = torch.randn(4, 1, 6, 6)
    module.eval()
    torch.testing.assert_close(module.export()(images), module.net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["half", None, True])
def test_unknown_form_is_refused(form: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected response to be 'full' or 'gates', got"):
        HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)}, response=form)
