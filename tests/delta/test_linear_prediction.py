"""Linearised predictions of Delta-STN against the same predictions by double backward, in float64."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_gates, response_layers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_stn import Float, HyperparameterSet
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.convert import convert
from lightning_stn.methods.base import recentre
from lightning_stn.methods.delta import response_pass, shared_pass

N, H = 4, 3


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(input)))
        return F.relu(input + self.norms[1](self.second(hidden)))


class Recurrent(nn.Module):
    """Word embeddings, two recurrent layers, and a prediction for each word."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3)
        self.recurrent = kind(3, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.recurrent(self.words(input))[0])


class Translation(nn.Module):
    """Two LSTMs; the second starts at the final state of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = nn.LSTM(3, 4, batch_first=True), nn.LSTM(3, 4, batch_first=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.writer(input, self.reader(input)[1])[0]


class Attention(nn.Module):
    """Layer normalisation, then self-attention with a learned key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.norm(input)
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


class Force(nn.Module):
    """The derivative of an energy, as models of molecules have it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, input: Tensor) -> Tensor:
        with torch.enable_grad():
            place = input.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(place).sum(), place, create_graph=True)
        return force


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2)
    )


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.GELU(), nn.Conv2d(3, 1, 3), nn.Softplus())


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 2)


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def words(*shape: int) -> Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, real(N, 3)),
    "cnn": (cnn, real(N, 2, 6, 6)),
    "transposed": (transposed, real(N, 2, 3, 3)),
    "block": (Block, real(N, 2, 4, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), words(N, 5)),
    "gru": (lambda: Recurrent(nn.GRU), words(N, 5)),
    "translation": (Translation, real(N, 5, 3)),
    "attention": (Attention, real(N, 3, 4)),
    "encoder": (encoder, real(N, 3, 4)),
}


def tuned(build: Callable[[], nn.Module]) -> tuple[nn.Module, HyperparameterSet]:
    """A centred network in float64 with random response weights and gates, and its hyperparameters."""
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({f"h{i}": Float(0.0, 1.0, init=0.2 + 0.3 * i) for i in range(H)})
    net = convert(build(), hyperparameters).double()
    recentre(net, hyperparameters, True)
    return random_gates(net, 0.5), hyperparameters


def by_double_backward(net: nn.Module, hyperparameters: HyperparameterSet, x: Tensor, shift: Tensor) -> Tensor:
    """`f(0) + f'(0)`, where `f(t)` is the output at `lambda + t * shift`; the derivative takes two reverse passes."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    parts = [(x, shift)]
    if any(isinstance(module, nn.RNNBase) for module in net.modules()) and len(shift) > 1:
        # One example at a time: with one row torch's LSTM and GRU run, which have second derivatives.
        parts = list(zip(x.split(1), shift.split(1), strict=True))
    outputs = []
    for input, row in parts:
        with bind(hyperparameters, hyperparameters.current() + t * row), sdpa_kernel(SDPBackend.MATH):
            outputs.append(net(input))
    output = torch.cat(outputs)
    dummy = torch.zeros_like(output, requires_grad=True)
    (by_t,) = torch.autograd.grad(output, t, dummy, create_graph=True)
    (tangent,) = torch.autograd.grad(by_t, dummy)
    return (output + tangent).detach()


@pytest.mark.parametrize("rows", [1, N])
@pytest.mark.parametrize("name", NETWORKS)
def test_linearised_prediction_equals_double_backward(name: str, rows: int) -> None:
    build, x = NETWORKS[name]
    net, hyperparameters = tuned(build)
    shift = real(rows, H).float().double()
    sample = hyperparameters.current() + shift
    expected = by_double_backward(net, hyperparameters, x, shift)
    bind_weight_phase(hyperparameters, sample)
    with response_pass(net, hyperparameters, linear=True):
        found = net(x)
    unbind(hyperparameters)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found - net(x)).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, N])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_in_the_response_equals_finite_differences(name: str, rows: int) -> None:
    build, x = NETWORKS[name]
    net, hyperparameters = tuned(build)
    sample = hyperparameters.current() + real(rows, H).float().double()
    response = [p for layer in response_layers(net) for p in layer.response_parameters()]

    def predict(*_: Tensor) -> Tensor:
        bind_weight_phase(hyperparameters, sample)
        with response_pass(net, hyperparameters, linear=True):
            output = net(x)
        unbind(hyperparameters)
        return output  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(predict, response, fast_mode=True)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_pass_updates_batch_statistics_as_torch(momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(2, momentum=momentum).double()
    hyperparameters = HyperparameterSet({"h": Float(0.0, 1.0, init=0.5)})
    net = random_gates(convert(copy.deepcopy(plain), hyperparameters), 0.5)
    recentre(net, hyperparameters, True)
    for _ in range(3):
        x = torch.randn(N, 2, 3, 3).double()
        plain(x)
        bind_weight_phase(hyperparameters, hyperparameters.sample(1))
        with shared_pass(hyperparameters):
            net(x)
        unbind(hyperparameters)
    assert net.num_batches_tracked == 3
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), buffer)


@pytest.mark.parametrize("rows", [1, N])
def test_consecutive_networks_are_linearised_as_one(rows: int) -> None:
    """The second network receives the prediction of the first together with its tangent."""
    build, x = NETWORKS["block"]
    whole, hyperparameters = tuned(lambda: nn.Sequential(build(), nn.Conv2d(2, 3, 1), nn.Tanh()))
    shift = real(rows, H).float().double()
    expected = by_double_backward(whole, hyperparameters, x, shift)
    hyperparameters.networks[:] = [whole[0], whole[1:]]  # type: ignore[index]
    bind_weight_phase(hyperparameters, hyperparameters.current() + shift)
    with response_pass(whole, hyperparameters, linear=True):
        first, second = hyperparameters.networks
        found = second(input=first(x))
    unbind(hyperparameters)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "block", "translation"])
def test_linearised_network_refuses_an_input_that_requires_a_gradient(name: str) -> None:
    """Backward differentiates the primal only, so the gradient in the input would lack the part of the tangent."""
    build, x = NETWORKS[name]
    net, hyperparameters = tuned(build)
    bind_weight_phase(hyperparameters, hyperparameters.current() + real(len(x), H).float().double())
    with (
        pytest.raises(NotImplementedError, match=r"input that requires a gradient.*linearize=False"),
        response_pass(net, hyperparameters, linear=True),
    ):
        net(x.clone().requires_grad_())
    unbind(hyperparameters)


@pytest.mark.parametrize("rows", [1, N])
def test_network_that_differentiates_itself_is_refused(rows: int) -> None:
    """Its own gradient is taken through the primal, so the prediction would lack what the response does to it."""
    net, hyperparameters = tuned(Force)
    bind_weight_phase(hyperparameters, hyperparameters.current() + real(rows, H).float().double())
    with (
        pytest.raises(NotImplementedError, match=r"differentiates itself.*use DeltaSTN\(linearize=False\)"),
        response_pass(net, hyperparameters, linear=True),
    ):
        net(real(N, 3))
    unbind(hyperparameters)


@dataclass
class Output:
    """What some networks return: tensors beside other things."""

    hidden: tuple[Tensor, ...]
    rest: dict[str, Any]
    loss: Tensor | None = None
    checked: bool = field(init=False, default=True)


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, input: Tensor) -> Output:
        output = self.layers(input)
        return Output((output, 2 * output), {"output": output, "name": "mlp"})


@pytest.mark.parametrize("rows", [1, N])
def test_predictions_inside_a_dataclass_are_linearised(rows: int) -> None:
    build, x = NETWORKS["mlp"]
    net, hyperparameters = tuned(build)
    shift = real(rows, H).float().double()
    expected = by_double_backward(net, hyperparameters, x, shift)
    structured, own = tuned(Structured)
    bind_weight_phase(own, own.current() + shift)
    with response_pass(structured, own, linear=True):
        found = structured(x)
    unbind(own)
    assert (found.rest["name"], found.loss, found.checked) == ("mlp", None, True)
    predictions = (*found.hidden, found.rest["output"])
    for prediction, wanted in zip(predictions, (expected, 2 * expected, expected), strict=True):
        torch.testing.assert_close(prediction, wanted, rtol=1e-10, atol=1e-10)
