"""A linear network with an L2-penalised input Jacobian, MacKay et al. (2019), arXiv:1903.03088, section 3.1.

`L_T(w, lambda) = (sum_n (f(x_n; w) - t_n)^2 + exp(lambda) ||df/dx||^2) / N`. For a linear network the Jacobian is its
weight vector, so this is ridge regression, and its best response gates the principal components by a sigmoid:
`w*(lambda) = V diag(sigmoid(log s^2 - lambda)) c`, with the singular values `s` and least-squares coefficients `c`.
"""

import pytest
import torch
from science.oracles import Response, double, gauss_hermite, minimize, respond, train
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert
from lightning_stn.binding import bind

EXAMPLES, FEATURES = 64, 4
CENTRE = 1.5


def make_data() -> tuple[Tensor, Tensor]:
    """Correlated inputs `[n, i]` with singular values 6 to 1 (so that the gates differ), and noisy targets `[n]`."""
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(draws @ mixing, full_matrices=False)
    inputs = left @ double(6, 3, 2, 1).diag() @ right
    noise = torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
    return inputs, inputs @ double(1.0, -2.0, 1.5, 0.5) + 0.1 * noise


INPUTS, TARGETS = make_data()


def principal() -> tuple[Tensor, Tensor, Tensor]:
    """Directions `V' [k, i]`, singular values `s [k]` and least-squares coefficients `c [k]`."""
    left, singular, directions = torch.linalg.svd(INPUTS, full_matrices=False)
    return directions, singular, left.T @ TARGETS / singular


def gated(point: float) -> Response:
    """The closed form: `w*` and `dw*/dlambda`, `[i]` each."""
    directions, singular, coefficients = principal()
    gates = torch.sigmoid(2 * singular.log() - point)
    return Response((gates * coefficients) @ directions, (-gates * (1 - gates) * coefficients) @ directions)


class TwoLayers(nn.Module):
    """Hidden units along the principal components, read out by the least-squares coefficients."""

    def __init__(self) -> None:
        super().__init__()
        directions, _, coefficients = principal()
        self.hidden = nn.Linear(FEATURES, FEATURES, bias=False)
        self.readout = nn.Linear(FEATURES, 1, bias=False).requires_grad_(False)
        self.hidden.weight.data.copy_(directions)
        self.readout.weight.data.copy_(coefficients)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.readout(self.hidden(inputs)).squeeze(-1)


def make_net(sigma: float) -> tuple[nn.Module, HyperparameterSet]:
    """The network, with responding hidden units and a fixed readout."""
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({"log_penalty": Float(None, None, init=CENTRE, scale=sigma)})
    return convert(TwoLayers(), hyperparameters, exclude=["readout"]), hyperparameters


def losses(net: nn.Module, inputs: Tensor, targets: Tensor, log_penalty: Tensor) -> Tensor:
    """`(f - t)^2 + exp(lambda)/N ||df/dx||^2` of each example, the Jacobian by autograd."""
    inputs = inputs.clone().requires_grad_()
    outputs = net(inputs)
    (jacobian,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return (outputs - targets) ** 2 + log_penalty.exp() / EXAMPLES * jacobian.square().sum(-1)


def errors_of_the_exact_fit(sigma: float) -> list[float]:
    net, hyperparameters = make_net(sigma)
    net.double()
    nodes, mass = gauss_hermite(double(CENTRE), double(sigma), order=7)
    inputs, targets = INPUTS.repeat(len(nodes), 1), TARGETS.repeat(len(nodes))
    sample, weights = nodes.repeat_interleave(EXAMPLES, 0), mass.repeat_interleave(EXAMPLES) / EXAMPLES

    def expected_loss() -> Tensor:
        with bind(hyperparameters, sample):
            return (weights * losses(net, inputs, targets, sample[:, 0])).sum()

    minimize(net, expected_loss)
    found = respond(net, hyperparameters, torch.eye(FEATURES, dtype=torch.float64), double(CENTRE))
    return found.relative_errors(gated(CENTRE))


@pytest.mark.parametrize("point", [-6.0, -1.0, 0.0, CENTRE, 4.0, 9.0])
def test_sigmoid_gates_of_the_principal_components_give_the_exact_ridge_solution(point):
    penalty = double(point).exp()
    normal = INPUTS.T @ INPUTS + penalty * torch.eye(FEATURES, dtype=torch.float64)
    weight = torch.linalg.solve(normal, INPUTS.T @ TARGETS)
    derivative = -penalty * torch.linalg.solve(normal, weight)  # Implicit differentiation of the normal equations.
    torch.testing.assert_close(gated(point), Response(weight, derivative), atol=1e-10, rtol=1e-10)


def test_exact_fit_follows_the_closed_form_sigmoid_gates_up_to_sigma_squared():
    """An affine response cannot follow the curved sigmoid: value and derivative have errors of `O(sigma^2)`."""
    coarse, fine = errors_of_the_exact_fit(0.2), errors_of_the_exact_fit(0.1)
    assert max(fine) < 0.01
    assert [a / b for a, b in zip(coarse, fine, strict=True)] == pytest.approx([4, 4], rel=0.1)


def test_stochastic_training_follows_the_closed_form_sigmoid_gates_within_five_percent():
    net, hyperparameters = make_net(0.3)
    generator = torch.Generator().manual_seed(4)
    copies = 8
    inputs, targets = INPUTS.float().repeat(copies, 1), TARGETS.float().repeat(copies)
    train(
        net,
        hyperparameters,
        (hyperparameters.sample(len(inputs), generator) for _ in range(800)),
        lambda: losses(net, inputs, targets, hyperparameters["log_penalty"]).mean(),
        lr=0.02,
    )
    found = respond(net, hyperparameters, torch.eye(FEATURES), torch.tensor([CENTRE]))
    assert max(found.relative_errors(gated(CENTRE))) < 0.05
