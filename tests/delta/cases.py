"""Networks for the tests of Delta-STN: one with predictions computed by hand, and some that it cannot train."""

from typing import Any

import torch
import torch.nn.functional as F
from support import LitSmall, random_gates, response_layers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_stn import Float, HyperparameterSet
from lightning_stn.convert import convert


def tuned(dropout: float = 0.0) -> tuple[nn.Module, HyperparameterSet]:
    """A small network in float64 with random response weights and gates; its dropout is tuned, or off at 0."""
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 0.9, init=0.3), "other": Float(0.0, None, init=0.1)})
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3)]
    net = convert(nn.Sequential(*layers), hyperparameters, dropout="rate" if dropout else None).double()
    if not dropout:
        net[2].p = 0.0  # type: ignore[index, assignment]
    return random_gates(net, 0.5), hyperparameters


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y = torch.arange(5) % 3


def base_and_response(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    responses = {id(p) for layer in response_layers(net) for p in layer.response_parameters()}
    base, response = ([p for p in net.parameters() if (id(p) in responses) == which] for which in (False, True))
    return base, response


def by_loop(net: nn.Module, shifts: Tensor, *, linear: bool) -> Tensor:
    """Predictions of `tuned` with fixed base weights, by a loop over examples.

    Args:
        net: the network.
        shifts: `[n, h]`, samples minus the centre.
        linear: give the first-order predictions.
    """
    w = dict(net.named_parameters())

    def alone(x: Tensor, shift: Tensor) -> Tensor:
        def at(t: Tensor) -> Tensor:
            h = x
            for place in ("0", "3"):
                gates = [w[f"{place}.{kind}_gate"] @ shift * t for kind in ("weight", "bias")]
                weight = w[f"{place}.weight"].detach() + gates[0][:, None] * w[f"{place}.response_weight"]
                h = weight @ h + w[f"{place}.bias"].detach() + gates[1] * w[f"{place}.response_bias"]
                h = h.tanh() if place == "0" else h
            return h

        if not linear:
            return at(torch.ones((), dtype=torch.float64))
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        output = at(t)
        rows = [torch.autograd.grad(entry, t, create_graph=True)[0] for entry in output]
        return output.detach() + torch.stack(rows)

    return torch.stack([alone(x, shift) for x, shift in zip(X, shifts.double(), strict=True)])


def plain_forward(net: nn.Module) -> Tensor:
    """Predictions of the base network."""
    first, last = net[0], net[3]  # type: ignore[index]
    return F.linear(F.linear(X, first.weight, first.bias).tanh(), last.weight, last.bias)


class InParts(LitSmall):
    """Calls the network's layers one by one."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        for layer in self.net:  # type: ignore[union-attr]
            x = layer(x)
        return F.cross_entropy(x, y)


class Cube(torch.autograd.Function):
    """The cube of a tensor, without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class CubeLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


class WithoutForwardMode(LitSmall):
    """Its network has an operation without a forward-mode rule."""

    def __init__(self) -> None:
        super().__init__()
        self.net[6] = CubeLayer()  # type: ignore[index]


class Checkpointed(LitSmall):
    """Recomputes the network in the backward pass."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])
