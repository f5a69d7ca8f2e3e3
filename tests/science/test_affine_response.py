"""A quadratic training loss whose best response is affine: response layers must find exactly that function.

`L_T(w, lambda) = 1/2 (w - w*(lambda))' Q (w - w*(lambda))`, so the oracles are the known `w*` and `dw*/dlambda`.
"""

import math
from typing import NamedTuple

import pytest
import torch
from science.oracles import Response, double, gauss_hermite, minimize, respond, train
from torch import Tensor

from lightning_stn import Float, HyperparameterSet
from lightning_stn.binding import bind
from lightning_stn.layers import ResponseLinear

INIT = {"first": 0.3, "second": -0.7}
CENTRE = double(*INIT.values())
OUT = 3
COUPLING = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64)
"""`Q`: symmetric, positive definite, not diagonal."""

PROBES = {
    "bias": torch.zeros(1, 1, dtype=torch.float64),
    "weight and bias": torch.cat([torch.eye(2), torch.zeros(1, 2)]).double(),
}
"""Inputs whose outputs show a layer's parameters: zero for the bias, a unit vector for a column of the weight too."""


class Target(NamedTuple):
    """Best responses `W* = W + diag(A lambda) R`, `b* = b + B lambda` of a Linear; `A, B` are `[o, h]`."""

    weight: Tensor
    gates: Tensor
    response: Tensor
    bias: Tensor
    bias_response: Tensor

    @classmethod
    def draw(cls, features: int) -> "Target":
        generator = torch.Generator().manual_seed(1)
        shapes = ((OUT, features), (OUT, 2), (OUT, features), (OUT,), (OUT, 2))
        return cls(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))

    def __call__(self, inputs: Tensor, sample: Tensor) -> Tensor:
        """Outputs `[n, o]`, each computed with the weights of its example."""
        weights = self.weight + (sample @ self.gates.T)[:, :, None] * self.response
        return torch.einsum("noi,ni->no", weights, inputs) + self.bias + sample @ self.bias_response.T

    def exact(self, probes: Tensor) -> Response:
        """Outputs `[p, o]` at `lambda`, and their Jacobian `[p, o, h]` in closed form."""
        gated = (probes @ self.response.T)[:, :, None] * self.gates
        return Response(self(probes, CENTRE.expand(len(probes), -1)), gated + self.bias_response)


def quadratic(error: Tensor) -> Tensor:
    """`1/2 e' Q e` for every row."""
    return 0.5 * ((error @ COUPLING.to(error.dtype)) * error).sum(-1)


def make_layer(features: int, **inits: float) -> ResponseLinear:
    torch.manual_seed(0)
    specifications = {name: Float(None, None, init=init, scale=1.0) for name, init in inits.items()}
    return ResponseLinear(features, OUT, hyperparameters=HyperparameterSet(specifications))


@pytest.mark.parametrize("rows", [64, 1], ids=["a row per example", "one row"])
@pytest.mark.parametrize("probes", PROBES.values(), ids=PROBES)
def test_stochastic_training_finds_the_closed_form_best_response(probes, rows):
    features = probes.shape[1]
    target, layer = Target.draw(features), make_layer(features, **INIT)
    hyperparameters, generator = layer.hyperparameters, torch.Generator().manual_seed(2)

    def loss() -> Tensor:
        inputs = torch.randn(64, features, generator=generator) * probes.any()
        sample = hyperparameters.bound_sample().expand(64, -1)
        return quadratic(layer(inputs) - target(inputs.double(), sample.double()).float()).mean()

    train(layer, hyperparameters, (hyperparameters.sample(rows, generator) for _ in range(700)), loss, lr=0.1)
    found = respond(layer, hyperparameters, probes.float(), CENTRE.float())
    torch.testing.assert_close(found, target.exact(probes), atol=1e-2, rtol=0, check_dtype=False)


@pytest.mark.parametrize("probes", PROBES.values(), ids=PROBES)
def test_exact_fit_is_the_closed_form_best_response(probes):
    target, layer = Target.draw(probes.shape[1]), make_layer(probes.shape[1], **INIT).double()
    nodes, mass = gauss_hermite(CENTRE, double(1.0), order=3)
    inputs, sample = probes.repeat(len(nodes), 1), nodes.repeat_interleave(len(probes), 0)
    weights = mass.repeat_interleave(len(probes))

    def expected_loss() -> Tensor:
        with bind(layer.hyperparameters, sample):
            return (weights * quadratic(layer(inputs) - target(inputs, sample))).sum()

    minimize(layer, expected_loss)
    found = respond(layer, layer.hyperparameters, probes, CENTRE)
    torch.testing.assert_close(found, target.exact(probes), atol=1e-6, rtol=0)


def smoothed(point: float, sigma: float) -> Response:
    """`E w*(point + sigma eps)` and its derivative for `w* = (sin u, exp(u / 2), u^2)`: Gaussian moments."""
    damp, swell = math.exp(-(sigma**2) / 2), math.exp(sigma**2 / 8)
    return Response(
        double(math.sin(point) * damp, math.exp(point / 2) * swell, point**2 + sigma**2),
        double(math.cos(point) * damp, math.exp(point / 2) * swell / 2, 2 * point),
    )


@pytest.mark.parametrize("sigma", [0.2, 0.8])
def test_exact_fit_of_a_curved_best_response_is_its_closed_form_gaussian_smoothing(sigma):
    """Under `N(lambda, sigma^2)` the best affine fit has value `E w*` and, by Stein's lemma, derivative `E w*'`."""
    point = double(0.4)
    layer = make_layer(1, only=point.item()).double()
    nodes, mass = gauss_hermite(point, double(sigma), order=24)
    curved = torch.cat([nodes.sin(), (nodes / 2).exp(), nodes**2], dim=1)
    nothing = torch.zeros_like(nodes)

    def expected_loss() -> Tensor:
        with bind(layer.hyperparameters, nodes):
            return (mass * quadratic(layer(nothing) - curved)).sum()

    minimize(layer, expected_loss)
    found = respond(layer, layer.hyperparameters, nothing[0], point)
    expected = smoothed(point.item(), sigma)
    torch.testing.assert_close(found, Response(expected.value, expected.derivative[:, None]), atol=1e-6, rtol=0)
