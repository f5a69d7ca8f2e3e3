"""Centred STN is the first paper's model in other coordinates."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_gates
from torch import Tensor, nn

from lightning_stn import STN, Float, HyperparameterSet, convert
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.methods.base import recentre

X = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3
STEP = torch.tensor([0.7, -1.1, 0.3])


class Net(nn.Module):
    """A layer of every family that computes its base and response in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.up = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.rnn = nn.LSTM(20, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.embedding = nn.Embedding(3, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.conv(x).tanh())).tanh()
        x, _ = self.rnn(x.transpose(1, 2).flatten(2))
        x = x + self.embedding(Y.unsqueeze(1))
        x, _ = self.attention(x, x, x)
        logits: Tensor = self.out(x.mean(1))
        return logits


def make_net() -> tuple[Any, HyperparameterSet]:
    torch.manual_seed(0)
    starts = {"a": 0.05, "b": 0.3, "c": 0.9}
    hyperparameters = HyperparameterSet({name: Float(0.0, 1.0, init=init) for name, init in starts.items()})
    net = convert(Net(), hyperparameters).double()
    return random_gates(net, 0.3), hyperparameters


def outputs(net: nn.Module, hyperparameters: HyperparameterSet, samples: Tensor) -> Tensor:
    with bind(hyperparameters, samples):
        prediction: Tensor = net(X)
    return prediction


SAMPLES = {
    "shared row": torch.tensor([[0.4, -2.0, 1.5]]),
    "row per example": torch.randn(6, 3, generator=torch.Generator().manual_seed(2)) - 1,
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_hyperparameter_step_leaves_the_best_response_as_it_was(samples: Tensor) -> None:
    """In both coordinates, and so the two stay equal; without `follow` the function would change."""
    net, hyperparameters = make_net()
    expected = outputs(net, hyperparameters, samples)
    method = STN(centred=True)
    method.prepare(net, hyperparameters)
    torch.testing.assert_close(outputs(net, hyperparameters, samples), expected, rtol=1e-6, atol=1e-6)
    hyperparameters.unconstrained += STEP
    assert (outputs(net, hyperparameters, samples) - expected).abs().max() > 1e-2
    method.follow(net, hyperparameters, STEP)
    torch.testing.assert_close(outputs(net, hyperparameters, samples), expected, rtol=1e-6, atol=1e-6)
    net.eval()
    uncentred, others = make_net()
    others.unconstrained += STEP
    torch.testing.assert_close(net(X), uncentred.eval()(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_weight_step_equals_the_uncentred_one_with_a_transformed_optimiser(samples: Tensor) -> None:
    """Gradients of the centred parameters, taken to the uncentred ones by the chain rule, make the same SGD step."""
    lr = 0.1
    net, hyperparameters = make_net()
    centred, center = copy.deepcopy((net, hyperparameters))
    for layer in centred.modules():
        if hasattr(layer, "_hyperparameters") and layer._hyperparameters is not None:
            layer.__dict__["_hyperparameters"] = center
    recentre(centred, center, True)

    def step(network: Any, set_: HyperparameterSet, transform: bool) -> None:
        bind_weight_phase(set_, samples)
        loss = F.cross_entropy(network(X), Y)
        unbind(set_)
        named = dict(network.named_parameters())
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
        if transform:
            to_uncentred(network, set_, gradients)
            recentre(network, set_, False)
        with torch.no_grad():
            for name, parameter in named.items():
                if gradients[name] is not None:
                    parameter -= lr * gradients[name]
        if transform:
            recentre(network, set_, True)

    step(net, hyperparameters, False)
    step(centred, center, True)
    test_samples = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    expected = outputs(net, hyperparameters, test_samples)
    torch.testing.assert_close(outputs(centred, center, test_samples), expected, rtol=1e-6, atol=1e-6)


def to_uncentred(network: Any, hyperparameters: HyperparameterSet, gradients: dict[str, Any]) -> None:
    """`W = W_c - diag(V lambda) R`: the gradients of R and V gain what they do to `W_c` through `lambda`."""
    row = hyperparameters.unconstrained.double()
    for place, layer in network.named_modules():
        for name in getattr(layer, "responding", ()):
            base, response, gate = (
                ".".join(filter(None, [place, n])) for n in (name, f"response_{name}", f"{name}_gate")
            )
            r, v = (p.detach().requires_grad_() for p in (layer.response_weights(name), layer.gate_weights(name)))
            moved = layer.broadcast_gates(name, v @ row) * r
            for key, extra in zip((response, gate), torch.autograd.grad(moved, (r, v), gradients[base]), strict=True):
                gradients[key] = gradients[key] + extra
