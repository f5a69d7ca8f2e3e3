"""Tools of the science tests: quadrature, exact fit, stochastic training, and evaluation of the response."""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_stn import HyperparameterSet
from lightning_stn.binding import bind, bind_weight_phase, unbind


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gauss_hermite(centre: Tensor, scale: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Nodes `[q, h]` and weights `[q]` of Gauss-Hermite quadrature under `N(lambda, diag(sigma^2))`, float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    grid = torch.tensor(list(itertools.product(nodes, repeat=len(centre))), dtype=torch.float64)
    mass = torch.tensor(list(itertools.product(weights / weights.sum(), repeat=len(centre))), dtype=torch.float64)
    return centre + scale * grid, mass.prod(-1)


def minimize(module: nn.Module, objective: Callable[[], Tensor]) -> None:
    """Minimise by L-BFGS in float64 over all trainable parameters, until convergence."""
    parameters = trainable(module)
    assert all(parameter.dtype == torch.float64 for parameter in parameters)
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=400,
        history_size=30,
        tolerance_grad=1e-9,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)


def train(
    net: nn.Module, hyperparameters: HyperparameterSet, samples: Iterable[Tensor], loss: Callable[[], Tensor], lr: float
) -> None:
    """One step of Adam for each sample, at a rate that falls to zero; `loss` runs with the sample bound."""
    samples = list(samples)
    optimizer = torch.optim.Adam(trainable(net), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(samples))
    for sample in samples:
        bind_weight_phase(hyperparameters, sample)
        optimizer.zero_grad()
        loss().backward()
        unbind(hyperparameters)
        optimizer.step()
        decay.step()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class Response(NamedTuple):
    """A best response at `lambda`: its value, and its derivative with a last dimension `h`."""

    value: Tensor
    derivative: Tensor

    def relative_errors(self, exact: "Response") -> list[float]:
        """`|found - exact| / |exact|` of the value and of the derivative."""
        return [((a - b.reshape(a.shape)).norm() / b.norm()).item() for a, b in zip(self, exact, strict=True)]


def respond(net: nn.Module, hyperparameters: HyperparameterSet, probes: Tensor, centre: Tensor) -> Response:
    """The outputs for `probes` at `lambda`, and their Jacobian, by autograd through the response."""

    def output(unconstrained: Tensor) -> Tensor:
        with bind(hyperparameters, unconstrained.unsqueeze(0)):
            return net(probes)

    return Response(output(centre).detach(), torch.autograd.functional.jacobian(output, centre))
